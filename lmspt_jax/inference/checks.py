"""What a tokenizer is given, checked. Each raises LmsptError in one line.

Axes: C channels, N samples.
"""

from __future__ import annotations

import numpy as np

from lmspt_jax.config import ModelConfig
from lmspt_jax.data.audio_io import MAX_CHANNELS, MAX_RATE, MIN_RATE
from lmspt_jax.errors import LmsptError
from lmspt_jax.inference.codes import Codes


def checked_rate(sample_rate: float) -> int:
  """Hz that can be resampled."""
  if sample_rate != int(sample_rate) or not MIN_RATE <= sample_rate <= MAX_RATE:
    raise LmsptError(f'sample rate {sample_rate} Hz: must be a whole number, {MIN_RATE} to {MAX_RATE} Hz')
  return int(sample_rate)


def checked_audio(audio: np.ndarray) -> np.ndarray:
  """Floats [N] or [C, N] as float32 [N] or [N, C], N >= 1, all finite."""
  if audio.dtype.kind != 'f':
    raise LmsptError(f'audio of type {audio.dtype}: give floats in [-1, 1] (16-bit samples divided by 32768)')
  if audio.ndim not in (1, 2) or (audio.ndim == 2 and audio.shape[0] > MAX_CHANNELS):
    raise LmsptError(f'audio of shape {audio.shape}: give [samples] or [channels, samples] (transpose what '
                     'soundfile reads)')
  if not audio.size:
    raise LmsptError(f'audio of shape {audio.shape}: holds no samples')
  with np.errstate(over='ignore'):  # what does not fit float32 is infinite
    audio = audio.astype(np.float32, copy=False)
  if not np.isfinite(audio).all():
    raise LmsptError(f'audio of shape {audio.shape}: holds NaN or infinite samples')
  return audio.T


def check_codes(codes: Codes, config: ModelConfig, model_hash: str) -> None:
  """Codes of this model (or of any: '') whose shape, values and length can be."""
  ids = codes.ids
  if codes.model_hash not in ('', model_hash):
    raise LmsptError(f'codes of model {codes.model_hash}, not of this one ({model_hash}): use the model that '
                     "made them (any model decodes codes with model_hash='')")
  if ids.ndim != 2 or not 1 <= ids.shape[0] <= config.num_codebooks or not ids.shape[1]:
    raise LmsptError(f'ids of shape {ids.shape}: this model has {config.num_codebooks} codebooks; give '
                     f'[1 to {config.num_codebooks}, at least 1 frame]')
  for k, (ids_T, size) in enumerate(zip(ids, config.codebook_sizes, strict=False)):
    if ids_T.min() < 0 or ids_T.max() >= size:
      raise LmsptError(f'ids of codebook {k} from {ids_T.min()} to {ids_T.max()}: this model has codes 0 to '
                       f'{size - 1} there; use the model that made them')
  if codes.sample_rate != config.sample_rate:
    raise LmsptError(f'codes of speech at {codes.sample_rate} Hz: this model works at {config.sample_rate} Hz; use the '
                     'model that made them')
  if codes.num_samples < 1 or config.num_frames(codes.num_samples) != ids.shape[1]:
    least, most = (ids.shape[1] - 1) * config.hop + 1, ids.shape[1] * config.hop
    raise LmsptError(f'num_samples {codes.num_samples}: {ids.shape[1]} frames of {config.hop} samples hold {least} to '
                     f'{most}; use the model that made them')
