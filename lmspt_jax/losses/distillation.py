"""Distance between a frozen teacher's features of two recordings."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def feature_distance(a_BTD: Float[Array, 'B T D'], b_BTD: Float[Array, 'B T D'], kind: str = 'mse',
                     weight_BT: Float[Array, 'B T'] | None = None) -> Float[Array, '']:
  """Mean squared ('mse') or absolute ('l1') difference as a float32 scalar.

  `weight_BT` weights frames (0 for padding): the mean is over weighted frames of the whole batch, and 0 if no frame
  has weight. None weights all alike. Gradients flow into both arguments: stop the original's before.
  Raises ValueError for another kind.
  """
  difference_BTD = a_BTD.astype(jnp.float32) - b_BTD.astype(jnp.float32)
  if kind == 'mse':
    frames_BT = jnp.mean(jnp.square(difference_BTD), axis=-1)
  elif kind == 'l1':
    frames_BT = jnp.mean(jnp.abs(difference_BTD), axis=-1)
  else:
    raise ValueError(f"unknown distance {kind!r}: use 'mse' or 'l1'")
  if weight_BT is None:
    return jnp.mean(frames_BT)
  total = jnp.sum(weight_BT)
  return jnp.sum(weight_BT * frames_BT) / jnp.where(total > 0, total, 1.0)
