"""Raw samples and raw codes from standard input to standard output, as soon as they are there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np

from lmspt_jax.errors import LmsptError

_MOST = 1 << 12  # bytes at a time: about a frame, so that one is written before the next is read
HELP = 'from standard input to standard output, as it comes (causal models; docs/streaming.md)'


class ReaderGone(Exception):
  """Nobody reads standard output any more."""


def read(dtype: str, width: int, thing: str) -> Iterator[np.ndarray]:
  """What standard input holds, [n, width] at a time, each time as much as is there.

  Args:
    dtype: as numpy writes it, with its byte order.
    width: numbers of a unit.
    thing: what errors call a unit.

  Raises:
    LmsptError: it ends in the middle of a unit; raised after all whole ones.
  """
  size, rest = np.dtype(dtype).itemsize * width, b''
  while data := sys.stdin.buffer.read1(_MOST):
    rest += data
    whole = len(rest) // size * size
    if whole:
      yield np.frombuffer(rest[:whole], dtype).reshape(-1, width)
      rest = rest[whole:]
  if rest:
    raise LmsptError(f'standard input: ends in the middle of a {thing}, {len(rest)} bytes after the last whole one '
                     f'(of {size}); what came before was written')


def write(data: bytes) -> None:
  """Raises ReaderGone, after which nothing is written at exit either."""
  try:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
  except BrokenPipeError as error:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    raise ReaderGone from error
