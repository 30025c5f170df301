"""Band-limited resampling between rational rates in jnp: differentiable, used inside the train step.

A windowed-sinc low-pass (Hann window over `zeros` zero crossings a side, cut-off `rolloff` of the
lower Nyquist frequency) evaluated at the output's instants. An output block of some hundred samples depends on two
input blocks, so the whole filter is one matrix product per block: fast forward and backward on CPU and TPU alike,
where a one-channel strided convolution is slow on both.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmspt_jax.errors import LmsptError

_MAX_ENTRIES = 1 << 24  # of the filter matrix: 64 MiB; only rates without a common factor come near


def resample(x_BN: Array, from_rate: int, to_rate: int, zeros: int = 24, rolloff: float = 0.945) -> Array:
  """Resamples float32 [B, N] at from_rate to [B, ceil(N * to_rate / from_rate)] at to_rate.

  Output sample n lies at the instant n / to_rate; the signal is zero outside. Raises LmsptError for rates that are
  not positive or share no useful factor.
  """
  if from_rate == to_rate:
    return x_BN
  matrix, width = _filter_matrix(from_rate, to_rate, zeros, rolloff)
  block = matrix.shape[0] // 2
  batch, length = x_BN.shape
  out_length = -(-length * to_rate // from_rate)
  count = -(-out_length // matrix.shape[1])
  x_BN = jnp.asarray(x_BN, jnp.float32)
  x_BN = jnp.pad(x_BN, ((0, 0), (width, max(0, (count + 1) * block - length - width))))[:, : (count + 1) * block]
  blocks = x_BN.reshape(batch, count + 1, block)
  pairs = jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=-1)
  out = jnp.matmul(pairs, matrix, precision=jax.lax.Precision.HIGHEST)
  return out.reshape(batch, -1)[:, :out_length]


@functools.lru_cache(maxsize=16)
def _filter_matrix(from_rate: int, to_rate: int, zeros: int, rolloff: float) -> tuple[np.ndarray, int]:
  """Filter as float32 [two input blocks, one output block], and the samples by which the input is shifted."""
  if from_rate <= 0 or to_rate <= 0:
    raise LmsptError(f'sample rates {from_rate} and {to_rate} Hz: use positive ones')
  factor = math.gcd(from_rate, to_rate)
  down, up = from_rate // factor, to_rate // factor  # `down` input samples last as long as `up` output samples
  cutoff = min(1.0, up / down) * rolloff  # as a share of the input's Nyquist frequency
  width = math.ceil(zeros / cutoff)  # the filter's half length in input samples
  repeats = -(-2 * width // down)  # so that a block and the filter's overhang fit in two blocks
  block_in, block_out = repeats * down, repeats * up
  if 2 * block_in * block_out > _MAX_ENTRIES:
    raise LmsptError(
      f'sample rates {from_rate} and {to_rate} Hz share only the factor {factor}: resample the files beforehand'
    )
  instants = np.arange(block_out) * down / up + width
  distance = (np.arange(2 * block_in)[:, None] - instants) * cutoff  # in zero crossings
  window = np.where(np.abs(distance) < zeros, np.cos(np.pi * distance / (2 * zeros)) ** 2, 0.0)
  matrix = np.sinc(distance) * window
  matrix /= matrix.sum(axis=0)  # a constant stays what it is at every phase
  return matrix.astype(np.float32), width
