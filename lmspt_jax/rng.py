"""Random streams by name and step, so that no generator state lives in modules or checkpoints."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import Array


def stream(seed: int, name: str, step: int | Array = 0) -> Array:
  """The key of stream `name` at `step`: a pure function of its arguments, the same on every host."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)
