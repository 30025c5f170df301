"""A run's checkpoints as they are read by others: what was saved, and its model for inference."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lmspt_jax.checkpoint.best import Best
from lmspt_jax.checkpoint.orbax_io import context, reading
from lmspt_jax.checkpoint.store import FOLDER, CheckpointStore
from lmspt_jax.config import ExperimentConfig, from_dict
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.models.tokenizer import SpeechTokenizer, abstract_tokenizer, merge_tokenizer

BEST = 'best'
_STEP = re.compile('[0-9]{1,15}')
_MAX_RATIO = 100  # of arrays to their compressed files; parameters hardly shrink


@dataclass(frozen=True)
class RestoredModel:
  """A run's model, ready for inference.

  Attributes:
    config: the run's.
    params: the tokenizer's arrays, nested dictionaries.
    codebooks: codebooks that are not parameters ('ema') and usage statistics.
    step: training step.
    teacher_id: hash of the teacher it was distilled from, '' without one.
    best: the run's best step up to this one; None where it has none.
  """

  config: ExperimentConfig
  params: dict[str, Any]
  codebooks: dict[str, Any]
  step: int
  teacher_id: str
  best: Best | None

  @property
  def tokenizer(self) -> SpeechTokenizer:
    """The module, with the restored arrays in it."""
    return merge_tokenizer(self.config.model, self.params, self.codebooks)


@dataclass(frozen=True)
class SavedRun:
  """A checkpoint of a run.

  Attributes:
    best: the run's best step up to this one; None where it has none.
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
  best: Best | None

  def restore(self, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Some parts of the state, on the shardings of `abstract_state`; the others stay on disk. Raises LmsptError."""
    _check_shapes(self.folder, abstract_state, self.shapes)
    partly = ocp.Context()
    partly.pytree.loading.partial_load = True
    with partly, reading(self.folder):
      return ocp.load_checkpointables(self.folder, {'state': abstract_state})['state']


def run_and_which(run: str | Path) -> tuple[Path, str]:
  """DIR, DIR@best or DIR@STEP -> (DIR, '', 'best' or the step). What exists by the whole name is a folder's name."""
  folder, at, which = str(run).rpartition('@')
  if at and (which == BEST or _STEP.fullmatch(which)) and not Path(run).exists():
    return Path(folder), which
  return Path(run), ''


def saved_run(run: str | Path) -> SavedRun:
  """Finds a checkpoint of a run.

  Args:
    run: DIR, its workdir, for the newest; DIR@best; DIR@STEP.

  Raises:
    LmsptError: DIR is no run's folder, or has no (such) checkpoint.
  """
  workdir, which = run_and_which(run)
  if not (workdir / FOLDER).is_dir():
    raise LmsptError(f'{workdir}: not a run (no {FOLDER}/ in it); give the --workdir of `lmspt train`')
  store = CheckpointStore(workdir)
  try:
    step = _step(store, workdir, which)
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
    return SavedRun(folder, step, config, record['teacher_id'], shapes, Best.of(record))
  finally:
    store.close()


def _step(store: CheckpointStore, workdir: Path, which: str) -> int:
  newest = store.latest_step
  if newest is None:
    raise LmsptError(f'{workdir}: no checkpoint yet; train longer, or lower train.checkpoint_every')
  if not which:
    return newest
  best = Best.of(store.record(newest)) if which == BEST else None
  if which == BEST and best is None:
    raise LmsptError(f'{workdir}@{BEST}: the run has none: it was trained without train.best_metric, or not evaluated '
                     f'yet; give {workdir} for the newest checkpoint')
  step = best.step if best else int(which)
  if step not in store.steps:
    raise LmsptError(f'{workdir}@{which}: no checkpoint of step {step}; there are {", ".join(map(str, store.steps))}')
  return step


def restore_for_inference(run: str | Path, average: bool = True) -> RestoredModel:
  """A checkpoint's tokenizer, without discriminators and optimizer states.

  Args:
    run: as `saved_run` takes it.
    average: the moving average over steps, where the run keeps one; else the parameters of the last step.

  Raises:
    LmsptError: as `saved_run` does.
  """
  found = saved_run(run)
  _, params, codebooks = abstract_tokenizer(found.config.model)
  average = average and bool(found.config.train.ema_decay)
  last = {'generator': {'tokenizer': params}, 'codebooks': codebooks}
  wanted = {'average': {'params': params, 'codebooks': codebooks}} if average else last
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
  state = found.restore(wanted)
  if average:
    arrays = state['average']['params'], state['average']['codebooks']
  else:
    arrays = state['generator']['tokenizer'], state['codebooks']
  return RestoredModel(found.config, *arrays, found.step, found.teacher_id, found.best)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...] | None]:
  """'average/params/...' -> shape of every array of a checkpoint's state; no array is read."""
  with context(), reading(folder):
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
