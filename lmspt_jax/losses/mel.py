"""Multi-scale mel loss: descript-audiotools' MelSpectrogramLoss with the LM-SPT release's settings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmspt_jax.audio.mel import mel_filters
from lmspt_jax.audio.stft import stft

FLOOR = 1e-5  # of a mel magnitude, before its logarithm


def multi_scale_mel_loss(x_BN: Float[Array, 'B N'], y_BN: Float[Array, 'B N'], sample_rate: int,
                         mel_bins: Sequence[int], mel_windows: Sequence[int],
                         num_samples_B: Int[Array, 'B'] | None = None) -> Float[Array, '']:
  """l1 of log10(max(mel, 1e-5)^2) plus l1 of mel, averaged over a scale and summed over scales: float32 scalar.

  Scale i has mel_bins[i] bands from 0 Hz to half the sample rate (Hz), a Hann window of mel_windows[i] samples and a
  hop of a quarter. Mels are of the magnitude, not the power. Symmetric in x and y. Raises ValueError for signals too
  short for half the longest window to be reflected.

  With num_samples_B, item b ends after that many samples: what follows is taken as silence on both sides and frames
  centred past the end are left out of the mean.
  """
  if num_samples_B is not None:
    inside_BN = jnp.arange(x_BN.shape[1]) < num_samples_B[:, None]
    x_BN, y_BN = x_BN * inside_BN, y_BN * inside_BN
  loss = jnp.zeros((), jnp.float32)
  for bins, window in zip(mel_bins, mel_windows, strict=True):
    x_BTM = mel_magnitude(x_BN, sample_rate, bins, window)
    y_BTM = mel_magnitude(y_BN, sample_rate, bins, window)
    distance_BT = jnp.mean(jnp.abs(_log_power(x_BTM) - _log_power(y_BTM)) + jnp.abs(x_BTM - y_BTM), axis=-1)
    if num_samples_B is None:
      loss += jnp.mean(distance_BT)
    else:
      inside_BT = jnp.arange(distance_BT.shape[1]) * (window // 4) <= num_samples_B[:, None]
      loss += jnp.sum(distance_BT * inside_BT) / jnp.sum(inside_BT)
  return loss


def mel_magnitude(audio_BN: Float[Array, 'B N'], sample_rate: int, bins: int, window: int) -> Float[Array, 'B T M']:
  """Mel spectrogram of the STFT's magnitude, T = 1 + N // (window // 4) frames."""
  magnitude_BTF = jnp.abs(stft(audio_BN, window, window // 4))
  filters_FM = mel_filters(sample_rate, window, bins)
  return jnp.matmul(magnitude_BTF, filters_FM, precision=jax.lax.Precision.HIGHEST)


def _log_power(mel: Array) -> Array:
  return 2 * jnp.log10(jnp.maximum(mel, FLOOR))
