"""Held-out evaluation inside a run: losses that are compared over time, codebook use, and audio to listen to.

Axes: B batch, N samples, K codebooks, T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmspt_jax import metrics as metrics_lib
from lmspt_jax.data.audio_io import write_wav
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.sharding import local_rows, shard_batch
from lmspt_jax.training.state import Experiment, TrainState


def make_eval_step(experiment: Experiment):
  """(generator, codebooks, teacher_params, batch) -> metrics, codes [B, K, T], the three waveforms of the first rows.

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
    heard_BKT = codes_BKT[:max(1, config.train.eval_audio)]  # every host gets these waves: no more than are written
    waves = {'full': tokenizer.decode(heard_BKT), 'semantic': tokenizer.decode_semantic(heard_BKT),
             'resynthesis': tokenizer.resynthesize(heard_BKT)}
    return sums, codes_BKT, waves

  return eval_step


def evaluate(experiment: Experiment, eval_step, state: TrainState, teacher_params: Any, utterances: dict[str, Any],
             mesh: Mesh, folder: Path | None) -> dict[str, float]:
  """Figures over all held-out utterances; wav files of the first few go to `folder` (None writes nothing).

  `eval_step` is jitted with outputs that are whole on every device, so that every host has the codes of all.

  Returns: mel, distillation, and per part the distinct codes and perplexity over the whole held-out set.
  """
  config = experiment.config
  exported = experiment.exported(state)
  generator = {**state.generator, 'tokenizer': exported['params']}
  size = config.data.batch_size
  count = len(utterances['audio'])
  sums: dict[str, tuple] = {}
  codes, written = [], 0
  for start in range(0, count, size):
    rows = np.arange(start, start + size)
    batch = {k: np.asarray(utterances[k])[rows % count] for k in ('audio', 'num_samples')}
    batch['weight'] = (rows < count).astype(np.float32)
    here = shard_batch({k: v[local_rows(mesh, size)] for k, v in batch.items()}, mesh, size)
    found, codes_BKT, waves = eval_step(generator, exported['codebooks'], teacher_params, here)
    sums = metrics_lib.merge(sums, jax.device_get(found))
    codes_BKT, waves = jax.device_get((codes_BKT, waves))
    for row in range(min(size, count - start)):
      frames = config.model.num_frames(int(batch['num_samples'][row]))
      codes.append(codes_BKT[row, :, :frames])
      if folder is not None and written < config.train.eval_audio:
        _write_audio(folder, utterances['ids'][start + row], batch['audio'][row], int(batch['num_samples'][row]),
                     {k: v[row] for k, v in waves.items()}, config.model)
        written += 1
  figures = metrics_lib.result(sums)
  codes_KT = np.concatenate(codes, axis=1)
  for part, ids, quantizer in (('semantic', codes_KT[:1], config.model.semantic),
                               ('acoustic', codes_KT[1:], config.model.acoustic)):
    counts = [np.bincount(row, minlength=quantizer.size) for row in ids]
    figures[f'distinct_{part}'] = float(np.mean([np.sum(c > 0) for c in counts]))
    figures[f'perplexity_{part}'] = float(np.mean([metrics_lib.perplexity(c) for c in counts]))
  return figures


def _write_audio(folder: Path, name: str, original_N: np.ndarray, num_samples: int, waves: dict[str, np.ndarray],
                 model) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  rates = {'original': model.sample_rate, 'full': model.sample_rate, 'semantic': model.sample_rate,
           'resynthesis': model.resynthesis_sample_rate}
  for kind, wave in {'original': original_N, **waves}.items():
    length = round(num_samples * rates[kind] / model.sample_rate)
    write_wav(folder / f'{name}.{kind}.wav', wave[:length], rates[kind])
