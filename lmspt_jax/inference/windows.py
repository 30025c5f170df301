"""One way to evaluate the tokenizer's networks, whatever is asked: fixed windows at fixed places, one program a size.

An item of up to L frames, L the largest size, is one window. Where it is longer, windows of L follow each other every
L - left - right frames from its first one on, so that each of its frames is in a window with all frames that it depends
on (`models/reach.py`); the last window has what is left. So what the windows of an item are depends on the item alone:
not on what else is encoded, nor on how its frames come in.

A program has rows of one size. A row holds a window, or several that together fill it better, with gaps between them:
every layer reads zeros outside of the item that a step is of (`models/inside.py`), and sums in the same order wherever
it is, so what becomes of a window depends on the window alone. Several devices each run that same program.

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

from lmspt_jax.models.inside import Inside
from lmspt_jax.models.reach import Reach

SMALLEST = 16  # frames
SHARE = 4  # the largest window is at least so many times as long as what it only sees
LEAST_LARGEST = 256  # frames
AHEAD = 4  # rows


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
    frames_TW: what is there.
    position: of its first frame in the item.
    core: (first, last + 1) of its frames whose results are the item's.
  """

  item: int
  frames_TW: np.ndarray
  position: int
  core: tuple[int, int]

  def __len__(self) -> int:
    return len(self.frames_TW)


def cut(item: int, blocks: Iterable[np.ndarray], largest: int, reach: Reach) -> Iterator[Window]:
  """The windows of one item in order, as soon as they are known.

  Args:
    blocks: its frames [n, W], in blocks of any lengths; at least one frame in all.
  """
  step, first = largest - sum(reach), 0
  waiting, count, position = [], 0, 0  # blocks, their frames, and where in the item these begin
  for block in blocks:
    waiting.append(block)
    count += len(block)
    if count <= largest:
      continue
    frames_TW, start = np.concatenate(waiting), 0
    while count - start > largest:  # more follows: its end is not in this window
      yield Window(item, frames_TW[start:start + largest], position + start, (first, largest - reach.right))
      first, start = reach.left, start + step
    waiting, count, position = [frames_TW[start:]], count - start, position + start
  yield Window(item, np.concatenate(waiting), position, (first, count))


def filled_rows(windows: Iterable[Window], sizes: Sequence[int], gap: int) -> Iterator[tuple[int, list[Window]]]:
  """Rows of windows: (the smallest size that holds them, those that are in it, in order).

  What does not fill a row waits for others, AHEAD rows of it at most; a single item's windows come in order.
  """
  largest = sizes[-1]
  size = lambda frames: next(size for size in sizes if size >= frames)
  waiting: list[Window] = []

  def fullest() -> Iterator[tuple[int, list[Window]]]:
    """The one that has waited longest, and each time the longest that still has room."""
    row = [waiting.pop(0)]
    room = largest - len(row[0]) - gap
    while fitting := [number for number, window in enumerate(waiting) if len(window) <= room]:
      row.append(waiting.pop(max(fitting, key=lambda number: len(waiting[number]))))
      room -= len(row[-1]) + gap
    together = size(largest - room - gap)
    if together > sum(size(len(window)) for window in row):  # too few are left
      yield from ((size(len(window)), [window]) for window in row)
    else:
      yield together, row

  for window in windows:
    if len(window) == largest:
      yield largest, [window]
      continue
    waiting.append(window)
    while sum(len(window) + gap for window in waiting) > AHEAD * largest:
      yield from fullest()
  while waiting:
    yield from fullest()


class WindowedProgram:
  """A network from frames to frames, evaluated window by window."""

  def __init__(self, function: Callable[[Any, jax.Array, Inside], jax.Array], weights: Callable[[jax.Device], Any],
               reach: Reach, gap: int, *, rows: int, streams: int, devices: Sequence[jax.Device]):
    """
    Args:
      function: (weights, frames_BTW, which of them are of which item) -> frames_BTV.
      weights: its arrays on a device.
      reach: of the function.
      gap: frames between the items of a row.
      rows: of a program, of the largest size; smaller sizes have more, for about as much work at a call.
      streams: calls that are under way at a time, on all devices.
      devices: that windows are spread over.
    """
    self.reach, self.gap, self.sizes = reach, gap, window_sizes(reach)
    self._rows, self._streams, self._devices, self._weights = rows, streams, list(devices), weights
    self._function = jax.jit(function)
    self._compiled: set[tuple[int, jax.Device]] = set()

  def rows(self, size: int) -> int:
    """Of the program of this size."""
    return 1 if self._rows == 1 else self._rows * self.sizes[-1] // size

  def __call__(self, items: Iterable[Iterable[np.ndarray]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Evaluates items, each given as its frames [n, W] in blocks of any lengths.

    Yields (number of the item, position of the first frame, frames [n, V]); a single item's in order. No more is held
    than a few windows of each size.
    """
    windows = (window for number, blocks in enumerate(items)
               for window in cut(number, blocks, self.sizes[-1], self.reach))
    calls = self._calls(filled_rows(windows, self.sizes, self.gap))
    running: collections.deque[Future[list[tuple[int, int, np.ndarray]]]] = collections.deque()
    with ThreadPoolExecutor(self._streams, thread_name_prefix='lmspt-windows') as pool:
      for turn, (size, filled) in enumerate(calls):
        if len(running) == self._streams + 1:  # one is waiting while the others are worked on
          yield from running.popleft().result()
        device = self._devices[turn % len(self._devices)]
        running.append(pool.submit(self._evaluate, size, filled, device))
        if (size, device) not in self._compiled:  # once, not in each thread
          running[-1].result()
          self._compiled.add((size, device))
      while running:
        yield from running.popleft().result()

  def _calls(self, filled: Iterable[tuple[int, list[Window]]]) -> Iterator[tuple[int, list[list[Window]]]]:
    """Rows of one size, as many as its program has. In the end what is left, large ones first: the smallest has the
    last window of its item."""
    waiting: dict[int, list[list[Window]]] = {size: [] for size in self.sizes}
    for size, row in filled:
      waiting[size].append(row)
      if len(waiting[size]) == self.rows(size):
        yield size, waiting[size]
        waiting[size] = []
    for size in reversed(self.sizes):
      if waiting[size]:
        yield size, waiting[size]

  def _evaluate(self, size: int, filled: list[list[Window]],
                device: jax.Device) -> list[tuple[int, int, np.ndarray]]:
    """One call of the program."""
    like_TW = filled[0][0].frames_TW
    frames_BTW = np.zeros((self.rows(size), size, like_TW.shape[1]), like_TW.dtype)
    items_BT = np.zeros(frames_BTW.shape[:2], np.int32)
    places: list[tuple[Window, int, int]] = []  # with row and first frame
    for row, windows in enumerate(filled):
      first = 0
      for number, window in enumerate(windows, 1):
        frames_BTW[row, first:first + len(window)] = window.frames_TW
        items_BT[row, first:first + len(window)] = number
        places.append((window, row, first))
        first += len(window) + self.gap
    frames_BTW, items_BT = jax.device_put((frames_BTW, items_BT), device)
    frames_BTV = np.asarray(self._function(self._weights(device), frames_BTW, Inside(items_BT, self.gap)))
    return [(window.item, window.position + window.core[0],
             frames_BTV[row, first + window.core[0]:first + window.core[1]]) for window, row, first in places]
