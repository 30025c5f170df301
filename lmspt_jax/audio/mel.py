"""Mel filters (Slaney's scale and area normalisation) and Whisper's log-mel spectrogram.

Axis letters: B batch, N samples, T frames, F bins, M mel bands. Facts: Slaney's Auditory Toolbox (linear below
1 kHz at 200/3 Hz a mel, logarithmic above at 27 mels per factor 6.4), arXiv 2212.04356 section 2.2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmspt_jax.audio.stft import stft

WHISPER_SAMPLE_RATE = 16_000  # Hz
WHISPER_FFT_SIZE = 400
WHISPER_HOP = 160

_HZ_PER_MEL = 200.0 / 3.0  # below the break
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0  # above the break


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
  above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
  return np.where(hz < _BREAK_HZ, hz / _HZ_PER_MEL, above)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
  above = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
  return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, above)


@functools.lru_cache(maxsize=64)
def mel_filters(
  sample_rate: int, fft_size: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> np.ndarray:
  """Triangular filters, read-only float32 [fft_size // 2 + 1, n_mels], as librosa.filters.mel (transposed).

  fmax None is half the sample rate. Bands narrower than a bin are all zero, as there.
  """
  fmax = sample_rate / 2 if fmax is None else fmax
  bins_F = np.linspace(0.0, sample_rate / 2, fft_size // 2 + 1)
  low, high = _hz_to_mel(np.array([fmin, fmax], np.float64))
  edges = _mel_to_hz(np.linspace(low, high, n_mels + 2))
  left_M, centre_M, right_M = edges[:-2], edges[1:-1], edges[2:]
  rising_FM = (bins_F[:, None] - left_M) / (centre_M - left_M)
  falling_FM = (right_M - bins_F[:, None]) / (right_M - centre_M)
  filters_FM = np.maximum(0.0, np.minimum(rising_FM, falling_FM)) * (2.0 / (right_M - left_M))
  filters_FM = filters_FM.astype(np.float32)
  filters_FM.flags.writeable = False  # the cache hands the same array to everyone
  return filters_FM


def log_mel_spectrogram(audio_BN: Array, n_mels: int, floor: str = 'item') -> Array:
  """Whisper's input: float32 audio at 16 kHz [B, N] -> float32 [B, N // 160, n_mels], roughly in [-1, 1.5].

  log10 of the mel power, floored 8 below the maximum, then (x + 4) / 4. floor 'item' takes each item's own maximum;
  'batch' takes the whole batch's, so an item depends on its batch mates (openai-whisper's on a batch, and a quirk of
  the LM-SPT release). Raises ValueError for another floor.
  """
  if floor not in ('item', 'batch'):
    raise ValueError(f"unknown floor {floor!r}: use 'item' or 'batch'")
  spectrum_BTF = stft(audio_BN, WHISPER_FFT_SIZE, WHISPER_HOP)[:, :-1]  # the last frame is dropped: 30 s gives 3000
  power_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
  filters_FM = mel_filters(WHISPER_SAMPLE_RATE, WHISPER_FFT_SIZE, n_mels)
  # Full precision: a TPU's default product of bfloat16 inputs is off by more than the quietest bands hold.
  mel_BTM = jnp.matmul(power_BTF, filters_FM, precision=jax.lax.Precision.HIGHEST)
  log_BTM = jnp.log10(jnp.maximum(mel_BTM, 1e-10))
  peak = jnp.max(log_BTM, axis=(1, 2) if floor == 'item' else None, keepdims=True)
  return (jnp.maximum(log_BTM, peak - 8.0) + 4.0) / 4.0
