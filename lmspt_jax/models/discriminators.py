"""DAC's discriminators: multi-period, multi-scale and multi-resolution complex STFT (arXiv 2306.06546, section 3.3).

Axes: B batch, N samples, P period, L samples / period, T frames or steps, F frequency bins, C channels.

Every sub-discriminator maps audio to a list of feature maps, the last being its logits: [B, P, L, C] (period),
[B, 1, T, C] (scale), [B, T, F, C] (resolution; each band's maps in turn, then the logits over all bands). Against
PyTorch's these are channels last, and a period's two axes are swapped (`convolution2d` says why); losses average over
a map, so neither matters to them.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float

from lmspt_jax.audio.resample import resample
from lmspt_jax.audio.stft import stft
from lmspt_jax.config import FLOAT32, ComputeConfig, DiscriminatorConfig
from lmspt_jax.models.convolution2d import Conv2d, convolution
from lmspt_jax.models.layers import recomputed

# (kernel, stride) of the multi-scale discriminator's layers; all but the first and last have groups of four channels.
_SCALE_LAYERS = ((15, 1), (41, 4), (41, 4), (41, 4), (41, 4), (5, 1))
_MATRIX_UNIT = 128  # channels that a TPU multiplies at once
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
    # Not a reshape and a transpose: on that one copy a TPU's compiler spends half a minute.
    x_BPL = jnp.stack([audio_BN[:, phase :: self.period] for phase in range(self.period)], axis=1)
    return _features(self.convs, self.conv_post, x_BPL[..., None])


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
  """Real and imaginary part of one STFT, cut into frequency bands with a convolution stack each.

  One function, two formulations, chosen when the computation is lowered. On a TPU several bands go through one
  convolution, side by side as channels, its kernel zero between them: the matrix unit, 128 channels wide, would stand
  three quarters empty for a band of 32, and the train step's fifteen stacks took half of its compiler's time
  (docs/scaling.md). Elsewhere those zeros would be computed with: each band has its own.
  """

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
    graphdef, state = nnx.split(self)
    bands = jax.lax.platform_dependent(
        state, x_BTFC, tpu=lambda state, x: nnx.merge(graphdef, state).bands_together(x),
        default=lambda state, x: nnx.merge(graphdef, state).bands_apart(x))
    maps = [band_map for maps in bands for band_map in maps]
    return [*maps, self.conv_post(jnp.concatenate([maps[-1] for maps in bands], axis=2))]

  def bands_apart(self, x_BTFC: Float[Array, 'B T F C']) -> list[list[Float[Array, 'B T F C']]]:
    """Every band's feature maps, lowest band first."""
    return [_activations(convs, x_BTFC[:, :, low:high])
            for convs, (low, high) in zip(self.band_convs, itertools.pairwise(self.band_bins), strict=True)]

  def bands_together(self, x_BTFC: Float[Array, 'B T F C']) -> list[list[Float[Array, 'B T F C']]]:
    """The same, neighbouring bands of similar width in one convolution."""
    slices = [x_BTFC[:, :, low:high] for low, high in itertools.pairwise(self.band_bins)]
    limit = max(1, _MATRIX_UNIT // self.conv_post.weight_v.shape[2])
    maps = []
    for group in _similar([band.shape[2] for band in slices], limit):
      maps += _activations_side_by_side([self.band_convs[i] for i in group], [slices[i] for i in group])
    return maps


def _similar(widths: list[int], limit: int) -> list[list[int]]:
  """Indices in runs of at most `limit` neighbours, the widest of a run at most twice as wide as its narrowest."""
  runs: list[list[int]] = []
  for index in range(len(widths)):
    run = [widths[i] for i in (*runs[-1], index)] if runs else []
    if run and len(run) <= limit and max(run) <= 2 * min(run):
      runs[-1].append(index)
    else:
      runs.append([index])
  return runs


def _activations_side_by_side(stacks: list[nnx.List], bands: list[Array]) -> list[list[Array]]:
  """`_activations` of several stacks of equal shapes, each on its band [B, H, W, C] of its own width W."""
  widths = [band.shape[2] for band in bands]
  pad = lambda x, axis, before, after: jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])
  x_BHWC = jnp.concatenate([pad(band, 2, 0, max(widths) - band.shape[2]) for band in bands], axis=3)
  maps: list[list[Array]] = [[] for _ in bands]
  for convs in zip(*stacks, strict=True):
    kernels = [conv.kernel() for conv in convs]
    channels = kernels[0].shape[2]  # of one band
    kernel_HWIO = jnp.concatenate([
        pad(kernel, 2, i * channels, (len(kernels) - 1 - i) * channels) for i, kernel in enumerate(kernels)], axis=3)
    conv = convs[0]
    y_BHWO = convolution(x_BHWC.astype(conv.dtype), kernel_HWIO, conv.stride, conv.padding)
    y_BHWO = y_BHWO + jnp.concatenate([conv.bias[...] for conv in convs])
    x_BHWC = jax.nn.leaky_relu(y_BHWO.astype(conv.dtype), 0.1)
    widths = [conv.output_width(width) for width in widths]
    out_channels = kernels[0].shape[3]
    if min(widths) < max(widths):
      # What lies past a narrower band's end is the zero padding of its next convolution.
      inside_WO = np.arange(max(widths))[:, None] < np.repeat(widths, out_channels)
      x_BHWC = x_BHWC * jnp.asarray(inside_WO, conv.dtype)
    for i, width in enumerate(widths):
      maps[i].append(x_BHWC[:, :, :width, i * out_channels : (i + 1) * out_channels])
  return maps


def _activations(convs: nnx.List, x_BHWC: Array) -> list[Array]:
  maps = []
  for conv in convs:
    x_BHWC = jax.nn.leaky_relu(conv(x_BHWC), 0.1)
    maps.append(x_BHWC)
  return maps


def _features(convs: nnx.List, conv_post: Conv2d, x_BHWC: Array) -> list[Array]:
  maps = _activations(convs, x_BHWC)
  return [*maps, conv_post(maps[-1])]
