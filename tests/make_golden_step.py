"""The tiny experiment that the tests of training share, and the script that pins its golden step.

    JAX_PLATFORMS=cpu python tests/make_golden_step.py        # writes tests/fixtures/golden_step.json

16 kHz, 50 frames a second, real bundled speech, a Whisper encoder of one layer with random weights as teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from _whisper_arrays import named_arrays
from flax import nnx

from lmspt_jax.config import (
  DataConfig,
  DiscriminatorConfig,
  ExperimentConfig,
  LossConfig,
  ModelConfig,
  OptimizerConfig,
  QuantizerConfig,
  TeacherConfig,
  TrainConfig,
)
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, foreign_layout, foreign_name
from lmspt_jax.data.pipeline import training_batches
from lmspt_jax.models import whisper
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step

FIXTURE = Path(__file__).resolve().parent / 'fixtures' / 'golden_step.json'
DIMS = whisper.WhisperDims(n_mels=80, width=32, heads=2, audio_layers=1, text_layers=1, vocab_size=64)

TINY = ExperimentConfig(
    name='tiny',
    model=ModelConfig(
        sample_rate=16_000, encoder_channels=4, encoder_strides=(16, 20), latent_dim=16, decoder_channels=16,
        decoder_rates=(20, 16), resynthesis_channels=8, resynthesis_rates=(20, 16), dilations=(1,),
        semantic=QuantizerConfig(codebook_size=32, code_dim=4),
        acoustic=QuantizerConfig(num_codebooks=2, codebook_size=16, code_dim=4, dropout=0.5)),
    discriminator=DiscriminatorConfig(
        periods=(3,), period_channels=(4, 4, 4, 4, 4), fft_sizes=(128,), band_edges=(0.0, 1.0), stft_channels=4),
    teacher=TeacherConfig(checkpoint='hf:absent'),
    loss=LossConfig(mel_bins=(20, 40), mel_windows=(256, 512)),
    generator_optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0),
    discriminator_optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0),
    data=DataConfig(train='package:speech_sample', crop_seconds=0.4, batch_size=4, num_workers=0),
    train=TrainConfig(num_steps=20, log_every=1)).check()


def replaced(config: Any, **changes: Any) -> Any:
  """`dataclasses.replace` that takes dotted names with __ for the dot: replaced(TINY, data__batch_size=2)."""
  for name, value in changes.items():
    head, _, rest = name.partition('__')
    config = dataclasses.replace(config, **{head: replaced(getattr(config, head), **{rest: value}) if rest else value})
  return config


@functools.cache
def tiny_teacher() -> dict[str, Any]:
  """Parameters of an untrained Whisper encoder with DIMS."""
  return nnx.to_pure_dict(nnx.state(whisper.WhisperEncoder(DIMS, rngs=nnx.Rngs(7))))


def write_teacher(folder: Path) -> str:
  """Writes `tiny_teacher` as a Hugging Face folder; returns its URI."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps({
      'model_type': 'whisper', 'num_mel_bins': DIMS.n_mels, 'd_model': DIMS.width, 'vocab_size': DIMS.vocab_size,
      'encoder_layers': DIMS.audio_layers, 'decoder_layers': DIMS.text_layers,
      'max_source_positions': DIMS.audio_context, 'max_target_positions': DIMS.text_context,
      'encoder_attention_heads': DIMS.heads, 'decoder_attention_heads': DIMS.heads}))
  tensors = {'encoder/positions': whisper.sinusoids(DIMS.audio_context, DIMS.width)}
  for name, value in named_arrays({'encoder': tiny_teacher()}):
    tensors[name] = np.ascontiguousarray(foreign_layout(name, value))
  named = {foreign_name(name, HUGGING_FACE_NAMES): np.array(value) for name, value in tensors.items()}
  safetensors.numpy.save_file(named, folder / 'model.safetensors')
  return f'hf:{folder}'


def speech_batches(config: ExperimentConfig, count: int, start: int = 0) -> list[dict[str, np.ndarray]]:
  """The run's own batches of bundled speech."""
  with training_batches(config.data, sample_rate=config.model.sample_rate, crop_samples=config.crop_samples,
                        seed=config.train.seed, start_batch=start) as batches:
    return [{k: v for k, v in next(batches).items() if k in ('audio', 'num_samples')} for _ in range(count)]


def fast(function: Callable, **options: Any) -> Any:
  """`jax.jit` without LLVM's optimisations: what is run a few times at this size is mostly compiled."""
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0}, **options)


@functools.cache
def recording_step(config: ExperimentConfig) -> tuple[Experiment, TrainState, Callable]:
  """(experiment, state 0, jitted (state, batch, weights=None) -> (state, metrics, gradients)) with DIMS' teacher.

  `weights` are a LossConfig's by name, 0 where one is missing, and an argument of the compiled program: any mixture
  of terms costs no compilation. `gradients` are the generator's and the discriminator's before clipping.
  `step.program(state, batch)` is the compiled program's text.
  """
  experiment = Experiment(config, DIMS)
  state = fast(experiment.init)()
  names = [f.name for f in dataclasses.fields(LossConfig) if not f.name.startswith('mel_')]

  def step(state, teacher_params, batch, weights):
    weighted = Experiment(replaced(config, loss=dataclasses.replace(config.loss, **weights)), DIMS)
    weighted.generator_tx = _Recorder(experiment.generator_tx)
    weighted.discriminator_tx = _Recorder(experiment.discriminator_tx)
    state, found = make_train_step(weighted)(state, teacher_params, batch)
    seen = {'generator': weighted.generator_tx.seen, 'discriminator': weighted.discriminator_tx.seen}
    return state, found, seen

  compiled = fast(step)

  def arguments(state, batch, weights=None):
    default = {name: getattr(config.loss, name) for name in names}
    given = default if weights is None else {name: weights.get(name, 0.0) for name in names}
    return state, tiny_teacher(), batch, {k: jnp.float32(v) for k, v in given.items()}

  def run(*state_batch_weights):
    return compiled(*arguments(*state_batch_weights))

  run.program = lambda *state_batch: compiled.lower(*arguments(*state_batch)).compile().as_text()
  return experiment, state, run


class _Recorder:
  """An optax transformation that keeps the gradients it was last given, for the trace it is used in."""

  def __init__(self, inner: optax.GradientTransformation):
    self.inner, self.init, self.seen = inner, inner.init, None

  def update(self, gradients, state, params):
    self.seen = gradients
    return self.inner.update(gradients, state, params)


def golden_steps() -> list[dict[str, float]]:
  """Metrics of the first steps: the second shows what the first did to parameters, the third to optimizer states."""
  _, state, step = recording_step(TINY)
  rows = []
  for batch in speech_batches(TINY, 3):
    state, found, _ = step(state, batch)
    rows.append({name: float(total) / float(weight) for name, (total, weight) in sorted(found.items())})
  return rows


if __name__ == '__main__':
  FIXTURE.write_text(json.dumps(golden_steps(), indent=1) + '\n')
  print(FIXTURE.read_text())
