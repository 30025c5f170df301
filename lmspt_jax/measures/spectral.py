"""Spectral distances of a decoded recording to its original, on the device.

The mel distance is the training loss with the release's bands and windows, at 16 kHz; the STFT distance is the same
over all bins. Both have 0 for equal recordings.

Axes: B batch, N samples, T frames.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lmspt_jax.audio.stft import stft
from lmspt_jax.losses.mel import FLOOR, multi_scale_mel_loss
from lmspt_jax.measures.measure import RATE

MEL_BINS, MEL_WINDOWS = (40, 80, 160, 320), (256, 512, 1024, 2048)
STFT_WINDOWS = (2048, 512)
_MARGIN = max(*MEL_WINDOWS, *STFT_WINDOWS)  # zeros after every recording, so that all end alike
_LEAST = RATE  # samples of the smallest program; others are twice as long each


@jax.jit
def _distances(original_BN: jax.Array, decoded_BN: jax.Array, num_samples_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  mel = multi_scale_mel_loss(original_BN, decoded_BN, RATE, MEL_BINS, MEL_WINDOWS, num_samples_B)
  spectral = jnp.zeros(())
  for window in STFT_WINDOWS:
    x_BTF, y_BTF = (jnp.maximum(jnp.abs(stft(audio_BN, window, window // 4)), FLOOR)
                    for audio_BN in (original_BN, decoded_BN))
    distance_BT = jnp.mean(2 * jnp.abs(jnp.log10(x_BTF) - jnp.log10(y_BTF)) + jnp.abs(x_BTF - y_BTF), axis=-1)
    inside_BT = jnp.arange(distance_BT.shape[1]) * (window // 4) <= num_samples_B[:, None]
    spectral += jnp.sum(distance_BT * inside_BT) / jnp.sum(inside_BT)
  return mel, spectral


def spectral_distances(original_N: np.ndarray, decoded_N: np.ndarray) -> tuple[float, float]:
  """(mel distance, STFT distance) of float32 recordings of the same length at 16 kHz.

  Per scale the mean over frames and bands of |difference of log10 of the squared magnitude| + |difference of the
  magnitude|, summed over scales; magnitudes are floored at 1e-5 before the logarithm.
  """
  size = _LEAST
  while size < len(original_N) + _MARGIN:
    size *= 2
  padded = [np.pad(np.asarray(audio_N, np.float32), (0, size - len(audio_N)))[None]
            for audio_N in (original_N, decoded_N)]
  mel, spectral = _distances(*padded, np.array([len(original_N)], np.int32))
  return float(mel), float(spectral)
