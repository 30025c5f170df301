"""Checkpoints of a run: one named composite per step, written in the background. The only importer of Orbax.

A checkpoint holds `state` (the train state's arrays), and `record`, JSON: data position, config, teacher id,
versions. Orbax writes to a temporary folder and renames it, so what can be listed is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lmspt_jax.config import ExperimentConfig, from_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.tokenizer import SpeechTokenizer, abstract_tokenizer, merge_tokenizer

FOLDER = 'checkpoints'
FORMAT = 1  # raised when the state's layout changes


def has_checkpoint(workdir: str | Path) -> bool:
  """Whether a run's folder holds a whole checkpoint; a half-written one has another name than its step's."""
  return any(path.name.isdigit() for path in (Path(workdir) / FOLDER).glob('*'))


class CheckpointStore:
  """A run's checkpoints.

  Args:
    workdir: the run's folder; checkpoints lie in `checkpoints/STEP`.
    keep: how many of the newest stay.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None):
    training = ocp.training
    policy = training.preservation_policies.LatestN(keep) if keep else training.preservation_policies.PreserveAll()
    # By itself Orbax would save the record's text among arrays, find none there and warn with every checkpoint.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name='record')
    context = ocp.Context()
    context.checkpointables.registry = registry
    # The caller decides when to save: every call is meant, so the interval is one step.
    self._checkpointer = training.Checkpointer(
        Path(workdir).absolute() / FOLDER, preservation_policy=policy, cleanup_tmp_directories=keep is not None,
        save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1), context=context)

  @property
  def latest_step(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing; the arrays are copied before it returns, so the caller may donate them."""
    if step != self.latest_step:
      self._checkpointer.save_checkpointables_async(
          step, {'state': state, 'record': {'format': FORMAT, **record}}, force=True)

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
    if record.get('format') != FORMAT:
      raise LmsptError(f'{self._folder(step)}: checkpoint format {record.get("format")!r}, this '
                       f'version reads {FORMAT}; use the lmspt_jax that wrote it')
    return record

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()

  def _folder(self, step: int) -> Path:
    return Path(self._checkpointer.directory) / str(step)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
  """What Orbax raises for files that are missing, cut short or of other arrays, as one line."""
  try:
    yield
  except (KeyError, ValueError, OSError) as error:
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


def restore_for_inference(workdir: str | Path) -> RestoredModel:
  """The newest checkpoint's tokenizer, without discriminators and optimizer states.

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
    config = from_dict(ExperimentConfig, record['config']).check()
    _, params, codebooks = abstract_tokenizer(config.model)
    wanted = {'generator': {'tokenizer': params}, 'codebooks': codebooks}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # discriminators and optimizer states stay on disk
    with context, _reading(workdir.absolute() / FOLDER / str(step)):
      state = ocp.load_checkpointables(workdir.absolute() / FOLDER / str(step), {'state': wanted})['state']
    return RestoredModel(config, state['generator']['tokenizer'], state['codebooks'], step, record['teacher_id'])
  finally:
    store.close()
