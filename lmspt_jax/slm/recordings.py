"""The recordings of a source in turn, decoded ahead of their turn by threads."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from lmspt_jax.data.audio_io import MAX_FRAMES, SILENCE, mono_blocks, read_blocks
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import Source

_AHEAD = 4  # recordings a thread
_WHOLE = 1 << 22  # samples: a longer recording is decoded in its turn, block by block


class Recording:
  """One row of a source.

  Attributes:
    row: its position in the source.
    fault: why it can't be used. Of a long recording this may be known only when its samples have been taken.
  """

  def __init__(self, source: Source, row: int, sample_rate: int, least: int):
    """Decodes what is short. `least`: samples at `sample_rate`, fewer are a fault."""
    self.row, self.fault = row, None
    self._name, self._rate, self._least, self._peak, self._count = source.name(row), sample_rate, least, 0.0, 0
    self._blocks: Iterable[np.ndarray] = ()
    self._open = ExitStack()
    try:
      file = self._open.enter_context(source[row].open())
      blocks = mono_blocks(read_blocks(file, 0, MAX_FRAMES, name=self._name), file.samplerate, sample_rate)
      blocks, short = self._checked(blocks), file.frames * file.channels <= _WHOLE
      # Of a long one as much as gives a sample: the encoder is to have one.
      head = list(blocks) if short else [next(block for block in blocks if len(block))]
      self._blocks = itertools.chain(head, blocks)
      if short:
        self._open.close()
    except AudioError as error:
      self._fail(error)

  def take(self) -> Iterator[np.ndarray]:
    """Its samples in blocks [n], mono; of a recording with a fault, those before it."""
    with self._open:
      try:
        yield from self._blocks
      except AudioError as error:
        self._fail(error)
    self._blocks = ()

  def _checked(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for block_N in blocks:
      if len(block_N):
        self._peak = max(self._peak, float(np.abs(block_N).max()))
        self._count += len(block_N)
      yield block_N
    if self._count < self._least:
      raise AudioError(f'{self._name}: {self._count} samples at {self._rate} Hz, fewer than {self._least}; remove it',
                       'empty')
    if self._peak < SILENCE:
      raise AudioError(f'{self._name}: silent (peak below {SILENCE}); remove it', 'silent')

  def _fail(self, error: AudioError) -> None:
    self._open.close()
    if error.reason == 'unreachable':  # no fault of the recording: what is stored must not depend on the network
      raise error
    self.fault = error


def recordings(source: Source, rows: Iterable[int], sample_rate: int, least: int = 1) -> Iterator[Recording]:
  """The rows of a source in the order given.

  Raises AudioError where a store can't be reached.
  """
  rows, threads = iter(rows), max(2, min(16, os.cpu_count() or 1))
  waiting: collections.deque[Future[Recording]] = collections.deque()
  pool = ThreadPoolExecutor(threads, thread_name_prefix='lmspt-decode')
  try:
    while True:
      for row in itertools.islice(rows, threads * _AHEAD - len(waiting)):
        waiting.append(pool.submit(Recording, source, row, sample_rate, least))
      if not waiting:
        return
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
