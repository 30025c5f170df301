"""Encoder and decoder of the codec: strided convolutions down to frames, and back up to a waveform.

DAC's networks (arXiv 2306.06546, section 3.1; PyPI `descript-audio-codec`, `dac.model.dac`) without DAC's output
padding, as in the LM-SPT release.

`dtype` is that of activations. Audio comes in and goes out, and latents go out, in float32: the convolutions there
work in it. `remat` says what is recomputed in the backward pass: 'none', 'unit' (residual units) or 'block'.
`inside`, of samples for encoders and of frames for decoders, says where recordings are that do not fill the array
(`inside`). `past` makes the array a piece of a recording, in whole frames; of causal networks alone. How far an
output sees is in `reach`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float

from lmspt_jax.models.inside import Inside
from lmspt_jax.models.layers import Conv1d, ResidualUnit, Snake, Upsample1d, masked, recomputed
from lmspt_jax.models.past import Past


class EncoderBlock(nnx.Module):
  """Residual units, snake, and a strided convolution that doubles the channels."""

  def __init__(self, in_channels: int, out_channels: int, stride: int, dilations: tuple[int, ...], *, rngs: nnx.Rngs,
               causal: bool = False, dtype: DType = jnp.float32, remat: str = 'none'):
    self.units = nnx.List([ResidualUnit(in_channels, d, causal=causal, dtype=dtype, rngs=rngs) for d in dilations])
    self.snake = Snake(in_channels)
    self.conv = Conv1d(in_channels, out_channels, 2 * stride, stride=stride, padding=-(-stride // 2), causal=causal,
                       dtype=dtype, rngs=rngs)
    self.remat = remat

  def __call__(self, x_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B S O']:
    for unit in self.units:
      x_BTC = recomputed(unit, self.remat == 'unit')(x_BTC, inside, past)
    return self.conv(self.snake(x_BTC), inside, past)


class Encoder(nnx.Module):
  """Waveform to latents, one per `prod(strides)` samples.

  Args:
    channels: width after the first convolution; doubles with every stride.
    strides: downsampling of each block.
    latent_dim: width of the output.
    dilations: of a block's residual units.
    causal: no output depends on samples after the end of its frame.
    dtype, remat: as the module says.
    rngs: stream `params`.
  """

  def __init__(self, channels: int, strides: tuple[int, ...], latent_dim: int, dilations: tuple[int, ...], *,
               rngs: nnx.Rngs, causal: bool = False, dtype: DType = jnp.float32, remat: str = 'none'):
    self.conv_in = Conv1d(1, channels, 7, padding=3, causal=causal, rngs=rngs)
    blocks = []
    for stride in strides:
      blocks.append(EncoderBlock(channels, 2 * channels, stride, dilations, causal=causal, dtype=dtype, remat=remat,
                                 rngs=rngs))
      channels *= 2
    self.blocks = nnx.List(blocks)
    self.snake_out = Snake(channels)
    self.conv_out = Conv1d(channels, latent_dim, 3, padding=1, causal=causal, rngs=rngs)
    self.dtype, self.remat = dtype, remat

  def __call__(self, audio_BN: Float[Array, 'B N'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B T C']:
    """N, and every recording's end, must be a multiple of the hop, else PyTorch's arithmetic drops the tail; callers
    pad."""
    x_BTC = self.conv_in(audio_BN[:, :, None], inside, past).astype(self.dtype)
    for block in self.blocks:
      x_BTC = recomputed(block, self.remat == 'block')(x_BTC, inside, past)
      inside = block.conv.after(inside)
    return self.conv_out(self.snake_out(x_BTC), inside, past)


class DecoderBlock(nnx.Module):
  """Snake, a transposed convolution that halves the channels, and residual units."""

  def __init__(self, in_channels: int, out_channels: int, rate: int, dilations: tuple[int, ...], *, rngs: nnx.Rngs,
               causal: bool = False, dtype: DType = jnp.float32, remat: str = 'none'):
    self.snake = Snake(in_channels)
    self.upsample = Upsample1d(in_channels, out_channels, rate, causal=causal, dtype=dtype, rngs=rngs)
    self.units = nnx.List([ResidualUnit(out_channels, d, causal=causal, dtype=dtype, rngs=rngs) for d in dilations])
    self.remat = remat

  def __call__(self, x_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B S O']:
    x_BTC = self.upsample(self.snake(x_BTC), inside, past)
    inside = self.upsample.after(inside)
    for unit in self.units:
      x_BTC = recomputed(unit, self.remat == 'unit')(x_BTC, inside, past)
    return x_BTC


class Decoder(nnx.Module):
  """Latents to a waveform in (-1, 1), about `prod(rates)` samples each (`layers.fit_length` gives exactly that).

  Args:
    latent_dim: width of the input.
    channels: width before the first upsampling; halves with every rate.
    rates: upsampling of each block.
    dilations: of a block's residual units.
    causal: no sample depends on later latents.
    dtype, remat: as the module says.
    rngs: stream `params`.
  """

  def __init__(self, latent_dim: int, channels: int, rates: tuple[int, ...], dilations: tuple[int, ...], *,
               rngs: nnx.Rngs, causal: bool = False, dtype: DType = jnp.float32, remat: str = 'none'):
    self.conv_in = Conv1d(latent_dim, channels, 7, padding=3, causal=causal, dtype=dtype, rngs=rngs)
    blocks = []
    for rate in rates:
      blocks.append(DecoderBlock(channels, channels // 2, rate, dilations, causal=causal, dtype=dtype, remat=remat,
                                 rngs=rngs))
      channels //= 2
    self.blocks = nnx.List(blocks)
    self.snake_out = Snake(channels)
    self.conv_out = Conv1d(channels, 1, 7, padding=3, causal=causal, rngs=rngs)
    self.remat = remat

  def __call__(self, z_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B N']:
    """Samples outside of recordings are 0."""
    x_BTC = self.conv_in(z_BTC, inside, past)
    for block in self.blocks:
      x_BTC = recomputed(block, self.remat == 'block')(x_BTC, inside, past)
      inside = block.upsample.after(inside)
    return masked(jnp.tanh(self.conv_out(self.snake_out(x_BTC), inside, past))[:, :, 0], inside)
