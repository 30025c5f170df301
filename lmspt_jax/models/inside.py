"""Where in an array recordings are that do not fill it: one that ends before the array does, or several of them.

Several are parted by gaps. A layer reads zeros outside of the recording that a step is of, as it does past the ends of
an array, so that a recording's steps depend neither on what is around it nor on where it is. What a layer makes of the
steps in the gaps is arbitrary.

Axes: B batch, T frames, S steps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Inside:
  """Which frames of an array are of which recording, and how a layer's steps lie on them.

  Attributes:
    items_BT: int32, the number of the recording in its row, from 1; 0 is none. The same number only side by side.
    gap: frames between two recordings, at least; at least 1. Layers that see no farther need not tell them apart.
    steps: of the array, a frame.
    short: steps that are missing at each recording's end, as odd rates leave some out.
  """

  items_BT: Int[Array, 'B T']
  gap: int = struct.field(pytree_node=False)
  steps: int = struct.field(pytree_node=False, default=1)
  short: int = struct.field(pytree_node=False, default=0)

  def upsampled(self, rate: int, trimmed: int) -> Inside:
    """After a transposed convolution of `2 * rate` taps that so many steps are trimmed off."""
    return dataclasses.replace(self, steps=self.steps * rate, short=self.short * rate + trimmed - rate)

  def downsampled(self, stride: int) -> Inside:
    return dataclasses.replace(self, steps=self.steps // stride)

  def parts(self, reach: int) -> bool:
    """Whether gaps are as wide as a layer sees to either side, in steps."""
    return self.gap * self.steps + self.short >= reach

  def items(self, num_steps: int) -> Int[Array, 'B S']:
    """`items_BT` by step."""
    items_BS = jnp.repeat(self.items_BT, self.steps, axis=1)
    if self.short:
      later_BS = jnp.pad(items_BS[:, self.short:], ((0, 0), (0, self.short)))
      items_BS = jnp.where(items_BS == later_BS, items_BS, 0)
    return items_BS[:, :num_steps]

  def mask(self, num_steps: int) -> Bool[Array, 'B S']:
    """True inside of recordings."""
    return self.items(num_steps) > 0
