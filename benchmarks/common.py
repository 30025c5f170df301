"""What the paired benchmarks share: real speech, the PyTorch references, and timing by turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'parity')]


def speech(count: int, seconds: float, sample_rate: int) -> np.ndarray:
  """Bundled recordings joined end to end and cut into `count` rows: float32 [count, seconds * sample_rate]."""
  from lmspt_jax.data.audio_io import load_mono
  folder = ROOT / 'lmspt_jax' / 'assets' / 'speech_sample'
  rows = [json.loads(line) for line in (folder / 'manifest.jsonl').read_text().splitlines()]
  needed, parts = round(count * seconds * sample_rate), []
  while sum(map(len, parts)) < needed:
    parts.append(load_mono(folder / rows[len(parts) % len(rows)]['path'], sample_rate))
  return np.concatenate(parts)[:needed].reshape(count, -1)


def by_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each round; the contestants take turns, so that a busy machine slows all alike."""
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for turn in range(rounds + 1):
    for name, run in contestants.items():
      start = time.perf_counter()
      run()
      if turn:  # the first turn compiles and warms up
        seconds[name].append(time.perf_counter() - start)
  return seconds


def report(title: str, seconds: dict[str, list[float]], audio_seconds: float, ours: str, theirs: str) -> None:
  """Medians, and the ratio theirs / ours round by round (above 1: ours is faster)."""
  ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
  print(title)
  for name, values in seconds.items():
    median = float(np.median(values))
    print(f'  {name:<10} median {median:8.3f} s   {audio_seconds / median:7.2f} audio seconds a second')
  print(f'  {theirs} / {ours}: median {np.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f} '
        f'({len(ratios)} rounds)', flush=True)
