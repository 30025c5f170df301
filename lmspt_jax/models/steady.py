"""Convolutions whose every sum has the same order, whatever the number of threads and of steps.

XLA's CPU compiler hands a convolution to Eigen, which cuts long sums into pieces: their size differs between one thread
and several, and where the output is small the threads share a sum. So the last bits depend on the number of cores, and
on the number of devices, as JAX starts at least a thread for each; a code then flips where two are nearly as good.
Matrix products go another way and do not have this, nor have convolutions with short sums (docs/same_tokens.md).

A matrix product's sums are cut too, into blocks of up to 512 products: the fewer rows there are, the smaller the
blocks, and a single row is summed in one go. What a step becomes would depend on how many steps come with it, so a
product that has too few rows for the largest blocks gets rows of zeros.

Axes: B batch, T steps, S steps out, K kernel taps, C and I channels in, O channels out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

_SUM = 128  # products in one sum of a convolution; Eigen sums so many in one go wherever a core has 32 KiB of L1
SLICED = 96  # most channels whose convolution is cut into ones with short sums: faster than a product up to there
_NARROW = 8  # fewer output channels than this: threads would share sums
_ROWS = 64  # from so many rows on, a product's sums are cut as with any number of them
_LONG, _WHOLE = 1024, 64  # long sums for a multiple of so many outputs are cut so from two rows on


def steady_product(x_BTC: Array, kernel_CO: Array, precision: jax.lax.Precision) -> Array:
  """[B, T, C] and [C, O] -> [B, T, O]."""
  plain = lambda x, kernel: jnp.einsum('btc,co->bto', x, kernel, precision=precision)
  return jax.lax.platform_dependent(x_BTC, kernel_CO, cpu=lambda x, kernel: _product_on_cpu(x, kernel, precision),
                                    default=plain)


def _product_on_cpu(x_BTC: Array, kernel_CO: Array, precision: jax.lax.Precision) -> Array:
  (batch, steps, channels), outputs = x_BTC.shape, kernel_CO.shape[1]
  rows = 2 if channels >= _LONG and outputs % _WHOLE == 0 else _ROWS
  missing = jax.core.max_dim(0, -(-rows // batch) - steps)  # of an exported graph, sizes are symbols
  x_BTC = jnp.pad(x_BTC, ((0, 0), (0, missing), (0, 0)))
  return jnp.einsum('btc,co->bto', x_BTC, kernel_CO, precision=precision)[:, :steps]


def steady_convolution(x_BTC: Array, kernel_KIO: Array, stride: int, dilation: int, padding: tuple[int, int],
                       precision: jax.lax.Precision) -> Array:
  """[B, T, C] -> [B, S, O]; `padding` are steps of zeros on the left and on the right.

  It differs from `jax.lax.conv_general_dilated` by rounding, and on CPU alone. Some of its forms are slower.
  """

  def convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride,), [padding], rhs_dilation=(dilation,),
                                        dimension_numbers=('NWC', 'WIO', 'NWC'), precision=precision)

  def on_cpu(x: Array, kernel: Array) -> Array:
    taps, channels, outputs = kernel.shape
    if outputs >= _NARROW and stride == 1 and channels <= SLICED:
      width = max(1, _SUM // taps)
      parts = [slice(start, start + width) for start in range(0, channels, width)]
      return sum((convolution(x[..., part], kernel[:, part]) for part in parts[1:]),
                 convolution(x[..., parts[0]], kernel[:, parts[0]]))
    seen = _seen(x.shape[1], taps, stride, dilation, padding)
    x = jnp.pad(x, ((0, 0), padding, (0, 0)))
    if outputs < _NARROW:  # every tap's products of every step, then the sum over taps
      y = _product_on_cpu(x, kernel.transpose(1, 0, 2).reshape(channels, taps * outputs), precision)
      return sum(y[:, one, tap * outputs:(tap + 1) * outputs] for tap, one in enumerate(seen))
    windows = jnp.concatenate([x[:, one] for one in seen], axis=-1)
    return _product_on_cpu(windows, kernel.reshape(taps * channels, outputs), precision)

  return jax.lax.platform_dependent(x_BTC, kernel_KIO, cpu=on_cpu, default=convolution)


def parted_convolution(x_BTC: Array, items_BT: Array, kernel_KIO: Array, dilation: int, padding: tuple[int, int],
                       precision: jax.lax.Precision) -> Array:
  """`steady_convolution` of stride 1 in which a step sees those with its own number in `items_BT`, and zeros else.

  Args:
    padding: that keeps the number of steps; a step's own tap is the one that sees it.
  """
  taps, channels, outputs = kernel_KIO.shape
  seen = _seen(x_BTC.shape[1], taps, 1, dilation, padding)
  x_BTC = jnp.pad(x_BTC, ((0, 0), padding, (0, 0)))
  others_BT = jnp.pad(items_BT, ((0, 0), padding))
  windows = [jnp.where((others_BT[:, one] == items_BT)[..., None], x_BTC[:, one], 0) for one in seen]
  return steady_product(jnp.concatenate(windows, axis=-1), kernel_KIO.reshape(taps * channels, outputs), precision)


def _seen(steps: int, taps: int, stride: int, dilation: int, padding: tuple[int, int]) -> list[slice]:
  """Of a padded array the steps that each tap sees."""
  out = (steps + sum(padding) - (taps - 1) * dilation - 1) // stride + 1
  return [slice(tap * dilation, tap * dilation + (out - 1) * stride + 1, stride) for tap in range(taps)]
