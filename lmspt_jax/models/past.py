"""What the convolutions of a causal network remember of a recording that comes in pieces.

A causal convolution sees steps before each of its own. Before the first step of a recording these are zeros, in every
layer's own input; before the first step of a later piece they are the last steps of the piece before. So a piece costs
what its own steps cost, whatever came before it, and the network is evaluated by the code that evaluates it as a whole.

Axes: B batch, T steps, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


class Past:
  """The steps before a piece, of each convolution in the order in which they are called.

  Lives while a piece is traced: arrays go in as `given`, new ones come out as `kept`, and none is changed.
  """

  def __init__(self, given: Sequence[Array] | None = None):
    """
    Args:
      given: what the piece before kept; None for the first, before which everything is zero.
    """
    self._given = given
    self.kept: list[Array] = []

  def before(self, x_BTC: Float[Array, 'B T C'], steps: int) -> Float[Array, 'B S C']:
    """`x_BTC` with the `steps` before it in front. Of the result the last `steps` are kept."""
    if self._given is None:
      past_BSC = jnp.zeros((x_BTC.shape[0], steps, x_BTC.shape[2]), x_BTC.dtype)
    else:
      past_BSC = self._given[len(self.kept)]
    x_BSC = jnp.concatenate([past_BSC, x_BTC], axis=1)
    self.kept.append(x_BSC[:, x_BSC.shape[1] - steps:])
    return x_BSC
