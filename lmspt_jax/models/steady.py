"""Convolutions whose every sum has the same order, whatever the number of threads.

XLA's CPU compiler hands a convolution to Eigen, which cuts long sums into pieces: their size differs between one thread
and several, and where the output is small the threads share a sum. So the last bits depend on the number of cores, and
on the number of devices, as JAX starts at least a thread for each; a code then flips where two are nearly as good.
Matrix products go another way and do not have this, nor have convolutions with short sums (docs/same_tokens.md).

Axes: B batch, T steps, S steps out, K kernel taps, C and I channels in, O channels out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

_SUM = 128  # products in one sum of a convolution; Eigen sums so many in one go wherever a core has 32 KiB of L1
_SLICED = 96  # most channels whose convolution is cut into ones with short sums: faster than a product up to there
_NARROW = 8  # fewer output channels than this: threads would share sums


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
    if outputs >= _NARROW and stride == 1 and channels <= _SLICED:
      width = max(1, _SUM // taps)
      parts = [slice(start, start + width) for start in range(0, channels, width)]
      return sum((convolution(x[..., part], kernel[:, part]) for part in parts[1:]),
                 convolution(x[..., parts[0]], kernel[:, parts[0]]))
    steps = (x.shape[1] + sum(padding) - (taps - 1) * dilation - 1) // stride + 1
    seen = [slice(tap * dilation, tap * dilation + (steps - 1) * stride + 1, stride) for tap in range(taps)]
    x = jnp.pad(x, ((0, 0), padding, (0, 0)))
    if outputs < _NARROW:  # every tap's products of every step, then the sum over taps
      y = jnp.einsum('btc,kco->btko', x, kernel, precision=precision)
      return sum(y[:, one, tap] for tap, one in enumerate(seen))
    windows = jnp.concatenate([x[:, one] for one in seen], axis=-1)
    return jnp.einsum('bsc,co->bso', windows, kernel.reshape(taps * channels, outputs), precision=precision)

  return jax.lax.platform_dependent(x_BTC, kernel_KIO, cpu=on_cpu, default=convolution)
