"""Checkpoints of a run: one named composite per step, written in the background. The only importer of Orbax.

A checkpoint holds `state` (the train state's arrays), and `record`, JSON: data position, config, teacher id,
versions. Orbax writes to a temporary folder and renames it, so what can be listed is whole; what a process that was
killed has left half-written is removed by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lmspt_jax.config import ExperimentConfig, from_dict
from lmspt_jax.errors import Interrupted, LmsptError, shown
from lmspt_jax.files import read_json
from lmspt_jax.models.tokenizer import SpeechTokenizer, abstract_tokenizer, merge_tokenizer

FOLDER = 'checkpoints'
FORMAT = 2  # raised when the state's layout changes
_STEP_METADATA = '_CHECKPOINT_METADATA'  # Orbax's file
_ARRAYS = 'd'  # folders of arrays; other files of a checkpoint are of text, or list what is in those
_MAX_METADATA = 16 << 20  # bytes of such a file
_MAX_RATIO = 100  # of arrays to their compressed files; parameters hardly shrink
# What Orbax raises, besides OSError, for files that are not as it writes them.
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError)
_LISTEN = 1.0  # seconds between two looks at a save in the background
# What tensorstore prefixes its ValueErrors with when it is the store that fails.
_STORE_FAULT = re.compile('(RESOURCE_EXHAUSTED|OUT_OF_RANGE|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|UNAVAILABLE|'
                          'DEADLINE_EXCEEDED|FAILED_PRECONDITION|ABORTED|DATA_LOSS|INTERNAL|UNKNOWN): ')

_failed_saves: list[BaseException] = []  # what Orbax's threads have met with since the last save began


def has_checkpoint(workdir: str | Path) -> bool:
  """Whether a run's folder holds a whole checkpoint; a half-written one has another name than its step's."""
  return any(path.name.isdigit() for path in (Path(workdir) / FOLDER).glob('*'))


class CheckpointStore:
  """A run's checkpoints.

  Args:
    workdir: the run's folder; checkpoints lie in `checkpoints/STEP`.
    keep: how many of the newest stay.
    alarm: called from a thread with the message of a save that failed in the background. For several hosts: this one's
      main thread may wait for another that waits for this one's part of the checkpoint.

  As a context manager, it is closed at the end; but of several hosts, one that fails waits for no save.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None, alarm: Callable[[str], None] | None = None):
    training = ocp.training
    policy = training.preservation_policies.LatestN(keep) if keep else training.preservation_policies.PreserveAll()
    context = _context()
    # Else, where a folder can't be made, Orbax' threads wait five minutes for it, and the process for them.
    context.async_options.create_directories_asynchronously = False
    # The caller decides when to save: every call is meant, so the interval is one step.
    folder = Path(workdir).absolute() / FOLDER
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for path in folder.glob(f'*/{_STEP_METADATA}'):  # of every step, and read at once
        if path.parent.name.isdigit():  # else half-written
          read_json(path)
      self._checkpointer = training.Checkpointer(
          folder, preservation_policy=policy, cleanup_tmp_directories=keep is not None,
          save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1), context=context)
    except OSError as error:
      raise LmsptError(f'{folder}: can\'t be used ({error.strerror}); give a --workdir that you own') from error
    except _DAMAGE as error:
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

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing; the arrays are copied before it returns, so the caller may donate them.

    Raises:
      LmsptError: this save or the one before could not be written; earlier ones are whole. So do `check`, `wait` and
        `close`.
    """
    self.wait()
    _failed_saves.clear()
    if step != self.latest_step:
      with _writing(self._folder(step)):
        self._checkpointer.save_checkpointables_async(step, _parts(state, record), force=True)
      self._saving = step
      if self._alarm is not None:
        threading.Thread(target=self._listen, args=(step,), name=f'lmspt-save-{step}', daemon=True).start()

  def _listen(self, step: int) -> None:
    while self._saving == step and self._checkpointer.is_saving_in_progress():
      if _failed_saves:
        self._alarm(_cannot_write(self._folder(step), _failed_saves[0]))
        return
      time.sleep(_LISTEN)

  def check(self) -> None:
    """Raises if the last save has failed by now; waits for nothing."""
    if self._saving is not None and _failed_saves:
      folder, self._failed, self._saving = self._folder(self._saving), True, None
      raise LmsptError(_cannot_write(folder, _failed_saves[0])) from _failed_saves[0]

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """State (on the shardings of `abstract_state`) and record of a step."""
    record = self.record(step)
    with _reading(self._folder(step)):
      loaded = self._checkpointer.load_checkpointables(step, {'state': abstract_state})
    return loaded['state'], record

  def record(self, step: int) -> dict[str, Any]:
    """The record alone.

    Raises:
      LmsptError: it is damaged, or was written by another version of the format.
    """
    with _reading(self._folder(step)):
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
      with _writing(self._folder(step)):
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
  with _context(), _writing(folder):
    ocp.save_checkpointables(folder, _parts(state, record), overwrite=True)


def read(folder: Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
  """State (on the shardings of `abstract_state`) and record of a checkpoint by itself. Raises LmsptError."""
  with _context(), _reading(folder):
    loaded = ocp.load_checkpointables(folder, {'state': abstract_state, 'record': None})
  return loaded['state'], loaded['record']


def _parts(state: Any, record: dict[str, Any]) -> dict[str, Any]:
  return {'state': state, 'record': {'format': FORMAT, **record}}


def _context() -> ocp.Context:
  # By itself Orbax would save the record's text among arrays, find none there and warn with every checkpoint.
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='record')
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  """What Orbax and tensorstore raise for a store that takes nothing more, as one line."""
  _hear_once()
  try:
    yield
  except (OSError, ValueError) as error:
    if not _is_of_store(error):
      raise
    raise LmsptError(_cannot_write(folder, error)) from error


def _is_of_store(error: BaseException | None) -> bool:
  return isinstance(error, OSError) or (isinstance(error, ValueError) and bool(_STORE_FAULT.match(str(error))))


def _cannot_write(folder: Path, error: BaseException) -> str:
  return (f'{folder}: this checkpoint could not be written ({error}), earlier ones are whole; make room there, or mend '
          'access to it, and run the same command again')


@functools.cache
def _hear_once() -> None:
  """From now on, what makes a save fail in the background is noted, and not told by Orbax with all its calls.

  Its log is where a failure can be seen at once: Orbax raises it only when all hosts have come to their end, which the
  others may not do without this one, or after twenty minutes.
  """
  show = sys.unraisablehook

  def unless_late(report: Any) -> None:
    # tensorstore tells Orbax, which has given up already, that one more of its files failed.
    if not isinstance(report.exc_value, RuntimeError) or str(report.exc_value) != 'Event loop is closed':
      show(report)

  def note(record: logging.LogRecord) -> bool:
    if not record.exc_info or f'{os.sep}orbax{os.sep}' not in record.pathname:
      return True
    if _is_of_store(record.exc_info[1]):
      _failed_saves.append(record.exc_info[1])
    return False

  sys.unraisablehook = unless_late
  logging.getLogger('absl').addFilter(note)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
  """What Orbax raises for files that are missing, cut short or of other arrays, as one line.

  It opens whatever lies in the folder and takes a file of text for as long as it is, so that is looked at first.
  """
  for where, folders, files in os.walk(folder):
    for name in files + [name for name in folders if Path(where, name).is_symlink()]:
      path = Path(where, name)
      if not path.is_file():
        raise LmsptError(f'{path}: not a plain file; delete {folder} to go on from the checkpoint before it')
      if Path(where).name != _ARRAYS and path.stat().st_size > _MAX_METADATA:
        raise LmsptError(f'{path}: {path.stat().st_size} bytes, more than a checkpoint has there; delete {folder} to '
                         'go on from the checkpoint before it')
  try:
    yield
  except (OSError, *_DAMAGE) as error:
    raise LmsptError(f'{folder}: can\'t be read, so it is damaged or of another version of lmspt_jax; delete it to go '
                     'on from the checkpoint before it') from error


@dataclass(frozen=True)
class RestoredModel:
  """A run's model, ready for inference.

  Attributes:
    config: the run's.
    params: the tokenizer's arrays, nested dictionaries.
    codebooks: codebooks that are not parameters ('ema') and usage statistics.
    step: training step.
    teacher_id: hash of the teacher it was distilled from, '' without one.
  """

  config: ExperimentConfig
  params: dict[str, Any]
  codebooks: dict[str, Any]
  step: int
  teacher_id: str

  @property
  def tokenizer(self) -> SpeechTokenizer:
    """The module, with the restored arrays in it."""
    return merge_tokenizer(self.config.model, self.params, self.codebooks)


@dataclass(frozen=True)
class SavedRun:
  """The newest checkpoint of a run.

  Attributes:
    step: training step.
    config: the run's.
    teacher_id: hash of the teacher, '' without one.
    shapes: of the state's arrays by path, as Orbax describes them.
  """

  folder: Path
  step: int
  config: ExperimentConfig
  teacher_id: str
  shapes: dict[str, tuple[int, ...] | None]

  def restore(self, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Some parts of the state, on the shardings of `abstract_state`; the others stay on disk. Raises LmsptError."""
    _check_shapes(self.folder, abstract_state, self.shapes)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, _reading(self.folder):
      return ocp.load_checkpointables(self.folder, {'state': abstract_state})['state']


