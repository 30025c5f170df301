"""One-dimensional layers of the codec, channels last.

Axes: B batch, N samples, T steps, K kernel taps, C and I channels in, O channels out.

All convolutions are weight-normalised as in the release: parameters `weight_v` [K, I, O], `weight_g` and `bias` [O];
the kernel is g * v / |v|, the norm taken over every axis but PyTorch's first. That is the output channel of a
convolution and the *input* channel of a transposed one (arXiv 1602.07868; torch.nn.utils.weight_norm, dim=0).

A layer without `weight_g` is folded (`folding`): its `weight_v` is the kernel, a transposed one's laid out for
`steady_upsampling`, and it convolves in the `steady` form.

Kernels start as PyTorch's convolutions do, uniform within 1/sqrt(fan in); biases start at 0.

`dtype` is that of activations; parameters are float32, and so are normalised kernels and Snake's arithmetic.

`inside` says where recordings are that do not fill the array (`inside`): a convolution with more than one tap reads
zeros outside of the recording that a step is of. `after` of a layer is the same of its output.

`past` says what was before the array where that is not zeros: the array is then a piece of a recording, in whole
strides, and the layer must be causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float

from lmspt_jax.models.inside import Inside
from lmspt_jax.models.past import Past
from lmspt_jax.models.steady import parted_convolution, steady_convolution, steady_product

# A TPU multiplies float32 in bfloat16 unless told otherwise, which would change which code is nearest.
PRECISION = jax.lax.Precision.HIGHEST


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def masked(x_BTC: Array, inside: Inside | None) -> Array:
  """x [B, T] or [B, T, C] with zeros outside of recordings; x itself where they fill the array."""
  if inside is None:
    return x_BTC
  mask_BT = inside.mask(x_BTC.shape[1])
  return jnp.where(mask_BT.reshape(*mask_BT.shape, *(1,) * (x_BTC.ndim - 2)), x_BTC, jnp.zeros((), x_BTC.dtype))


def normalised_kernel(v_KIO: Array, g: Array, axis: int) -> Array:
  """g * v / |v| with the norm over all axes but `axis` (2: output channel, 1: input channel)."""
  others = tuple(a for a in range(3) if a != axis)
  shape = [1, 1, 1]
  shape[axis] = -1
  return v_KIO * (g.reshape(shape) / jnp.sqrt(jnp.sum(jnp.square(v_KIO), axis=others, keepdims=True)))


def _kernel(layer: Conv1d | Upsample1d) -> Array:
  """The kernel that is applied: [K, I, O], of a folded transposed convolution as `steady_upsampling` takes it."""
  v_KIO = layer.weight_v[...]
  return v_KIO if layer.weight_g is None else normalised_kernel(v_KIO, layer.weight_g[...], layer.gain_axis)


@jax.custom_vjp
def snake(x: Array, alpha: Float[Array, 'C']) -> Array:
  """x + sin^2(alpha x) / alpha in float32, in the dtype of x. Differentiable once, in reverse mode.

  Its gradient is computed from x alone: what automatic differentiation would keep (sine, cosine, their products) is
  several times the memory of the activations.
  """
  return _snake_forward(x, alpha)[0]


def _snake_forward(x, alpha):
  wide = x.astype(jnp.float32)
  # XLA makes this product of a division where there are several steps, and would not where there is one.
  return (wide + jnp.square(jnp.sin(alpha * wide)) * (1 / (alpha + 1e-9))).astype(x.dtype), (x, alpha)


def _snake_backward(saved, grad):
  x, alpha = saved
  wide, grad_wide = x.astype(jnp.float32), grad.astype(jnp.float32)
  sine, double = jnp.sin(alpha * wide), jnp.sin(2 * alpha * wide)
  x_grad = grad_wide * (1 + double * (alpha / (alpha + 1e-9)))
  alpha_grad = grad_wide * (wide * double - jnp.square(sine) / (alpha + 1e-9)) / (alpha + 1e-9)
  return x_grad.astype(x.dtype), jnp.sum(alpha_grad, axis=tuple(range(x.ndim - 1)))


snake.defvjp(_snake_forward, _snake_backward)


class Snake(nnx.Module):
  """`snake` with a learnt alpha per channel (arXiv 2006.08195)."""

  def __init__(self, channels: int):
    self.alpha = nnx.Param(jnp.ones((channels,), jnp.float32))

  def __call__(self, x_BTC: Float[Array, 'B T C']) -> Float[Array, 'B T C']:
    return snake(x_BTC, self.alpha[...])


class Conv1d(nnx.Module):
  """Weight-normalised convolution.

  `padding` zeros on both sides; with `causal`, all of the padding that keeps ceil(T / stride) steps is on the left
  (a step sees nothing after the end of its stride), with zeros on the right up to a whole stride.
  """

  gain_axis = 2  # of the kernel, that of `weight_g`

  def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, rngs: nnx.Rngs, stride: int = 1,
               dilation: int = 1, padding: int = 0, causal: bool = False, dtype: DType = jnp.float32):
    v_KIO = _uniform(rngs.params(), (kernel_size, in_channels, out_channels), in_channels * kernel_size)
    self.weight_v = nnx.Param(v_KIO)
    self.weight_g = nnx.Param(jnp.sqrt(jnp.sum(jnp.square(v_KIO), axis=(0, 1))))
    self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
    self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
    self.padding, self.causal, self.dtype = padding, causal, dtype

  def after(self, inside: Inside | None) -> Inside | None:
    return None if inside is None else inside.downsampled(self.stride)

  def __call__(self, x_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B S O']:
    x_BTC = x_BTC.astype(self.dtype)
    kernel_KIO = _kernel(self).astype(self.dtype)
    if self.kernel_size == 1 and self.stride == 1:
      if self.weight_g is None:
        y_BSO = steady_product(x_BTC, kernel_KIO[0], PRECISION)
      else:
        y_BSO = jnp.einsum('btc,co->bto', x_BTC, kernel_KIO[0], precision=PRECISION)
      return (y_BSO + self.bias[...]).astype(self.dtype)
    x_BTC = masked(x_BTC, inside)
    padding = (self.padding, self.padding)
    if self.causal:
      reach = (self.kernel_size - 1) * self.dilation + 1
      padding = (reach - self.stride, -x_BTC.shape[1] % self.stride)
      if past is not None:
        x_BTC, padding = past.before(x_BTC, padding[0]), (0, 0)
    if inside is not None and not inside.parts(padding[0]):
      items_BT = inside.items(x_BTC.shape[1])
      y_BSO = parted_convolution(x_BTC, items_BT, kernel_KIO, self.dilation, padding, PRECISION)
      return (y_BSO + self.bias[...]).astype(self.dtype)
    if self.weight_g is None:
      y_BSO = steady_convolution(x_BTC, kernel_KIO, self.stride, self.dilation, padding, PRECISION)
      return (y_BSO + self.bias[...]).astype(self.dtype)
    y_BSO = jax.lax.conv_general_dilated(
        x_BTC, kernel_KIO, (self.stride,), [padding], rhs_dilation=(self.dilation,),
        dimension_numbers=('NWC', 'WIO', 'NWC'), precision=PRECISION)
    return (y_BSO + self.bias[...]).astype(self.dtype)  # the bias' gradient is summed in float32


class Upsample1d(nnx.Module):
  """Weight-normalised transposed convolution with kernel 2 * rate.

  Non-causal: ceil(rate / 2) steps are trimmed on both sides, so an odd rate comes out one step short (the release's
  arithmetic). Causal: rate steps are trimmed on the right.
  """

  gain_axis = 1

  def __init__(self, in_channels: int, out_channels: int, rate: int, *, rngs: nnx.Rngs, causal: bool = False,
               dtype: DType = jnp.float32):
    # PyTorch reads a transposed kernel's fan in off its second axis, the output channels.
    v_KIO = _uniform(rngs.params(), (2 * rate, in_channels, out_channels), out_channels * 2 * rate)
    self.weight_v = nnx.Param(v_KIO)
    self.weight_g = nnx.Param(jnp.sqrt(jnp.sum(jnp.square(v_KIO), axis=(0, 2))))
    self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
    self.rate, self.causal, self.dtype = rate, causal, dtype

  @property
  def trimmed(self) -> tuple[int, int]:
    """Steps that are cut off at the start and at the end."""
    return (0, self.rate) if self.causal else (-(-self.rate // 2),) * 2

  def after(self, inside: Inside | None) -> Inside | None:
    return None if inside is None else inside.upsampled(self.rate, sum(self.trimmed))

  def __call__(self, x_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B S O']:
    kernel = _kernel(self).astype(self.dtype)
    x_BTC, (start, stop) = masked(x_BTC, inside).astype(self.dtype), self.trimmed
    if past is not None:  # the step before, in whose place nothing new comes
      x_BTC, start = past.before(x_BTC, 1), start + self.rate
    y_BSO = (steady_upsampling if self.weight_g is None else transposed_convolution)(x_BTC, kernel, self.rate)
    return (y_BSO[:, start : y_BSO.shape[1] - stop] + self.bias[...]).astype(self.dtype)


def transposed_convolution(x_BTC: Array, kernel_KIO: Array, rate: int) -> Array:
  """Untrimmed transposed convolution with K = 2 * rate taps: [B, T, C] -> [B, (T + 1) * rate, O].

  One function, two formulations, chosen when the computation is lowered (`benchmarks/convolutions.py`): XLA's CPU
  compiler takes 300-600 ms for the weight gradient of an input-dilated convolution where matrix products take 4-28;
  its TPU compiler moves half to a third of the bytes with the input-dilated form.
  """
  return jax.lax.platform_dependent(
      x_BTC, kernel_KIO, cpu=lambda x, k: _upsample_by_products(x, k, rate),
      default=lambda x, k: _upsample_by_dilation(x, k, rate))


def _upsample_by_products(x_BTC: Array, kernel_KIO: Array, rate: int) -> Array:
  kernel = jnp.concatenate([kernel_KIO[:rate], kernel_KIO[rate:]], axis=1)  # [rate, 2 C, O]
  y = jnp.einsum('btc,jco->btjo', _pairs(x_BTC), kernel, precision=PRECISION)
  return y.reshape(x_BTC.shape[0], (x_BTC.shape[1] + 1) * rate, kernel_KIO.shape[-1])


def _pairs(x_BTC: Array) -> Array:
  """[B, T + 1, 2 C]: output step t * rate + j is x[t] @ kernel[j] + x[t - 1] @ kernel[rate + j], one product with both
  rows side by side."""
  return jnp.concatenate([jnp.pad(x_BTC, ((0, 0), (0, 1), (0, 0))), jnp.pad(x_BTC, ((0, 0), (1, 0), (0, 0)))], axis=-1)


def _upsample_by_dilation(x_BTC: Array, kernel_KIO: Array, rate: int) -> Array:
  edge = 2 * rate - 1
  return jax.lax.conv_general_dilated(
      x_BTC, kernel_KIO[::-1], (1,), [(edge, edge)], lhs_dilation=(rate,),
      dimension_numbers=('NWC', 'WIO', 'NWC'), precision=PRECISION)


def steady_upsampling(x_BTC: Array, kernel: Array, rate: int) -> Array:
  """`transposed_convolution` with its kernel laid out as the product wants it, by `upsampling_kernel`: laying it out at
  every call would take longer than the product where there are few steps."""

  def by_products(x: Array, kernel: Array) -> Array:
    return steady_product(_pairs(x), kernel, PRECISION).reshape(x.shape[0], (x.shape[1] + 1) * rate, -1)

  def by_dilation(x: Array, kernel: Array) -> Array:
    halves = kernel.reshape(2, x.shape[2], rate, -1)
    return _upsample_by_dilation(x, halves.transpose(0, 2, 1, 3).reshape(2 * rate, x.shape[2], -1), rate)

  return jax.lax.platform_dependent(x_BTC, kernel, cpu=by_products, default=by_dilation)


def upsampling_kernel(kernel_KIO: Any, rate: int) -> Any:
  """[2 * rate, I, O] -> [2 I, rate * O]."""
  _, channels, outputs = kernel_KIO.shape
  return kernel_KIO.reshape(2, rate, channels, outputs).transpose(0, 2, 1, 3).reshape(2 * channels, rate * outputs)


class ResidualUnit(nnx.Module):
  """snake, convolution with 7 dilated taps, snake, pointwise convolution, plus the input."""

  def __init__(self, channels: int, dilation: int, *, rngs: nnx.Rngs, causal: bool = False,
               dtype: DType = jnp.float32):
    self.snake_in = Snake(channels)
    self.conv_in = Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation, causal=causal, dtype=dtype,
                          rngs=rngs)
    self.snake_out = Snake(channels)
    self.conv_out = Conv1d(channels, channels, 1, causal=causal, dtype=dtype, rngs=rngs)

  def __call__(self, x_BTC: Float[Array, 'B T C'], inside: Inside | None = None,
               past: Past | None = None) -> Float[Array, 'B T C']:
    return x_BTC + self.conv_out(self.snake_out(self.conv_in(self.snake_in(x_BTC), inside, past)))


def fit_length(x_BN: Float[Array, 'B M'], num_samples: int) -> Float[Array, 'B N']:
  """Cuts the end, or pads it with zeros: odd rates make a decoder come out a few samples short."""
  missing = num_samples - x_BN.shape[1]
  return jnp.pad(x_BN, ((0, 0), (0, missing))) if missing > 0 else x_BN[:, :num_samples]


def recomputed(module: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
  """`module`, of whose forward pass only the inputs are kept for the backward pass if `wanted`."""
  return jax.checkpoint(lambda *inputs: module(*inputs)) if wanted else module
