"""The training loop, in sections; no maths in it.

The order inside is fixed: evaluate, save (state i, data position i), next batch, step. A batch is a pure function of
(seed, global index), so the step number is the whole data position.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from lmspt_jax import metrics as metrics_lib
from lmspt_jax import rng
from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.config import ExperimentConfig, to_dict
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.data.fault_log import FaultLog
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import held_out_utterances, training_batches
from lmspt_jax.errors import LmsptError
from lmspt_jax.sharding import make_mesh, parameter_table, shard_batch, state_shardings
from lmspt_jax.training import codebooks as codebook_rules
from lmspt_jax.training.held_out import evaluate, make_eval_step
from lmspt_jax.training.meter import Meter
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import WINDOW_SECONDS
from lmspt_jax.training.workdir import open_workdir

_log = logging.getLogger(__name__)
_MODEL_INPUTS = ('audio', 'num_samples')


class Interrupted(Exception):
  """Training was asked to stop (SIGTERM) and has saved; running the same command again goes on."""


def train(config: ExperimentConfig, workdir: str | Path) -> None:
  """Trains to `train.num_steps`, or on from the newest checkpoint in `workdir`.

  Raises:
    LmsptError: anything a user can mend.
    Interrupted: SIGTERM came; the state is saved.
  """
  workdir = Path(workdir)
  open_workdir(config, workdir)
  with ExitStack() as cleanup:
    stop = cleanup.enter_context(_StopSignal())

    # ---------------------------------------------------------------- mesh, teacher, data
    mesh = make_mesh(config.mesh, config.data.batch_size)
    cleanup.enter_context(jax.set_mesh(mesh))
    dims, teacher_params, teacher_id = _load_teacher(config, mesh)
    mixture = Mixture(config.data)
    faults = FaultLog(config.data.max_fault_rate, mixture, workdir)
    cleanup.callback(faults.save)
    held_out = _load_held_out(config)

    # ---------------------------------------------------------------- state: fresh or restored
    experiment = Experiment(config, dims)
    abstract = experiment.abstract_state()
    shardings = state_shardings(abstract, mesh)
    (workdir / 'parameters.txt').write_text(parameter_table(abstract, mesh))
    store = CheckpointStore(workdir, keep=config.train.keep_checkpoints)
    cleanup.callback(store.close)
    start = store.latest_step
    if start is None:
      state = _fresh_state(experiment, shardings, mesh, mixture)
      start = 0
    else:
      state = _restored_state(store, start, abstract, shardings, teacher_id, mixture)
      print(f'resuming at step {start}', flush=True)
    record = {'config': to_dict(config), 'teacher_id': teacher_id}

    # ---------------------------------------------------------------- the loop
    train_step = jax.jit(make_train_step(experiment), donate_argnums=0, out_shardings=(shardings, None))
    eval_step = jax.jit(make_eval_step(experiment))
    batches = cleanup.enter_context(_batches(config, mixture, start_batch=start))
    writer = metrics_lib.MetricWriter(workdir, start)
    cleanup.callback(writer.close)
    last = config.train.num_steps
    bar = cleanup.enter_context(tqdm(total=last, initial=start, unit='step', dynamic_ncols=True))
    meter = Meter(config, writer, bar)

    for step in range(start, last + 1):
      resumed_here = step == start and start > 0
      if held_out is not None and not resumed_here and (step % config.train.eval_every == 0 or step == last):
        meter.flush()
        folder = workdir / 'held_out' / f'step_{step:08d}'
        figures = evaluate(experiment, eval_step, state, teacher_params, held_out, mesh, folder)
        writer.write(step, {f'held_out/{k}': v for k, v in figures.items()})
        bar.write(f'step {step} held-out: ' + ', '.join(f'{k} {v:.4g}' for k, v in figures.items()))
        meter.restart_clock()
      save = step > 0 and (step % config.train.checkpoint_every == 0 or step == last or stop.requested)
      if save and not resumed_here:
        meter.flush()
        faults.save()
        position = {'seed': config.train.seed, 'next_batch': step, 'fingerprint': mixture.fingerprint}
        _save(store, step, state, {**record, 'data': position}, wait=stop.requested or step == last)
      if stop.requested and step < last:
        saved = f'saved in {workdir}' if step else 'before there was anything to save'
        raise Interrupted(f'stopped at step {step}, {saved}; run the same command again to go on')
      if step == last:
        break
      batch = next(batches)
      faults.update(batch)
      inputs = shard_batch({k: batch[k] for k in _MODEL_INPUTS}, mesh)
      state, found = train_step(state, teacher_params, inputs)
      meter.add(step + 1, found)


# -------------------------------------------------------------------- parts


def _load_teacher(config: ExperimentConfig, mesh: Mesh):
  if config.teacher.strategy == 'none':
    return None, {}, ''
  longest = [('data.crop_seconds', config.data.crop_seconds, config.crop_samples)]
  if config.data.held_out:
    longest.append(('train.eval_seconds', config.train.eval_seconds, _held_out_samples(config)))
  for name, value, samples in longest:
    if samples > WINDOW_SECONDS * config.model.sample_rate:
      raise LmsptError(f'config field {name} = {value}: the teacher hears at most {WINDOW_SECONDS} s (whole frames '
                       'are counted); use less')
  checkpoint = load_whisper(config.teacher.checkpoint, parts=('encoder',))
  params = checkpoint.params['encoder']
  return checkpoint.dims, jax.device_put(params, state_shardings(params, mesh)), checkpoint.sha256


def _load_held_out(config: ExperimentConfig) -> dict[str, Any] | None:
  if not config.data.held_out:
    return None
  return held_out_utterances(config.data, config.model.sample_rate, _held_out_samples(config),
                             config.train.eval_utterances)


def _held_out_samples(config: ExperimentConfig) -> int:
  model = config.model
  return model.num_frames(round(config.train.eval_seconds * model.sample_rate)) * model.hop


def _batches(config: ExperimentConfig, mixture: Mixture, start_batch: int):
  return training_batches(
      config.data, mixture=mixture, sample_rate=config.model.sample_rate, crop_samples=config.crop_samples,
      seed=config.train.seed, start_batch=start_batch, process_index=jax.process_index(),
      process_count=jax.process_count())


def _fresh_state(experiment: Experiment, shardings: TrainState, mesh: Mesh, mixture: Mixture) -> TrainState:
  """Initialises on the devices, then moves the codebooks to where the first batches' latents are."""
  config = experiment.config
  state = jax.jit(experiment.init, out_shardings=shardings)()
  quantizers = (config.model.semantic, config.model.acoustic)
  if config.quirks.dead_codes or not any(q.data_init for q in quantizers):
    return state
  frames = config.data.batch_size * (config.crop_samples // config.model.hop)
  needed = min(8, math.ceil(4 * max(q.size for q in quantizers) / frames))
  here = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))  # too few to start workers
  with _batches(here, mixture, start_batch=0) as batches:
    audio = [shard_batch({k: b[k] for k in _MODEL_INPUTS}, mesh) for b in itertools.islice(batches, needed)]

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
  state = state.replace(generator={**state.generator, 'tokenizer': tokenizer}, codebooks=codebooks)
  return jax.device_put(state, shardings)


