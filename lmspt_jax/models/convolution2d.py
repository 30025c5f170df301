"""Two-dimensional convolution for the discriminators, channels last, fast to differentiate on CPU and TPU.

Axes: B batch, H rows, W the axis that strides run along (time for the period and scale discriminators, frequency for
the spectrogram ones), C channels in, O channels out; I = C / groups.

What `benchmarks/convolutions.py` measures on XLA:CPU, and what is done about it:

* a kernel of [1, K] striding along W has a weight gradient two to four times faster than the same kernel as [K, 1]
  striding along H (DAC's layout of a folded period): so W is always the strided axis;
* the input gradient of a convolution with stride (1, 2), an input-dilated convolution, takes ten times the forward:
  there it is written as a stride-1 convolution that yields all phases of a stride as channels;
* the input gradient of a [1, K] kernel is a matrix product per tap, up to 1.5 times faster at 1024 channels.

A TPU's compiler wants the plain forms. Both are in `convolution`, chosen when a computation is lowered.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float

_AXES = ('NHWC', 'HWIO', 'NHWC')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution(x_BHWC: Array, kernel_HWIO: Array, stride: int = 1, padding: tuple[int, int] = (0, 0),
                groups: int = 1) -> Array:
  """Convolves [B, H, W, C] with [Hk, Wk, C / groups, O], striding along W only, into [B, H', W', O].

  `padding` zeros are put on both sides of H and of W. H' = H + 2 padding[0] - Hk + 1,
  W' = (W + 2 padding[1] - Wk) // stride + 1. Differentiable once, in reverse mode.
  """
  return plain_convolution(x_BHWC, kernel_HWIO, stride, padding, groups)


def plain_convolution(x_BHWC: Array, kernel_HWIO: Array, stride: int = 1, padding: tuple[int, int] = (0, 0),
                      groups: int = 1) -> Array:
  """`convolution` with the gradients XLA derives itself: the form for a TPU, and what the other is tested against."""
  return lax.conv_general_dilated(
      x_BHWC, kernel_HWIO, (1, stride), [(p, p) for p in padding], dimension_numbers=_AXES, feature_group_count=groups)


def _forward(x_BHWC, kernel_HWIO, stride, padding, groups):
  return plain_convolution(x_BHWC, kernel_HWIO, stride, padding, groups), (x_BHWC, kernel_HWIO)


def _backward(stride, padding, groups, saved, grad_BHWO):
  x_BHWC, kernel_HWIO = saved
  plain = functools.partial(plain_convolution, stride=stride, padding=padding, groups=groups)
  (kernel_grad,) = jax.linear_transpose(lambda k: plain(x_BHWC, k), kernel_HWIO)(grad_BHWO)

  def by_dilation(grad, kernel):
    return jax.linear_transpose(lambda x: plain(x, kernel), x_BHWC)(grad)[0]

  def by_phases(grad, kernel):
    return _input_gradient_by_phases(grad, kernel, x_BHWC.shape, stride, padding)

  # Only the release's empty multi-scale set is grouped; stride-1 kernels with rows are fast as they are.
  if groups > 1 or (stride == 1 and kernel_HWIO.shape[0] > 1):
    return by_dilation(grad_BHWO, kernel_HWIO), kernel_grad
  x_grad = lax.platform_dependent(grad_BHWO, kernel_HWIO, cpu=by_phases, default=by_dilation)
  return x_grad, kernel_grad


convolution.defvjp(_forward, _backward)


def _input_gradient_by_phases(grad_BHWO: Array, kernel_HWIO: Array, x_shape: tuple[int, ...], stride: int,
                              padding: tuple[int, int]) -> Array:
  """Gradient with respect to the input, [B, H, W, C], without dilating the gradient of the output.

  The kernel is padded to whole strides and cut into taps of `stride` columns. Each output column then touches
  `taps` neighbouring groups of `stride` input columns, so a stride-1 convolution gives a group's columns as channels.
  """
  rows, columns, channels, out_channels = kernel_HWIO.shape
  taps = math.ceil(columns / stride)
  kernel_HWIO = jnp.pad(kernel_HWIO, ((0, 0), (0, taps * stride - columns), (0, 0), (0, 0)))
  kernel_HTPO = kernel_HWIO.reshape(rows, taps, stride * channels, out_channels)  # P: phase and input channel
  if rows == 1:
    products = (lax.dot_general(grad_BHWO, kernel_HTPO[0, t], (((3,), (1,)), ((), ()))) for t in range(taps))
    groups_BHWP = sum(jnp.pad(p, ((0, 0), (0, 0), (t, taps - 1 - t), (0, 0))) for t, p in enumerate(products))
  else:
    groups_BHWP = lax.conv_general_dilated(
        grad_BHWO, kernel_HTPO[::-1, ::-1].swapaxes(2, 3), (1, 1), [(rows - 1, rows - 1), (taps - 1, taps - 1)],
        dimension_numbers=_AXES)
  height, width = x_shape[1:3]
  padded = groups_BHWP.reshape(*groups_BHWP.shape[:2], -1, channels)
  x_grad = padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
  # Columns past the last whole stride reach no output.
  return jnp.pad(x_grad, ((0, 0), (0, height - x_grad.shape[1]), (0, width - x_grad.shape[2]), (0, 0)))


class Conv2d(nnx.Module):
  """Weight-normalised `convolution` with bias.

  float32 parameters `weight_v` [Hk, Wk, C / groups, O], `weight_g` [O] and `bias` [O]; the kernel is g * v / |v|, the
  norm over all axes but the output channel (arXiv 1602.07868; torch.nn.utils.weight_norm, dim=0). Kernel and bias
  start as PyTorch's do: uniform within 1 / sqrt(fan in). Zero padding keeps the size of H and, at stride 1, of W.
  `dtype` is that of activations.
  """

  def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], *, rngs: nnx.Rngs,
               stride: int = 1, groups: int = 1, dtype: DType = jnp.float32):
    shape = (*kernel_size, in_channels // groups, out_channels)
    bound = 1 / math.sqrt(math.prod(shape[:3]))
    v_HWIO = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    self.weight_v = nnx.Param(v_HWIO)
    self.weight_g = nnx.Param(_norm(v_HWIO))
    self.bias = nnx.Param(jax.random.uniform(rngs.params(), (out_channels,), jnp.float32, -bound, bound))
    self.stride, self.groups, self.dtype = stride, groups, dtype
    self.padding = (kernel_size[0] // 2, kernel_size[1] // 2)

  def __call__(self, x_BHWC: Float[Array, 'B H W C']) -> Float[Array, 'B H V O']:
    y_BHVO = convolution(x_BHWC.astype(self.dtype), self.kernel(), self.stride, self.padding, self.groups)
    return (y_BHVO + self.bias[...]).astype(self.dtype)  # the bias' gradient is summed in float32

  def kernel(self) -> Float[Array, 'Hk Wk I O']:
    v_HWIO = self.weight_v[...]
    return (v_HWIO * (self.weight_g[...] / _norm(v_HWIO))).astype(self.dtype)

  def output_width(self, width: int) -> int:
    return (width + 2 * self.padding[1] - self.weight_v.shape[1]) // self.stride + 1


def _norm(v_HWIO: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(v_HWIO), axis=(0, 1, 2)))
