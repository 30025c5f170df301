"""What stands before the first step: teacher, held-out utterances, batches, and the state, fresh or restored."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmspt_jax import hosts, rng
from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import Batches, held_out_utterances, training_batches
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.teachers import TeacherDims
from lmspt_jax.sharding import Placement, local_rows, shard_batch
from lmspt_jax.training import codebooks as codebook_rules
from lmspt_jax.training.compiled import placed
from lmspt_jax.training.fine_tuning import started_from
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.teacher import WINDOW_SECONDS, stored_params

MODEL_INPUTS = ('audio', 'num_samples')


@dataclass(frozen=True)
class Teacher:
  """The frozen encoder: its sizes (None without a teacher), its arrays on the devices, its checkpoint's hash."""

  dims: TeacherDims | None
  params: Any
  sha256: str


def load_teacher(config: ExperimentConfig, placement: Placement) -> Teacher:
  """The configured teacher on its devices. Raises LmsptError for crops that it can't hear whole."""
  if config.teacher.strategy == 'none':
    return Teacher(None, {}, '')
  longest = [('data.crop_seconds', config.data.crop_seconds, config.crop_samples)]
  if config.data.held_out:
    longest.append(('train.eval_seconds', config.train.eval_seconds, _held_out_samples(config)))
  for name, value, samples in longest:
    if samples > WINDOW_SECONDS * config.model.sample_rate:
      raise LmsptError(f'config field {name} = {value}: the teacher hears at most {WINDOW_SECONDS} s (whole frames '
                       'are counted); use less')
  checkpoint = load_whisper(config.teacher.checkpoint, parts=('encoder',))
  params = stored_params(checkpoint.params['encoder'], config.compute)
  # Each host takes its devices' part of what all have read: device_put would send it around to compare.
  place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))
  return Teacher(checkpoint.dims, jax.tree.map(place, params, placement.teacher(params)), checkpoint.sha256)


def load_held_out(config: ExperimentConfig) -> dict[str, Any] | None:
  """`held_out_utterances` of the config, all of them on every host; None where it has none."""
  if not config.data.held_out:
    return None
  return held_out_utterances(config.data, config.model.sample_rate, _held_out_samples(config),
                             config.train.eval_utterances)


def _held_out_samples(config: ExperimentConfig) -> int:
  model = config.model
  return model.num_frames(round(config.train.eval_seconds * model.sample_rate)) * model.hop


def check_hosts_agree(teacher: Teacher, mixture: Mixture, held_out: dict[str, Any] | None) -> None:
  """Raises LmsptError on every host if one has read something else than the others."""
  way_out = 'give all hosts the same files'
  hosts.check_same('teacher.checkpoint', teacher.sha256, way_out)
  hosts.check_same('data.train', mixture.fingerprint, way_out)
  hosts.check_same('data.held_out', '\n'.join(held_out['ids']) if held_out else '', way_out)


def open_batches(config: ExperimentConfig, mixture: Mixture, mesh: Mesh, start_batch: int) -> Batches:
  """This host's rows of every batch from `start_batch` on."""
  return training_batches(
      config.data, mixture=mixture, sample_rate=config.model.sample_rate, crop_samples=config.crop_samples,
      seed=config.train.seed, start_batch=start_batch, rows=local_rows(mesh, config.data.batch_size))


def fresh_state(experiment: Experiment, shardings: TrainState, mesh: Mesh, mixture: Mixture) -> TrainState:
  """Initialises on the devices, then moves the codebooks to where the first batches' latents are; or starts from
  another model (config section `init`)."""
  config = experiment.config
  state = jax.jit(experiment.init, out_shardings=shardings)()
  if config.init.model:
    return started_from(config, experiment, state, shardings)
  quantizers = (config.model.semantic, config.model.acoustic)
  if config.quirks.dead_codes or not any(q.data_init for q in quantizers):
    return state
  frames = config.data.batch_size * (config.crop_samples // config.model.hop)
  needed = min(8, math.ceil(4 * max(q.size for q in quantizers) / frames))
  here = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))  # too few to start workers
  with open_batches(here, mixture, mesh, start_batch=0) as batches:
    audio = [shard_batch({k: b[k] for k in MODEL_INPUTS}, mesh, config.data.batch_size)
             for b in itertools.islice(batches, needed)]

  @jax.jit
  def latents_of(params, codebooks, batch):
    tokenizer = experiment.tokenizer(params, codebooks)
    out = tokenizer(batch['audio'])
    length = out.semantic.codes.shape[1]
    # Padding is no place for a code: frames past an item's end are its real frames again.
    real_B = jnp.maximum(-(-batch['num_samples'] // config.model.hop), 1)
    wrapped_BT = jnp.arange(length) % real_B[:, None]
    pick = lambda x: jax.vmap(lambda row, t: row[t])(x, wrapped_BT).reshape(-1, *x.shape[2:])
    encoded = {name: pick(getattr(tokenizer, name)(batch['audio'])) for name in ('semantic_encoder', 'acoustic_encoder')
               if name in params}
    return {'semantic': pick(out.semantic.latents), 'acoustic': pick(out.acoustic.latents), **encoded}

  def latents(params, codebooks):
    parts = [latents_of(params, codebooks, batch) for batch in audio]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  tokenizer, codebooks = codebook_rules.initialise(
      rng.stream(config.train.seed, 'kmeans'), config.model, state.generator['tokenizer'], state.codebooks, latents)
  state = state.replace(generator={**state.generator, 'tokenizer': tokenizer}, codebooks=codebooks,
                        average=experiment.first_average(tokenizer, codebooks))
  return jax.device_put(state, shardings)


def restored_state(store: CheckpointStore, step: int, abstract: TrainState, shardings: TrainState,
                   teacher_id: str, mixture: Mixture) -> TrainState:
  """The state saved at `step`. Raises LmsptError where teacher or data are no longer those it was trained with."""
  arrays, record = store.restore(step, placed(vars(abstract), vars(shardings)))
  if record['teacher_id'] != teacher_id:
    raise LmsptError(f'teacher.checkpoint: its hash is {teacher_id[:16]}, the run was trained with '
                     f'{record["teacher_id"][:16]}; give that one, or use another --workdir')
  if record['data']['fingerprint'] != mixture.fingerprint:
    raise LmsptError(f'data.train: holds other utterances ({len(mixture)} now) than when step {step} was saved, so the '
                     'order of training would change; put back what was there, or use another --workdir')
  return TrainState(**arrays)
