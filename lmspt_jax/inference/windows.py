"""One way to evaluate the tokenizer's networks, whatever is asked: fixed windows at fixed places, one program a size.

An item of T frames is one window of the smallest size that holds it. Where it is longer than the largest size L,
windows of L follow each other every L - left - right frames from its first one on, so that each of its frames is in a
window with all frames that it depends on (`models/reach.py`); the last window has the smallest size that holds what is
left. What follows an item's end inside a window is masked in every layer. So the windows of an item, and what is
computed in them, depend on the item alone: not on what else is encoded, nor on how its frames come in. A program has a
fixed number of rows, and rows without a window are empty. Several devices each run that same program.

Axes: B rows of a program, T frames, W values a frame that go in, V values a frame that come out.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmspt_jax.models.reach import Reach

SMALLEST = 16  # frames
SHARE = 4  # the largest window is at least so many times as long as what it only sees
LEAST_LARGEST = 64  # frames


def window_sizes(reach: Reach) -> tuple[int, ...]:
  """Powers of two, ascending. The programs that are compiled when they are first used."""
  sizes = [SMALLEST]
  while sizes[-1] < max(LEAST_LARGEST, SHARE * sum(reach)):
    sizes.append(2 * sizes[-1])
  return tuple(sizes)


@dataclass(frozen=True)
class Window:
  """Part of an item.

  Attributes:
    item: which one.
    frames_TW: what is there, [number of frames <= size, W].
    size: of the program.
    position: of its first frame in the item.
    core: (first, last + 1) of its frames whose results are the item's.
  """

  item: int
  frames_TW: np.ndarray
  size: int
  position: int
  core: tuple[int, int]


def cut(item: int, blocks: Iterable[np.ndarray], sizes: Sequence[int], reach: Reach) -> Iterator[Window]:
  """The windows of one item in order, as soon as they are known.

  Args:
    blocks: its frames [n, W], in blocks of any lengths; at least one frame in all.
  """
  largest, step, first = sizes[-1], sizes[-1] - sum(reach), 0
  waiting, count, position = [], 0, 0  # blocks, their frames, and where in the item these begin
  for block in blocks:
    waiting.append(block)
    count += len(block)
    if count <= largest:
      continue
    frames_TW, start = np.concatenate(waiting), 0
    while count - start > largest:  # more follows: its end is not in this window
      yield Window(item, frames_TW[start:start + largest], largest, position + start, (first, largest - reach.right))
      first, start = reach.left, start + step
    waiting, count, position = [frames_TW[start:]], count - start, position + start
  frames_TW = np.concatenate(waiting)
  yield Window(item, frames_TW, next(size for size in sizes if size >= count), position, (first, count))


class WindowedProgram:
  """A network from frames to frames, evaluated window by window."""

  def __init__(self, function: Callable[[Any, jax.Array, jax.Array], jax.Array],
               weights: Callable[[jax.Device], Any], reach: Reach, *, rows: int, streams: int,
               devices: Sequence[jax.Device]):
    """
    Args:
      function: (weights, frames_BTW, number of frames [B]) -> frames_BTV.
      weights: its arrays on a device.
      reach: of the function.
      rows: of a program, of the largest size; smaller sizes have more, for about as much work at a call.
      streams: calls that are under way at a time, on all devices.
      devices: that windows are spread over.
    """
    self.reach, self.sizes = reach, window_sizes(reach)
    self._rows, self._streams, self._devices, self._weights = rows, streams, list(devices), weights
    self._function = jax.jit(function)
    self._compiled: set[tuple[int, jax.Device]] = set()

  def rows(self, size: int) -> int:
    """Windows in one call of the program of this size."""
    return 1 if self._rows == 1 else self._rows * self.sizes[-1] // size

  def __call__(self, items: Iterable[Iterable[np.ndarray]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Evaluates items, each given as its frames [n, W] in blocks of any lengths.

    Yields (number of the item, position of the first frame, frames [n, V]); a single item's in order. No more is held
    than a few windows of each size.
    """
    calls = self._calls(window for number, blocks in enumerate(items)
                        for window in cut(number, blocks, self.sizes, self.reach))
    running: collections.deque[Future[list[tuple[int, int, np.ndarray]]]] = collections.deque()
    with ThreadPoolExecutor(self._streams, thread_name_prefix='lmspt-windows') as pool:
      for turn, windows in enumerate(calls):
        if len(running) == self._streams + 1:  # one is waiting while the others are worked on
          yield from running.popleft().result()
        device = self._devices[turn % len(self._devices)]
        running.append(pool.submit(self._evaluate, windows, device))
        if (windows[0].size, device) not in self._compiled:  # once, not in each thread
          running[-1].result()
          self._compiled.add((windows[0].size, device))
      while running:
        yield from running.popleft().result()

  def _calls(self, windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Windows of one size, as many as a program has rows. In the end what is left, large ones first: the smallest is
    the last of its item."""
    waiting: dict[int, list[Window]] = {size: [] for size in self.sizes}
    for window in windows:
      group = waiting[window.size]
      group.append(window)
      if len(group) == self.rows(window.size):
        yield group
        waiting[window.size] = []
    for size in reversed(self.sizes):
      if waiting[size]:
        yield waiting[size]

  def _evaluate(self, windows: list[Window], device: jax.Device) -> list[tuple[int, int, np.ndarray]]:
    """One call of the program."""
    size = windows[0].size
    frames_BTW = np.zeros((self.rows(size), size, windows[0].frames_TW.shape[1]), windows[0].frames_TW.dtype)
    lengths_B = np.zeros(len(frames_BTW), np.int32)
    for row, window in enumerate(windows):
      lengths_B[row] = len(window.frames_TW)
      frames_BTW[row, :lengths_B[row]] = window.frames_TW
    frames_BTV = np.asarray(self._function(self._weights(device), *jax.device_put((frames_BTW, lengths_B), device)))
    return [(window.item, window.position + window.core[0], frames_BTV[row, slice(*window.core)])
            for row, window in enumerate(windows)]
