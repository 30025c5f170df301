"""What can happen to the bytes of any file, and the numbers that readers get wrong."""

from __future__ import annotations

import random

BOUNDARIES = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, -1,
              -2**31, -2**63)


def damage(data: bytes, rng: random.Random, other: bytes) -> bytes:
  """One of the ways in which any file can be damaged."""
  return rng.choice(_DAMAGES)(bytearray(data or b'\0'), rng, other)


def _place(data: bytes, rng: random.Random) -> int:
  """A position, more often near the ends, where headers and footers are."""
  reach = rng.choice((16, 64, 512, len(data), len(data)))
  position = rng.randrange(min(len(data), reach))
  return position if rng.random() < 0.6 else len(data) - 1 - position


def _flip(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    data[_place(data, rng)] ^= 1 << rng.randrange(8)
  return bytes(data)


def _overwrite(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  start, size = _place(data, rng), rng.choice((1, 2, 4, 16, 256))
  data[start:start + size] = rng.choice((bytes(size), b'\xff' * size, rng.randbytes(size)))
  return bytes(data)


def _truncate(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  return bytes(data[:_place(data, rng)])


def _insert(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  start = _place(data, rng)
  data[start:start] = rng.choice((rng.randbytes(rng.choice((1, 7, 300))), bytes(1 << 16), b'\n', b'\0'))
  return bytes(data)


def _duplicate(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  start, size = _place(data, rng), rng.choice((1, 8, 64, 1024, 1 << 16))
  data[start:start] = data[start:start + size] * rng.choice((1, 1, 16))
  return bytes(data)


def _delete(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  start = _place(data, rng)
  del data[start:start + rng.choice((1, 8, 64, 1024))]
  return bytes(data)


def _splice(data: bytearray, rng: random.Random, other: bytes) -> bytes:
  share = rng.random()
  return bytes(data[:round(share * len(data))]) + other[round((share if rng.random() < 0.7 else rng.random())
                                                              * len(other)):]


def _number(data: bytearray, rng: random.Random, _: bytes) -> bytes:
  width = rng.choice((1, 2, 4, 8))
  start = _place(data, rng) // width * width
  data[start:start + width] = number(rng.choice(BOUNDARIES), width, rng.choice(('little', 'little', 'big')))
  return bytes(data)


def number(value: int, width: int, order: str = 'little') -> bytes:
  """The low bytes of an integer of any size or sign."""
  return (value % (1 << 8 * width)).to_bytes(width, order)


_DAMAGES = (_flip, _overwrite, _truncate, _insert, _duplicate, _delete, _splice, _number)
FLIPS = (_flip, _overwrite, _number, _duplicate, _delete)  # of what keeps most of its bytes in place
