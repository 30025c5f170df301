"""The runs of a sweep as plain values, and the functions that make them. Nothing here looks at a config or a disk.

A field is a dotted name as in `--config.FIELD=VALUE`, a value what stands behind it: a number, a truth value, a text,
or a tuple of these. All functions raise LmsptError for what can't be meant.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lmspt_jax.errors import LmsptError, shown

SEED = 'train.seed'
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]{0,99}')  # a folder's, and of what a shell leaves alone
RESERVED = ('sweep.md', 'sweep.csv', 'sweep.svg')  # what a sweep writes beside its runs
BASE = 'base'  # the group of runs that differ in nothing but the seed
Draw = Callable[[Random], Any]


@dataclass(frozen=True)
class Run:
  """A config with changes.

  Attributes:
    name: also of its folder.
    overrides: value by field.
    group: its name without the seed; runs of one group are averaged. '' for runs that only set the seed.
  """

  name: str
  overrides: Mapping[str, Any] = field(default_factory=dict)
  group: str = ''


@dataclass(frozen=True)
class Sweep:
  """What get_sweep() returns.

  Attributes:
    config: FILE[:ARG] as for --config.
    runs: each with a name of its own.
    overrides: changes that all runs have in common; a run's own come after them.
  """

  config: str
  runs: Sequence[Run]
  overrides: Mapping[str, Any] = field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.config, str) or not all(isinstance(run, Run) for run in self.runs):
      raise LmsptError(f'Sweep({shown(self.config)}, {shown(self.runs)}): give a config file and runs, such as '
                       "Sweep('configs/demo.py', seeds(2))")
    if not self.runs:
      raise LmsptError('the sweep has no runs; give Sweep at least one')
    names, groups = {}, {}
    for run in self.runs:
      if not NAME.fullmatch(run.name) or run.name in RESERVED:
        raise LmsptError(f'run {shown(run.name)}: is to be a folder\'s name: use letters, digits and . _ + - (100 at '
                         f'most), and none of {", ".join(RESERVED)}')
      if run.name.casefold() in names:  # some file systems take a and A for one
        raise LmsptError(f'run {run.name!r} is there twice; give each run of the sweep a name of its own')
      names[run.name.casefold()] = run
      shared = {name: value for name, value in run.overrides.items() if name != SEED}
      other = groups.setdefault(run.group, (run.name, shared))
      if other[1] != shared:
        raise LmsptError(f'runs {other[0]!r} and {run.name!r} are of one group, {run.group or BASE!r}, and differ in '
                         'more than the seed; they can\'t be averaged: give them groups of their own')


def named(sets: Mapping[str, Mapping[str, Any]]) -> tuple[Run, ...]:
  """A run for each name: {'small': {'model.latent_dim': 128}, ...}."""
  return tuple(Run(name, dict(overrides), group=name) for name, overrides in sets.items())


def grid(fields: Mapping[str, Sequence[Any]]) -> tuple[Run, ...]:
  """Every combination of the fields' values; the last field changes fastest."""
  lists = _value_lists('grid', fields)
  return _labelled(list(lists), itertools.product(*lists.values()))


def zipped(fields: Mapping[str, Sequence[Any]]) -> tuple[Run, ...]:
  """The fields' first values together, then the second, and so on."""
  lists = _value_lists('zipped', fields)
  counts = {name: len(values) for name, values in lists.items()}
  if len(set(counts.values())) > 1:
    raise LmsptError(f'zipped: {", ".join(f"{name} has {count} values" for name, count in counts.items())}; give all '
                     'the same number')
  return _labelled(list(lists), zip(*lists.values(), strict=True))


def random(count: int, fields: Mapping[str, Draw], *, seed: int = 0) -> tuple[Run, ...]:
  """`count` draws of all fields, named random0, random1, ...

  Each field draws from a stream of its own: more draws add to fewer, and another field changes none of them.
  """
  streams = {name: Random(f'{seed} {name}') for name in fields}  # a text seeds alike on every machine
  drawn = [{name: draw(streams[name]) for name, draw in fields.items()} for _ in range(_count('random', count))]
  return tuple(Run(f'random{i}', overrides, group=f'random{i}') for i, overrides in enumerate(drawn))


