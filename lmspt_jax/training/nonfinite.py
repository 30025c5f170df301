"""Steps that were skipped because a loss or a gradient was not finite: listed, counted, and shown again one by one.

The train step itself leaves the state as it was (training/step.py) and says so in its metrics, which every host holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lmspt_jax import checkpoint
from lmspt_jax.config import ExperimentConfig, changed_fields, to_dict
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import example_records, training_batches
from lmspt_jax.errors import LmsptError
from lmspt_jax.hosts import is_writer
from lmspt_jax.metrics import drop_rows_after
from lmspt_jax.sharding import Placement, local_rows, make_mesh, shard_batch
from lmspt_jax.training.compiled import placed
from lmspt_jax.training.setup import MODEL_INPUTS, load_teacher
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step

FILE_NAME = 'skipped.jsonl'
FOLDER = 'nonfinite'
_FLAG = 'nonfinite/'  # what the metrics' names begin with
_SHOWN = 20  # paths and examples of a kind in a report
_log = logging.getLogger(__name__)


class SkippedSteps:
  """Takes the metrics of every step; host 0 lists the skipped ones in `skipped.jsonl`.

  A run that resumes drops the rows past its step there, as it does in `metrics.jsonl`: they come again.

  Args:
    config: the run's.
    mixture: that of its data.
    workdir: the run's folder.
    start: the step that training goes on from.
    in_a_row: steps before it, up to it, that were skipped (`TrainState.skipped_in_row`).
  """

  def __init__(self, config: ExperimentConfig, mixture: Mixture, workdir: Path, start: int, in_a_row: int):
    self._config, self._mixture, self._workdir, self._limit = config, mixture, workdir, config.train.max_skipped_steps
    self._path = workdir / FILE_NAME
    self._in_a_row, self._what = in_a_row, []
    self.total = drop_rows_after(self._path, start) if is_writer() and self._path.exists() else 0

  @property
  def urgent(self) -> bool:
    """Whether metrics may not come a step late: what was there before the last skipped step must not be lost."""
    return self._in_a_row > 0 or self._limit == 1

  def update(self, step: int, found: Mapping[str, tuple]) -> dict[str, tuple]:
    """Takes the metrics of a step; returns those that are to be logged."""
    if float(found['skipped'][0]):
      self._in_a_row += 1
      self.total += 1
      self._what = sorted(name.removeprefix(_FLAG) for name, (flag, _) in found.items()
                          if name.startswith(_FLAG) and float(flag))
      if is_writer():
        self._list(step)
    else:
      self._in_a_row = 0
    return {name: pair for name, pair in found.items() if name != 'skipped' and not name.startswith(_FLAG)}

  def check(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Stops the run past `train.max_skipped_steps` in a row, with a dump of the last one that `replay` can run again.

    All hosts call it alike, with the state after `step` steps, once `update` has had the metrics of all of them.

    Raises:
      LmsptError: that many steps were skipped; or the dump can't be written.
    """
    if self._in_a_row < self._limit:
      return
    folder = _folder(self._workdir, step)
    # Since the first of them nothing in the state has changed but its counts.
    before = state.replace(step=state.step - 1, skipped_in_row=state.skipped_in_row - 1)
    if is_writer():
      self._write_batch(folder, step, record)
    checkpoint.write(folder / 'state', vars(before), record)
    raise LmsptError(
        f'{self._in_a_row} steps in a row, the last one step {step}, had losses or gradients that are not finite '
        f'({_some(self._what, 4)}); its state and batch are in {folder}: run the same command with --replay={step} to '
        'see where it begins, then lower generator_optimizer.learning_rate or mend the data')

  def _list(self, step: int) -> None:
    size = self._config.data.batch_size
    examples = range((step - 1) * size, step * size)
    records = example_records(self._mixture, self._config.train.seed, examples)
    row = {'step': step, 'examples': list(examples), 'records': [_name(self._mixture, r) for r in records],
           'what': self._what}
    with self._path.open('a') as file:
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
    _log.warning('step %d skipped, not finite: %s; examples in %s', step, _some(self._what, 4), self._path)

  def _write_batch(self, folder: Path, step: int, record: dict[str, Any]) -> None:
    """The whole batch, which no host holds, is read again: it is a pure function of the step."""
    config = self._config
    here = dataclasses.replace(config.data, num_workers=0)  # one batch is too few to start workers
    with training_batches(here, sample_rate=config.model.sample_rate, crop_samples=config.crop_samples,
                          seed=config.train.seed, start_batch=step - 1, mixture=self._mixture) as batches:
      batch = next(batches)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / 'batch.npz', **batch)
    (folder / 'record.json').write_text(json.dumps({
        'step': step, 'examples': batch['index'].tolist(),
        'records': [_name(self._mixture, int(r)) for r in batch['record']], 'what': self._what, **record}, indent=1))


