"""A run's checkpoints as they are written: one named composite per step, in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from lmspt_jax.checkpoint.best import Best
from lmspt_jax.checkpoint.orbax_io import DAMAGE, cannot_write, context, failed_saves, reading, writing
from lmspt_jax.errors import Interrupted, LmsptError, shown
from lmspt_jax.files import read_json

FOLDER = 'checkpoints'
FORMAT = 2  # raised when the state's layout changes
_STEP_METADATA = '_CHECKPOINT_METADATA'  # Orbax's file
_LISTEN = 1.0  # seconds between two looks at a save in the background


def has_checkpoint(workdir: str | Path) -> bool:
  """Whether a run's folder holds a whole checkpoint; a half-written one has another name than its step's."""
  return any(path.name.isdigit() for path in (Path(workdir) / FOLDER).glob('*'))


@dataclass
class _NewestAndBest:
  """What Orbax asks after a save, of checkpoints in the order of their steps: which stay."""

  newest: int
  best: int | None = None  # step

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    first = len(checkpoints) - self.newest
    return [number >= first or one.step == self.best for number, one in enumerate(checkpoints)]


class CheckpointStore:
  """A run's checkpoints.

  Args:
    workdir: the run's folder; checkpoints lie in `checkpoints/STEP`.
    keep: how many of the newest stay, beside the best one (`best` of the record that is saved last). None keeps all.
    alarm: called from a thread with the message of a save that failed in the background. For several hosts: this one's
      main thread may wait for another that waits for this one's part of the checkpoint.

  As a context manager, it is closed at the end; but of several hosts, one that fails waits for no save.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None, alarm: Callable[[str], None] | None = None):
    training = ocp.training
    self._kept = _NewestAndBest(keep) if keep else training.preservation_policies.PreserveAll()
    told = context()
    # Else, where a folder can't be made, Orbax' threads wait five minutes for it, and the process for them.
    told.async_options.create_directories_asynchronously = False
    # The caller decides when to save: every call is meant, so the interval is one step.
    folder = Path(workdir).absolute() / FOLDER
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for path in folder.glob(f'*/{_STEP_METADATA}'):  # of every step, and read at once
        if path.parent.name.isdigit():  # else half-written
          read_json(path)
      self._checkpointer = training.Checkpointer(
          folder, preservation_policy=self._kept, cleanup_tmp_directories=keep is not None,
          save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1), context=told)
    except OSError as error:
      raise LmsptError(f'{folder}: can\'t be used ({error.strerror}); give a --workdir that you own') from error
    except DAMAGE as error:
      raise LmsptError(f'{folder}: the {_STEP_METADATA} of a checkpoint in it can\'t be read ({error}); delete that '
                       'checkpoint') from error
    self._saving: int | None = None  # step
    self._failed = False
    self._alarm = alarm

  def __enter__(self) -> CheckpointStore:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._alarm is None or kind is None or issubclass(kind, Interrupted):  # else the others may be gone
      self.close()

  @property
  def latest_step(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def steps(self) -> list[int]:
    """Of all whole checkpoints, in order."""
    return sorted(found.step for found in self._checkpointer.checkpoints)

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing; the arrays are copied before it returns, so the caller may donate them.

    Raises:
      LmsptError: this save or the one before could not be written; earlier ones are whole. So do `check`, `wait` and
        `close`.
    """
    self.wait()
    failed_saves.clear()
    if step != self.latest_step:
      best = Best.of(record)
      if best is not None and isinstance(self._kept, _NewestAndBest):
        self._kept.best = best.step
      with writing(self._folder(step)):
        self._checkpointer.save_checkpointables_async(step, _parts(state, record), force=True)
      self._saving = step
      if self._alarm is not None:
        threading.Thread(target=self._listen, args=(step,), name=f'lmspt-save-{step}', daemon=True).start()

  def _listen(self, step: int) -> None:
    while self._saving == step and self._checkpointer.is_saving_in_progress():
      if failed_saves:
        self._alarm(cannot_write(self._folder(step), failed_saves[0]))
        return
      time.sleep(_LISTEN)

  def check(self) -> None:
    """Raises if the last save has failed by now; waits for nothing."""
    if self._saving is not None and failed_saves:
      folder, self._failed, self._saving = self._folder(self._saving), True, None
      raise LmsptError(cannot_write(folder, failed_saves[0])) from failed_saves[0]

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """State (on the shardings of `abstract_state`) and record of a step."""
    record = self.record(step)
    with reading(self._folder(step)):
      loaded = self._checkpointer.load_checkpointables(step, {'state': abstract_state})
    return loaded['state'], record

  def record(self, step: int) -> dict[str, Any]:
    """The record alone.

    Raises:
      LmsptError: it is damaged, or was written by another version of the format.
    """
    with reading(self._folder(step)):
      record = self._checkpointer.load_checkpointables(step, {'record': None})['record']
    found = record.get('format') if isinstance(record, dict) else None
    if found != FORMAT:
      raise LmsptError(f'{self._folder(step)}: checkpoint format {shown(found)}, this version reads {FORMAT}; use the '
                       'lmspt_jax that wrote it')
    return record

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    while self._saving is not None and self._checkpointer.is_saving_in_progress():
      self.check()
      time.sleep(0.01)
    step, self._saving = self._saving, None
    if step is not None:
      self._failed = True
      with writing(self._folder(step)):
        self._checkpointer.wait()
      self._failed = False

  def close(self) -> None:
    """Ends the threads; after a save that failed they are left, as they wait for those of the other hosts."""
    self.wait()
    if not self._failed:
      self._checkpointer.close()

  def _folder(self, step: int) -> Path:
    return Path(self._checkpointer.directory) / str(step)


def write(folder: Path, state: Any, record: dict[str, Any]) -> None:
  """A checkpoint by itself, in place of what `folder` holds; returns when it is on disk. Raises LmsptError."""
  with context(), writing(folder):
    ocp.save_checkpointables(folder, _parts(state, record), overwrite=True)


def read(folder: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
  """State (on the shardings of `abstract_state`) and record of a checkpoint by itself. Raises LmsptError."""
  with context(), reading(folder):
    loaded = ocp.load_checkpointables(folder, {'state': abstract_state, 'record': None})
  return loaded['state'], loaded['record']


def _parts(state: Any, record: dict[str, Any]) -> dict[str, Any]:
  return {'state': state, 'record': {'format': FORMAT, **record}}