def saved_run(workdir: str | Path) -> SavedRun:
  """Finds a run's newest checkpoint.

  Raises:
    LmsptError: `workdir` is no run's folder, or has no checkpoint yet.
  """
  workdir = Path(workdir)
  if not (workdir / FOLDER).is_dir():
    raise LmsptError(f'{workdir}: not a run (no {FOLDER}/ in it); give the --workdir of `lmspt train`')
  store = CheckpointStore(workdir)
  try:
    step = store.latest_step
    if step is None:
      raise LmsptError(f'{workdir}: no checkpoint yet; train longer, or lower train.checkpoint_every')
    record = store.record(step)
    for name, kind in (('config', dict), ('teacher_id', str)):
      if not isinstance(record.get(name), kind):
        raise LmsptError(f'{workdir / FOLDER / str(step)}: its record has {name} = {shown(record.get(name))}, so it is '
                         'damaged; delete it to go back to the checkpoint before it')
    config = from_dict(ExperimentConfig, record['config']).check()
    folder = workdir.absolute() / FOLDER / str(step)
    shapes = _stored_shapes(folder)
    if config.model.num_residual_units * 8 > len(shapes):  # or building the model could take hours
      raise LmsptError(f'{folder}: {len(shapes)} arrays, too few for {config.model.num_residual_units} residual units '
                       'of its config, so it is damaged; delete it to go back to the checkpoint before it')
    return SavedRun(folder, step, config, record['teacher_id'], shapes)
  finally:
    store.close()