def uniform(low: float, high: float) -> Draw:
  """Draws between two numbers, rounded to four digits."""
  _check_bounds('uniform', low, high)
  return lambda stream: _rounded(stream.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
  """Draws between two positive numbers, every factor alike, rounded to four digits."""
  _check_bounds('log_uniform', low, high)
  if low <= 0:
    raise LmsptError(f'log_uniform({low}, {high}): both must be positive; use uniform for others')
  return lambda stream: _rounded(math.exp(stream.uniform(math.log(low), math.log(high))))


def choice(values: Sequence[Any]) -> Draw:
  """Draws one of some values."""
  values = tuple(values)
  if not values:
    raise LmsptError('choice(()): there is nothing to draw; give values')
  return lambda stream: values[int(stream.random() * len(values))]


def seeds(count: int) -> tuple[Run, ...]:
  """Runs that differ in the seed alone: 0, 1, ..."""
  return tuple(Run(f'seed{seed}', {SEED: seed}) for seed in range(_count('seeds', count)))


def product(*factors: Sequence[Run]) -> tuple[Run, ...]:
  """Every combination of a run from each factor: names are joined by -, overrides put together."""
  return tuple(_joined(runs) for runs in itertools.product(*factors))


def as_text(name: str, value: Any) -> str:
  """A value as `--config.NAME=` takes it. Raises LmsptError for one that has no such form."""
  if isinstance(value, str):
    return value
  if isinstance(value, bool):
    return 'true' if value else 'false'
  if isinstance(value, float) and math.isfinite(value):
    return repr(float(value))  # NumPy's call themselves something else
  if isinstance(value, int):
    return str(int(value))
  if isinstance(value, tuple | list) and all(
      isinstance(v, int | float | str) and not isinstance(v, bool) for v in value):
    return ','.join(repr(v) if isinstance(v, str) else as_text(name, v) for v in value) or '()'
  raise LmsptError(f'config field {name} = {shown(value)}: give a finite number, True or False, a text, or a tuple of '
                   'numbers or texts')


def short_names(fields: Sequence[str]) -> dict[str, str]:
  """The end of each dotted name that tells it from the others."""
  out = {}
  for name in fields:
    parts = name.split('.')
    ends = ['.'.join(parts[i:]) for i in reversed(range(len(parts)))]
    alone = (end for end in ends if sum(f'.{other}'.endswith(f'.{end}') for other in fields) == 1)
    out[name] = next(alone, name)
  return out


def _joined(runs: Sequence[Run]) -> Run:
  overrides: dict[str, Any] = {}
  for run in runs:
    twice = overrides.keys() & run.overrides.keys()
    if twice:
      raise LmsptError(f'product: {min(twice)} is set by two factors; set each field in one of them')
    overrides |= run.overrides
  return Run('-'.join(run.name for run in runs), overrides, '-'.join(run.group for run in runs if run.group))


def _labelled(fields: Sequence[str], combinations: Any) -> tuple[Run, ...]:
  short = short_names(fields)
  runs = []
  for values in combinations:
    overrides = dict(zip(fields, values, strict=True))
    name = '-'.join(f'{short[key]}_{_slug(as_text(key, value))}' for key, value in overrides.items())
    alone = {key: value for key, value in overrides.items() if key != SEED}
    group = '-'.join(f'{short[key]}_{_slug(as_text(key, value))}' for key, value in alone.items())
    runs.append(Run(name, overrides, group))
  return tuple(runs)


def _slug(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9.+-]+', '_', text)


def _value_lists(kind: str, fields: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
  for name, values in fields.items():
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
      raise LmsptError(f'{kind}: {name} = {shown(values)}: give a tuple of the values to try')
  if not fields:
    raise LmsptError(f'{kind}({{}}): there is nothing to vary; give fields and their values')
  return {name: tuple(values) for name, values in fields.items()}


def _count(kind: str, count: int) -> int:
  if not isinstance(count, int) or count < 1:
    raise LmsptError(f'{kind}({shown(count)}): give a whole number from 1 on')
  return count


def _check_bounds(kind: str, low: float, high: float) -> None:
  if not -math.inf < low < high < math.inf:
    raise LmsptError(f'{kind}({low}, {high}): give two finite numbers, the lower first')


def _rounded(value: float) -> float:
  """Four digits: short in names and tables, and the same where the last bits of exp aren't."""
  return float(f'{value:.4g}')
