"""A sweep's runs with their configs and folders, and how far each has come, read from what `lmspt train` writes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmspt_jax.config import ExperimentConfig, binding_changes, changed_fields, to_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import read_json
from lmspt_jax.sweeps.runs import BASE, SEED, Run, Sweep, as_text

LOG = 'log.txt'  # what the run printed, in its folder
FIGURES = 'held_out/'  # names of held-out figures in metrics.jsonl begin so
# A run may go on with other ones of these, but its figures then don't compare with the others'.
_MEASURE = ('train.eval_utterances', 'train.eval_seconds')
_TAIL = 1 << 16  # bytes; a row of metrics.jsonl has one or two thousand
Load = Callable[[str, Sequence[tuple[str, str]]], ExperimentConfig]


@dataclass(frozen=True)
class Member:
  """A run of a sweep, ready to start.

  Attributes:
    run: name, changes and group.
    config: the whole config that it trains.
    folder: its workdir.
    arguments: of `lmspt train`.
  """

  run: Run
  config: ExperimentConfig
  folder: Path
  arguments: tuple[str, ...]

  @property
  def name(self) -> str:
    return self.run.name

  @property
  def group(self) -> str:
    return self.run.group or BASE

  @property
  def seed(self) -> int:
    return self.config.train.seed

  @property
  def varied(self) -> dict[str, str]:
    """The changes as texts, without the seed."""
    return {name: as_text(name, value) for name, value in self.run.overrides.items() if name != SEED}


@dataclass(frozen=True)
class Progress:
  """How far a run has come.

  Attributes:
    state: 'finished' (`lmspt train` would find nothing to do), 'failed', 'launched' (handed to a cluster), 'unfinished'
      or 'waiting' (not begun).
    step: of the last row of its metrics.
    figures: held-out figures by step, in order; NaN where one was not finite.
    note: of one that failed or was launched.
  """

  state: str = 'waiting'
  step: int = 0
  figures: dict[int, dict[str, float]] = field(default_factory=dict)
  note: str = ''


def resolve(sweep: Sweep, workdir: Path, load: Load) -> tuple[Member, ...]:
  """The sweep's runs under `workdir`, each with its config checked; `load` is (FILE[:ARG], overrides) -> config.

  Raises LmsptError naming the first run that can't be, and why.
  """
  members = []
  for run in sweep.runs:
    try:
      texts = [(name, as_text(name, value)) for name, value in {**sweep.overrides, **run.overrides}.items()]
      config = load(sweep.config, texts)
      if not config.data.held_out:
        raise LmsptError("config field data.held_out = '': runs are compared by held-out figures; give KIND:URI")
    except LmsptError as error:
      raise LmsptError(f'run {run.name!r}: {error}') from error
    folder = workdir / run.name
    arguments = (f'--config={sweep.config}', f'--workdir={folder}',
                 *(f'--config.{name}={text}' for name, text in texts))
    members.append(Member(run, config, folder, arguments))
  return tuple(members)


def progress(member: Member) -> Progress:
  """What the run's folder says. Raises LmsptError if another config was trained there."""
  state, step, figures = 'waiting', 0, {}
  if _is_its_own(member):
    path = member.folder / 'metrics.jsonl'
    state, step, figures = 'unfinished', last_step(path), held_out_rows(path)
    # Its last checkpoint as well: a run that is killed between the two has something left to do.
    if max(figures, default=-1) == member.config.train.num_steps == last_checkpoint(member.folder):
      return Progress('finished', step, figures)
  launched, failed = (_note_path(member, noted) for noted in ('launched', 'failed'))
  if launched.exists():
    why = f'{_read(launched).get("time")}; if its job has ended, remove {launched} and start it again'
    return Progress('launched', step, figures, why)
  if failed.exists():
    found = _read(failed)
    why = f'status {found.get("status")}, {found.get("line")}; see {member.folder / LOG}'
    return Progress('failed', step, figures, why)
  return Progress(state, step, figures)


def held_out_rows(path: Path) -> dict[int, dict[str, float]]:
  """Step -> held-out figures by name, without the prefix, of a run's metrics.jsonl; {} where there is none."""
  rows = {}
  if path.is_file():
    with path.open(encoding='utf-8') as file:
      for line in file:
        if f'"{FIGURES}' in line and (row := _row(line)):
          rows[row['step']] = {name.removeprefix(FIGURES): math.nan if value is None else float(value)
                               for name, value in row.items() if name.startswith(FIGURES)}
  return rows


def last_step(path: Path) -> int:
  """The step of the last whole row of a run's metrics.jsonl; 0 where there is none."""
  try:
    with path.open('rb') as file:
      file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
      lines = file.read().decode('utf-8', errors='replace').splitlines()
  except FileNotFoundError:
    return 0
  return next((row['step'] for line in reversed(lines) if (row := _row(line))), 0)


def last_checkpoint(folder: Path) -> int:
  """The step of a run's newest whole checkpoint; -1 for none."""
  return max((int(path.name) for path in (folder / 'checkpoints').glob('*') if path.name.isdigit()), default=-1)


def note(member: Member, state: str, **content: Any) -> None:
  """Leaves in the run's folder that it 'failed' or was 'launched'."""
  path = _note_path(member, state)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({'time': time.strftime('%Y-%m-%d %H:%M:%S'), **content}) + '\n', encoding='utf-8')


def remove_note(member: Member, state: str) -> None:
  _note_path(member, state).unlink(missing_ok=True)


def _note_path(member: Member, state: str) -> Path:
  return member.folder / f'{state}.json'


def _is_its_own(member: Member) -> bool:
  """Whether what lies in the run's folder comes of its config. Another one that left no checkpoint is to be forgotten:
  `lmspt train` begins anew there."""
  path = member.folder / 'config.json'
  if not path.exists():
    return False
  before, now = _read(path), to_dict(member.config)
  every = changed_fields(before, now)
  changed = [*(every[name] for name in _MEASURE if name in every), *binding_changes(before, now)]
  if changed and last_checkpoint(member.folder) >= 0:
    more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
    raise LmsptError(f'{member.folder}: holds a run with another config ({", ".join(changed[:4])}{more}); use another '
                     f'--workdir, or another name than {member.name!r} in the sweep')
  return not changed


def _read(path: Path) -> dict[str, Any]:
  found = read_json(path)
  if not isinstance(found, dict):
    raise LmsptError(f'{path}: not what a run writes; remove it')
  return found


def _row(line: str) -> dict[str, Any] | None:
  """A row of metrics.jsonl; None for one that a kill cut short."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get('step'), int) else None
