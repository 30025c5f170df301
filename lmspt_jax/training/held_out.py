"""Held-out evaluation inside a run: losses that are compared over time, codebook use, metrics of `lmspt evaluate` where
the config asks for some, and audio to listen to.

Axes: B batch, N samples, K codebooks, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmspt_jax import metrics as metrics_lib
from lmspt_jax.config import ModelConfig
from lmspt_jax.data.audio_io import to_mono_at, write_wav
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.measures.measure import RATE, fitted
from lmspt_jax.measures.pictures import aligned_spectrograms
from lmspt_jax.sharding import local_rows, shard_batch
from lmspt_jax.training.evaluators import ORIGINAL, Evaluators
from lmspt_jax.training.state import Experiment, TrainState


@dataclass(frozen=True)
class Sample:
  """A held-out utterance to look at and listen to.

  Attributes:
    name: its id.
    waves: float32 [N] of 'original', 'full', 'semantic' and 'resynthesis'.
    rates: theirs, in Hz.
  """

  name: str
  waves: Mapping[str, np.ndarray]
  rates: Mapping[str, int]


@dataclass(frozen=True)
class Evaluated:
  """Figures over all held-out utterances, and the first few of them."""

  figures: dict[str, float]
  samples: list[Sample]


def make_eval_step(experiment: Experiment, heard: int):
  """(generator, codebooks, teacher_params, batch) -> metrics, codes [B, K, T], the three waveforms of `heard` rows.

  Every host gets these: ask for no more than are needed.

  The batch has a `weight` float32 [B], 0 for rows that only fill the last batch. Losses are per item, so that
  neither the fill nor the batch size changes a figure, and leave the padding of short recordings out.
  """
  config = experiment.config

  def one(tokenizer, distillation_params, teacher_params, audio_N, num_samples):
    audio_BN = audio_N[None]
    out = tokenizer(audio_BN)
    student = experiment.distillation.student(distillation_params, out)
    mel = multi_scale_mel_loss(out.audio, audio_BN, config.model.sample_rate, config.loss.mel_bins,
                               config.loss.mel_windows, num_samples[None])
    distance = experiment.distillation.loss(teacher_params, audio_BN, num_samples[None], student)
    return mel, distance

  def eval_step(generator: dict[str, Any], codebooks: dict[str, Any], teacher_params: Any, batch: dict[str, Any]):
    tokenizer = experiment.tokenizer(generator['tokenizer'], codebooks)
    mel_B, distance_B = jax.lax.map(
        lambda x: one(tokenizer, generator['distillation'], teacher_params, *x),
        (batch['audio'], batch['num_samples']))
    codes_BKT = tokenizer.encode(batch['audio'])
    weight_B = batch['weight']
    sums = {'mel': (jnp.sum(mel_B * weight_B), jnp.sum(weight_B)),
            'distillation': (jnp.sum(distance_B * weight_B), jnp.sum(weight_B))}
    heard_BKT = codes_BKT[:heard]
    waves = {'full': tokenizer.decode(heard_BKT), 'semantic': tokenizer.decode_semantic(heard_BKT),
             'resynthesis': tokenizer.resynthesize(heard_BKT)}
    return sums, codes_BKT, waves

  return eval_step


def evaluate(experiment: Experiment, eval_step, state: TrainState, teacher_params: Any, utterances: dict[str, Any],
             mesh: Mesh, evaluators: Evaluators | None) -> Evaluated:
  """All hosts call it, and get the same figures.

  `eval_step` is jitted with outputs that are whole on every device, so that every host has the codes of all, and the
  waveforms of all rows where there are evaluators.

  Returns: mel, distillation, per part the distinct codes and perplexity over the whole held-out set, and what the
    evaluators measure; samples of the first `train.eval_audio`.
  """
  config = experiment.config
  exported = experiment.exported(state)
  generator = {**state.generator, 'tokenizer': exported['params']}
  size = config.data.batch_size
  count = len(utterances['audio'])
  sums: dict[str, tuple] = {}
  codes: list[np.ndarray] = []
  decoded: list[dict[str, np.ndarray]] = []
  for start in range(0, count, size):
    rows = np.arange(start, start + size)
    batch = {k: np.asarray(utterances[k])[rows % count] for k in ('audio', 'num_samples')}
    batch['weight'] = (rows < count).astype(np.float32)
    here = shard_batch({k: v[local_rows(mesh, size)] for k, v in batch.items()}, mesh, size)
    found, codes_BKT, waves = eval_step(generator, exported['codebooks'], teacher_params, here)
    sums = metrics_lib.merge(sums, jax.device_get(found))
    codes_BKT, waves = jax.device_get((codes_BKT, waves))
    for row in range(min(size, count - start)):
      codes.append(codes_BKT[row, :, :config.model.num_frames(int(batch['num_samples'][row]))])
      if evaluators is not None or len(decoded) < config.train.eval_audio:
        decoded.append({path: wave_BN[row] for path, wave_BN in waves.items()})
  figures = metrics_lib.result(sums)
  codes_KT = np.concatenate(codes, axis=1)
  for part, ids, quantizer in (('semantic', codes_KT[:1], config.model.semantic),
                               ('acoustic', codes_KT[1:], config.model.acoustic)):
    counts = [np.bincount(row, minlength=quantizer.size) for row in ids]
    figures[f'distinct_{part}'] = float(np.mean([np.sum(c > 0) for c in counts]))
    figures[f'perplexity_{part}'] = float(np.mean([metrics_lib.perplexity(c) for c in counts]))
  if evaluators is not None:
    figures |= evaluators(decoded)
  samples = [_sample(config.model, utterances, number, waves)
             for number, waves in enumerate(decoded[:config.train.eval_audio])]
  return Evaluated(figures, samples)


def _sample(model: ModelConfig, utterances: dict[str, Any], number: int, waves: Mapping[str, np.ndarray]) -> Sample:
  waves = {ORIGINAL: utterances['audio'][number], **waves}
  rates = dict.fromkeys(waves, model.sample_rate) | {'resynthesis': model.resynthesis_sample_rate}
  length = {kind: round(int(utterances['num_samples'][number]) * rate / model.sample_rate)
            for kind, rate in rates.items()}
  return Sample(utterances['ids'][number], {kind: wave_N[:length[kind]] for kind, wave_N in waves.items()}, rates)


def in_a_line(figures: Mapping[str, float]) -> str:
  """For the log: of what the evaluators measure, the reconstruction's alone."""
  return ', '.join(f'{name} {value:.4g}' for name, value in figures.items()
                   if '/' not in name or (name.startswith('full/') and not name.endswith('_missing')))


def show(samples: Sequence[Sample], step: int, folder: Path, writer: metrics_lib.MetricWriter) -> None:
  """Writes wav files to `folder`, and to TensorBoard the same audio and, below each other, its spectrograms."""
  folder.mkdir(parents=True, exist_ok=True)
  for one in samples:
    heard, name = {}, one.name.replace('/', '_')
    for kind, wave_N in one.waves.items():
      write_wav(folder / f'{name}.{kind}.wav', wave_N, one.rates[kind])
      writer.add_audio(step, f'held_out/{name}/{kind}', wave_N, one.rates[kind])
      heard[kind] = to_mono_at(wave_N, one.rates[kind], RATE)
    heard = [fitted(audio_N, len(heard[ORIGINAL])) for audio_N in heard.values()]
    writer.add_picture(step, f'held_out/{name}/{"_".join(one.waves)}', aligned_spectrograms(heard))
