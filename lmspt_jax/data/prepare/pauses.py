"""Where to cut a long recording: in the longest pause of a search window, or at its quietest moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

_FRAMES_PER_SECOND = 100
_NOISE_FLOOR = -6.0  # log10 of the mean square, -60 dBFS: below it, all is a pause
_SILENCE = 1e-12  # mean square, -120 dBFS: keeps the logarithm finite
_MIN_PAUSE = 10  # frames: shorter gaps are stops inside words
_PAUSE_DEPTH = 0.25  # of the way in dB from the noise floor up to speech


def cut_at_pauses(blocks: Iterable[np.ndarray], rate: int, max_samples: int) -> Iterator[np.ndarray]:
  """Cuts a stream into pieces of at most `max_samples`, without losing or changing a sample.

  A recording that is longer is cut in the second half of each `max_samples`; what would leave a last piece shorter than
  a quarter of that is cut near its middle instead. Where the cuts fall does not depend on the size of the blocks.

  Args:
    blocks: float32 [n, channels] each.
    rate: Hz.
    max_samples: at least 4.

  Yields:
    float32 [1..max_samples, channels]; together they are the blocks. At most 1.5 pieces and a block are held.
  """
  ahead = max_samples + max_samples // 2
  held: np.ndarray | None = None
  for block in blocks:
    held = block if held is None else np.concatenate([held, block])
    while len(held) > ahead:
      cut = find_cut(held[:ahead], rate, max_samples // 2, max_samples)
      yield held[:cut]
      held = held[cut:]
  if held is None:
    return
  if len(held) > max_samples:
    low, high = len(held) // 2 - max_samples // 4, len(held) // 2 + max_samples // 4
    cut = find_cut(held, rate, max(low, len(held) - max_samples), min(high, max_samples))
    yield held[:cut]
    held = held[cut:]
  yield held


def find_cut(audio: np.ndarray, rate: int, low: int, high: int) -> int:
  """A sample index in [low, high]: the middle of the longest pause in there, else of the quietest tenth of a second.

  Args:
    audio: float32 [N, channels], the context that says how loud speech and noise are.
    rate: Hz.
    low, high: 0 <= low <= high <= N.
  """
  hop = max(1, rate // _FRAMES_PER_SECOND)
  usable = len(audio) // hop * hop
  power = np.square(audio[:usable], dtype=np.float64).mean(axis=1).reshape(-1, hop).mean(axis=1)
  first, last = -(-low // hop), high // hop
  if last - first < _MIN_PAUSE:
    return high
  levels = np.log10(np.maximum(power, _SILENCE))
  noise, speech = np.percentile(levels, (10, 95))
  noise = max(noise, _NOISE_FLOOR)
  limit = noise + _PAUSE_DEPTH * max(0.0, speech - noise)
  start, length = _longest_run(levels[first:last] < limit)
  if length < _MIN_PAUSE:
    smooth = np.convolve(power[first:last], np.ones(_MIN_PAUSE), mode='valid')
    start, length = int(np.argmin(smooth)), _MIN_PAUSE
  return (first + start) * hop + length * hop // 2


def _longest_run(quiet: np.ndarray) -> tuple[int, int]:
  """(start, length) of the longest run of True, the last of equally long ones; (0, 0) if there is none."""
  edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
  starts, lengths = edges[::2], edges[1::2] - edges[::2]
  if not len(starts):
    return 0, 0
  chosen = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
  return int(starts[chosen]), int(lengths[chosen])