def restore_for_inference(workdir: str | Path, average: bool = True) -> RestoredModel:
  """The newest checkpoint's tokenizer, without discriminators and optimizer states.

  Args:
    workdir: the run's folder.
    average: the moving average over steps, where the run keeps one; else the parameters of the last step.

  Raises:
    LmsptError: `workdir` is no run's folder, or has no checkpoint yet.
  """
  run = saved_run(workdir)
  _, params, codebooks = abstract_tokenizer(run.config.model)
  average = average and bool(run.config.train.ema_decay)
  last = {'generator': {'tokenizer': params}, 'codebooks': codebooks}
  wanted = {'average': {'params': params, 'codebooks': codebooks}} if average else last
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
  state = run.restore(wanted)
  if average:
    found = state['average']['params'], state['average']['codebooks']
  else:
    found = state['generator']['tokenizer'], state['codebooks']
  return RestoredModel(run.config, *found, run.step, run.teacher_id)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...] | None]:
  """'average/params/...' -> shape of every array of a checkpoint's state; no array is read."""
  with _context(), _reading(folder):
    found = ocp.checkpointables_metadata(folder).metadata.get('state')
  return {_name(path): getattr(leaf, 'shape', None) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def _check_shapes(folder: Path, wanted: Any, stored: dict[str, tuple[int, ...] | None]) -> None:
  """Before anything is allocated: the arrays are there and of these shapes, and the files could hold them."""
  size = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    if stored.get(_name(path)) != leaf.shape:
      raise LmsptError(f'{folder}: its array {_name(path)} has shape {shown(stored.get(_name(path)))}, by its config '
                       f'{leaf.shape}, so it is damaged; delete it to go back to the checkpoint before it')
    size += math.prod(leaf.shape) * leaf.dtype.itemsize
  files = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
  if size > _MAX_RATIO * files:
    raise LmsptError(f'{folder}: arrays of {size} bytes in files of {files}, which no training writes; get it again')


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
