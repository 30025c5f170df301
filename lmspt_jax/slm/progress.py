"""How far a corpus is: hours done of all where the source knows durations, else utterances."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lmspt_jax.data.sources import Source
from lmspt_jax.slm.plan import Shard


class Progress:
  """A bar on stderr with the time left. What an earlier run has done is taken as the beginning."""

  def __init__(self, source: Source, shards: list[Shard], *, show: bool):
    seconds = source.index.numbers('seconds')
    self._known = bool(np.isfinite(seconds).all())
    # Whole milliseconds: their sum is exact.
    self._amounts = np.rint(1000 * seconds).astype(np.int64) if self._known else np.ones(len(seconds), np.int64)
    self._left_out, self._done, self._start = 0, 0, time.monotonic()
    self._bar: Any = None
    if show:
      from tqdm import tqdm
      shape, unit = ('{n:.2f}/{total:.2f} h', 1 / 3.6e6) if self._known else ('{n:.0f}/{total:.0f} utterances', False)
      self._bar = tqdm(total=sum(self._sum(shard.bounds[0], shard.bounds[-1]) for shard in shards), desc='tokenize',
                       unit_scale=unit, dynamic_ncols=True, bar_format=(
                           '{desc}: {percentage:3.0f}%|{bar}| ' + shape + ' [{elapsed}<{remaining}{postfix}]'))

  def _sum(self, start: int, stop: int) -> int:
    return int(self._amounts[start:stop].sum())

  def skip(self, start: int, stop: int) -> None:
    """Rows that are there already."""
    if self._bar is not None:
      self._bar.initial += self._sum(start, stop)
      self._bar.update(self._sum(start, stop))

  def add(self, row: int, fault: bool) -> None:
    """A row that has been dealt with."""
    if self._bar is None:
      return
    self._left_out += fault
    self._done += int(self._amounts[row])
    speed = f'{self._done / 1000 / (time.monotonic() - self._start):.0f} x real time, ' if self._known else ''
    self._bar.set_postfix_str(f'{speed}{self._left_out} left out', refresh=False)
    self._bar.update(int(self._amounts[row]))

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.close()