# -------------------------------------------------------------------- again


def replay(config: ExperimentConfig, workdir: Path, step: int) -> str:
  """Runs a dumped step once more, on the mesh and with the fields of `config`; writes nothing.

  Returns:
    What is not finite of its inputs, the state before it, losses and gradients, by path.

  Raises:
    LmsptError: there is no such dump, or it does not fit the config.
  """
  folder = _folder(workdir, step)
  if not (folder / 'record.json').exists():
    dumped = sorted(path.name for path in folder.parent.glob('step_*'))
    raise LmsptError(f'--replay={step}: no {folder}; there are {", ".join(dumped) or "none at all"}')
  dump = json.loads((folder / 'record.json').read_text())
  mesh = make_mesh(config)
  with jax.set_mesh(mesh):
    placement = Placement(config, mesh)
    teacher = load_teacher(config, placement)
    experiment = Experiment(config, teacher.dims)
    abstract = experiment.abstract_state()
    shardings = placement.shardings(abstract)
    arrays, _ = checkpoint.read(folder / 'state', placed(vars(abstract), vars(shardings)))
    with np.load(folder / 'batch.npz') as file:
      batch = {key: file[key] for key in MODEL_INPUTS}
    rows = local_rows(mesh, len(batch['audio']))
    inputs = shard_batch({key: value[rows] for key, value in batch.items()}, mesh, len(batch['audio']))
    run = jax.jit(_looked_into(experiment, shardings), out_shardings=NamedSharding(mesh, PartitionSpec()))
    state, metrics, gradients = jax.device_get(run(TrainState(**arrays), teacher.params, inputs))
  lines = [f'step {step} of {workdir}, examples {dump["examples"][0]} to {dump["examples"][-1]}']
  changed = changed_fields(dump['config'], to_dict(config))
  if changed:
    lines.append(f'another config: {", ".join(changed.values())}')
  losses = sorted(name.removeprefix(_FLAG) for name, (flag, _) in metrics.items()
                  if name.startswith(_FLAG) and flag)
  bad = [f'{example} ({record})' for example, record, audio in
         zip(dump['examples'], dump['records'], batch['audio'], strict=True) if not np.isfinite(audio).all()]
  lines.append('not finite')
  for title, names in (('inputs, examples', bad), ('state before it', _true(state)), ('losses', losses),
                       ('gradients', _true(gradients))):
    lines.append(f'  {title}: {_some(names, _SHOWN) or "none"}')
  return '\n'.join(lines)


def _looked_into(experiment: Experiment, shardings: TrainState):
  """The train step, returning (what of the state it began with is not finite, metrics, what of the gradients isn't)."""
  gradients = {}

  def keeping(name: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(found, state, params):
      gradients[name] = found
      return inner.update(found, state, params)
    return optax.GradientTransformation(inner.init, update)

  experiment.generator_tx = keeping('generator', experiment.generator_tx)
  experiment.discriminator_tx = keeping('discriminator', experiment.discriminator_tx)
  train_step = make_train_step(experiment, shardings)
  broken = lambda tree: jax.tree.map(lambda x: ~jnp.all(jnp.isfinite(x)), tree)

  def step(state: TrainState, teacher_params: Any, batch: dict[str, jax.Array]):
    _, metrics = train_step(state, teacher_params, batch)
    return broken(vars(state)), metrics, broken(gradients)

  return step


# -------------------------------------------------------------------- names


def _folder(workdir: Path, step: int) -> Path:
  return workdir.absolute() / FOLDER / f'step_{step:08d}'


def _name(mixture: Mixture, record: int) -> str:
  source, position = mixture.locate(record)
  return source.name(position)


def _some(names: list[str], most: int) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _true(flags: Any) -> list[str]:
  return [jax.tree_util.keystr(path, simple=True, separator='/')
          for path, flag in jax.tree_util.tree_leaves_with_path(flags) if flag]
