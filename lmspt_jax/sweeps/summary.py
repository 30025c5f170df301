"""What came of a sweep: statistics over seeds, a table for people, a table for programs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmspt_jax.sweeps.members import FIGURES, Member, Progress
from lmspt_jax.sweeps.runs import short_names


@dataclass(frozen=True)
class Result:
  """A run and how far it has come."""

  member: Member
  progress: Progress

  @property
  def finished(self) -> bool:
    return self.progress.state == 'finished'

  @property
  def last(self) -> dict[str, float]:
    """Its latest held-out figures by name."""
    return self.progress.figures[max(self.progress.figures)] if self.progress.figures else {}


@dataclass(frozen=True)
class Statistic:
  """Mean, sample standard deviation (NaN for one value) and count. One value that is not finite makes both NaN."""

  mean: float
  deviation: float
  count: int


def statistic(values: Sequence[float]) -> Statistic:
  """Of at least one value."""
  if not all(map(math.isfinite, values)):
    return Statistic(math.nan, math.nan, len(values))
  return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def figure_names(results: Iterable[Result]) -> list[str]:
  """Of all runs and steps, in the order in which they first appear."""
  return list(dict.fromkeys(name for result in results for row in result.progress.figures.values() for name in row))


def by_group(results: Iterable[Result]) -> dict[str, list[Result]]:
  """The results of each group, in the sweep's order."""
  groups: dict[str, list[Result]] = {}
  for result in results:
    groups.setdefault(result.member.group, []).append(result)
  return groups


def curve(results: Sequence[Result], figure: str) -> dict[int, Statistic]:
  """Step -> a figure's statistic over the runs that have it there; unfinished runs too."""
  steps = sorted({step for result in results for step, row in result.progress.figures.items() if figure in row})
  return {step: statistic([result.progress.figures[step][figure] for result in results
                           if figure in result.progress.figures.get(step, {})]) for step in steps}


def as_markdown(results: Sequence[Result], title: str) -> str:
  """A row a group: its changes, and each held-out figure over its finished runs; then what isn't finished."""
  finished = [result for result in results if result.finished]
  fields, figures = _fields(results), figure_names(finished)
  short = short_names(fields)
  rows = [['group', *(short[name] for name in fields), 'finished', *figures]]
  for group, mine in by_group(results).items():
    done = [result for result in mine if result.finished]
    varied = mine[0].member.varied
    rows.append([group, *(varied.get(name, '') for name in fields), f'{len(done)} of {len(mine)}',
                 *(_cell(done, name) for name in figures)])
  lines = [f'# {title}', '', *_table(rows), '']
  if finished:
    steps = sorted({result.member.config.train.num_steps for result in finished})
    lines += [f'Held-out figures at step {", ".join(map(str, steps))}: mean ± standard deviation over the finished '
              'runs of a group (their number in brackets where a figure has fewer).', '']
  rest = [result for result in results if not result.finished]
  if rest:
    lines += ['Not finished:', '', *(_rest_line(result) for result in rest), '']
  return '\n'.join(lines)


def as_csv(results: Sequence[Result]) -> str:
  """A row a run: name, group, seed, status, step, its changes by field, its latest held-out figures and their step."""
  fields, figures = _fields(results), figure_names(results)
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(['name', 'group', 'seed', 'status', 'step', *fields, f'{FIGURES}step',
                   *(f'{FIGURES}{name}' for name in figures)])
  for result in results:
    member, last = result.member, result.last
    writer.writerow([
        member.name, member.group, member.seed, result.progress.state, result.progress.step,
        *(member.varied.get(name, '') for name in fields), max(result.progress.figures, default=''),
        *(last.get(name, '') for name in figures)])
  return out.getvalue()


def _fields(results: Iterable[Result]) -> list[str]:
  """Every field but the seed that a run changes."""
  return list(dict.fromkeys(name for result in results for name in result.member.varied))


def _cell(done: Sequence[Result], figure: str) -> str:
  values = [result.last[figure] for result in done if figure in result.last]
  if not values:
    return ''
  found = statistic(values)
  text = f'{found.mean:.4g}' + ('' if math.isnan(found.deviation) else f' ± {found.deviation:.2g}')
  return text if found.count == len(done) else f'{text} ({found.count})'


def _rest_line(result: Result) -> str:
  found = result.progress
  return f'* {result.member.name}: {found.state}, step {found.step}' + (f' ({found.note})' if found.note else '')


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Markdown with columns of one width, so that it is read in a terminal as well."""
  cells = [[text.replace('|', r'\|') for text in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['| ' + ' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + ' |'
           for row in cells]
  return [lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]]
