"""DAC's discriminators: multi-period, multi-scale and multi-resolution complex STFT (arXiv 2306.06546, section 3.3).

Axes: B batch, N samples, P period, L samples / period, T frames or steps, F frequency bins, C channels.

Every sub-discriminator maps audio to a list of feature maps, the last being its logits: [B, P, L, C] (period),
[B, 1, T, C] (scale), [B, T, F, C] (resolution; each band's maps in turn, then the logits over all bands). Against
PyTorch's these are channels last, and a period's two axes are swapped (`convolution2d` says why); losses average over
a map, so neither matters to them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float

from lmspt_jax.audio.resample import resample
from lmspt_jax.audio.stft import stft
from lmspt_jax.config import FLOAT32, ComputeConfig, DiscriminatorConfig
from lmspt_jax.models.convolution2d import Conv2d
from lmspt_jax.models.layers import recomputed

# (kernel, stride) of the multi-scale discriminator's layers; all but the first and last have groups of four channels.
_SCALE_LAYERS = ((15, 1), (41, 4), (41, 4), (41, 4), (41, 4), (5, 1))
_RESAMPLE_EDGE = 26  # output samples that the resampler's filter reaches to one side, rounded up (24 / 0.945)


class Discriminators(nnx.Module):
  """All sub-discriminators of a config, in DAC's order: periods, rates, FFT sizes."""

  def __init__(self, config: DiscriminatorConfig, sample_rate: int, *, rngs: nnx.Rngs,
               compute: ComputeConfig = FLOAT32):
    """sample_rate in Hz; the weights do not depend on it, and of the computation only the multi-scale part would.

    `compute` decides the dtype of activations and whether they are recomputed in the backward pass; STFTs are float32.
    """
    self.sample_rate, self.recompute = sample_rate, compute.remat_discriminators == 'block'
    options = dict(dtype=jnp.dtype(compute.dtype), rngs=rngs)
    self.discriminators = nnx.List(
        [PeriodDiscriminator(period, config.period_channels, **options) for period in config.periods]
        + [ScaleDiscriminator(rate, config.scale_channels, **options) for rate in config.rates]
        + [ResolutionDiscriminator(size, config.stft_channels, config.band_edges, **options)
           for size in config.fft_sizes])

  def __call__(self, audio_BN: Float[Array, 'B N']) -> list[list[Array]]:
    """float32 audio -> one list of feature maps for each sub-discriminator, the last of each being the logits."""
    audio_BN = normalise(audio_BN)
    return [recomputed(discriminator, self.recompute)(audio_BN) for discriminator in self.discriminators]


def normalise(audio_BN: Float[Array, 'B N']) -> Float[Array, 'B N']:
  """Removes each item's mean and scales its peak to 0.8; silence stays silence."""
  audio_BN = audio_BN - jnp.mean(audio_BN, axis=-1, keepdims=True)
  return 0.8 * audio_BN / (jnp.max(jnp.abs(audio_BN), axis=-1, keepdims=True) + 1e-9)


class PeriodDiscriminator(nnx.Module):
  """Sees each of the `period` interleaved phases of the signal with one set of weights."""

  def __init__(self, period: int, channels: tuple[int, ...], *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
    self.period = period
    widths = (1, *channels)
    last = len(channels) - 1
    self.convs = nnx.List([
        Conv2d(widths[i], widths[i + 1], (1, 5), stride=3 if i < last else 1, dtype=dtype, rngs=rngs)
        for i in range(len(channels))])
    self.conv_post = Conv2d(channels[-1], 1, (1, 3), dtype=dtype, rngs=rngs)

  def __call__(self, audio_BN: Float[Array, 'B N']) -> list[Float[Array, 'B P L C']]:
    # DAC adds a whole period when the length already is a multiple: kept, the logits' number depends on it.
    extra = self.period - audio_BN.shape[1] % self.period
    audio_BN = jnp.pad(audio_BN, ((0, 0), (0, extra)), mode='reflect')
    x_BLP = audio_BN.reshape(audio_BN.shape[0], -1, self.period)
    return _features(self.convs, self.conv_post, x_BLP.swapaxes(1, 2)[..., None])


class ScaleDiscriminator(nnx.Module):
  """One-dimensional grouped convolutions over the signal resampled by 1 / rate."""

  def __init__(self, rate: int, channels: tuple[int, ...], *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
    self.rate = rate
    widths = (1, *channels)
    self.convs = nnx.List([
        Conv2d(widths[i], widths[i + 1], (1, kernel), stride=stride, groups=max(1, widths[i] // 4) if stride > 1 else 1,
               dtype=dtype, rngs=rngs) for i, (kernel, stride) in enumerate(_SCALE_LAYERS)])
    self.conv_post = Conv2d(channels[-1], 1, (1, 3), dtype=dtype, rngs=rngs)

  def __call__(self, audio_BN: Float[Array, 'B N']) -> list[Float[Array, 'B 1 T C']]:
    if self.rate > 1:
      # DAC's resampler (julius) repeats the edge samples where ours takes zeros, and drops an incomplete last step.
      steps = audio_BN.shape[1] // self.rate
      edge = _RESAMPLE_EDGE * self.rate
      audio_BN = resample(jnp.pad(audio_BN, ((0, 0), (edge, edge)), mode='edge'), self.rate, 1)
      audio_BN = audio_BN[:, _RESAMPLE_EDGE : _RESAMPLE_EDGE + steps]
    return _features(self.convs, self.conv_post, audio_BN[:, None, :, None])


class ResolutionDiscriminator(nnx.Module):
  """Real and imaginary part of one STFT, cut into frequency bands with a convolution stack each."""

  def __init__(self, fft_size: int, channels: int, band_edges: tuple[float, ...], *, rngs: nnx.Rngs,
               dtype: DType = jnp.float32):
    self.fft_size = fft_size
    bins = fft_size // 2 + 1
    self.band_bins = tuple(int(edge * bins) for edge in band_edges)
    self.band_convs = nnx.List([
        nnx.List([
            Conv2d(2, channels, (3, 9), dtype=dtype, rngs=rngs),
            *(Conv2d(channels, channels, (3, 9), stride=2, dtype=dtype, rngs=rngs) for _ in range(3)),
            Conv2d(channels, channels, (3, 3), dtype=dtype, rngs=rngs)]) for _ in self.band_bins[1:]])
    self.conv_post = Conv2d(channels, 1, (3, 3), dtype=dtype, rngs=rngs)

  def __call__(self, audio_BN: Float[Array, 'B N']) -> list[Float[Array, 'B T F C']]:
    spectrum_BTF = stft(audio_BN, self.fft_size, self.fft_size // 4, padding='match_stride')
    x_BTFC = jnp.stack([spectrum_BTF.real, spectrum_BTF.imag], axis=-1)
    maps, bands = [], []
    for convs, low, high in zip(self.band_convs, self.band_bins[:-1], self.band_bins[1:], strict=True):
      maps += _activations(convs, x_BTFC[:, :, low:high])
      bands.append(maps[-1])
    return [*maps, self.conv_post(jnp.concatenate(bands, axis=2))]


def _activations(convs: nnx.List, x_BHWC: Array) -> list[Array]:
  maps = []
  for conv in convs:
    x_BHWC = jax.nn.leaky_relu(conv(x_BHWC), 0.1)
    maps.append(x_BHWC)
  return maps


def _features(convs: nnx.List, conv_post: Conv2d, x_BHWC: Array) -> list[Array]:
  maps = _activations(convs, x_BHWC)
  return [*maps, conv_post(maps[-1])]