def _restored_state(store: CheckpointStore, step: int, abstract: TrainState, shardings: TrainState,
                    teacher_id: str, mixture: Mixture) -> TrainState:
  wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), vars(abstract),
                        vars(shardings))
  arrays, record = store.restore(step, wanted)
  if record['teacher_id'] != teacher_id:
    raise LmsptError(f'teacher.checkpoint: its hash is {teacher_id[:16]}, the run was trained with '
                     f'{record["teacher_id"][:16]}; give that one, or use another --workdir')
  if record['data']['fingerprint'] != mixture.fingerprint:
    raise LmsptError(f'data.train: holds other utterances ({len(mixture)} now) than when step {step} was saved, so the '
                     'order of training would change; put back what was there, or use another --workdir')
  return TrainState(**arrays)


def _save(store: CheckpointStore, step: int, state: TrainState, record: dict[str, Any], wait: bool) -> None:
  try:
    store.save(step, vars(state), record)
    if wait:
      store.wait()
  except OSError as error:
    raise LmsptError(f'checkpoint of step {step} could not be written ({error}); earlier ones are whole, free space '
                     'and run the same command again') from error


class _StopSignal:
  """Notes SIGTERM, so that the loop can stop between two steps."""

  def __init__(self):
    self.requested = False

  def __enter__(self) -> _StopSignal:
    self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    signal.signal(signal.SIGTERM, self._previous)

  def _note(self, *_: object) -> None:
    self.requested = True
