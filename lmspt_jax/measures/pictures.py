"""Spectrograms as pictures: numbers in [0, 1] that whoever shows them gives colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmspt_jax.audio.mel import mel_filters
from lmspt_jax.measures.measure import RATE

BANDS = 80
_GAP = 4  # rows between two spectrograms


def spectrogram(audio_N: np.ndarray) -> np.ndarray:
  """float64 [80 mel bands, lowest first, a column each 10 ms]: 0 is 60 dB below a squared magnitude of 1, 1 is 80 dB
  above that. float [N] at 16 kHz."""
  size, hop = 512, RATE // 100
  frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio_N, size // 2), size)[::hop]
  power_TM = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2 @ mel_filters(RATE, size, BANDS)
  return np.clip(10 * np.log10(np.maximum(power_TM, 1e-12)).T + 60, 0, 80) / 80


def aligned_spectrograms(audios: Sequence[np.ndarray]) -> np.ndarray:
  """Of recordings of one length, one below the other along one axis of time: uint8 grey, light is loud, low bands
  below."""
  parts: list[np.ndarray] = []
  for audio_N in audios:
    picture_HW = np.round(255 * spectrogram(audio_N)[::-1]).astype(np.uint8)
    parts += [picture_HW, np.full((_GAP, picture_HW.shape[1]), 255, np.uint8)]
  return np.concatenate(parts[:-1])
