"""Random numbers as a function of what they are for: no generator's state, so none to save, send or repeat."""

from __future__ import annotations

import hashlib


def draw(*values: int | str) -> int:
  """64 bits from `values`, the same on every machine and for every version of NumPy."""
  return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), 'little')


class Draws:
  """Numbers that are a function of (seed, index, name, how many were drawn before), the same on every machine."""

  def __init__(self, seed: int, index: int, name: str = ''):
    self._key, self._count = (seed, index, name), 0

  def of(self, name: str) -> Draws:
    """The draws of a transform, whatever others have drawn."""
    seed, index, parent = self._key
    return Draws(seed, index, f'{parent}/{name}')

  def bits(self) -> int:
    """64 of them."""
    self._count += 1
    return draw(*self._key, self._count)

  def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
    """In [low, high)."""
    return low + (high - low) * (self.bits() >> 11) * 2.0 ** -53

  def below(self, stop: int) -> int:
    """A whole number in [0, stop)."""
    return self.bits() % stop
