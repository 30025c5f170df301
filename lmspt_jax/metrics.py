"""Metrics as (sum, weight) pairs, merged before they are divided, and where they are written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tensorboardX import SummaryWriter

Metrics = dict[str, tuple[Array, Array]]


def mean(value: Array, weight: float | Array = 1.0) -> tuple[Array, Array]:
  """A pair that stands for `value`, measured over `weight` (items, seconds, frames)."""
  weight = jnp.asarray(weight, jnp.float32)
  return value * weight, weight


def merge(a: Mapping[str, tuple], b: Mapping[str, tuple]) -> dict[str, tuple]:
  """Sums of both; a name in one alone is kept."""
  return {k: tuple(x + y for x, y in zip(a.get(k, (0, 0)), b.get(k, (0, 0)), strict=True)) for k in {**a, **b}}


def result(metrics: Mapping[str, tuple]) -> dict[str, float]:
  """Weighted means; NaN where nothing was measured."""
  return {k: float(s) / float(w) if float(w) else math.nan for k, (s, w) in metrics.items()}


def perplexity(counts: np.ndarray) -> float:
  """exp of the entropy of a histogram of codes: how many equally likely codes it is worth."""
  p = np.asarray(counts, np.float64) / max(np.sum(counts), 1)
  return float(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))


class MetricWriter:
  """`metrics.jsonl` and TensorBoard's files (scalars, audio, pictures) in a run's folder.

  A run that resumes at a step drops the rows after it, so the file reads as if nothing had happened. One that starts
  at 0 is fresh, whatever a killed run has left here: it drops them all. Without a folder nothing is written.
  """

  def __init__(self, workdir: Path | None, start_step: int):
    self._file = None
    if workdir is None:
      return
    self._path = workdir / 'metrics.jsonl'
    last_kept = start_step or -1
    if self._path.exists():
      drop_rows_after(self._path, last_kept)
    self._file = self._path.open('a')
    self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=last_kept + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One row; NaN and infinity are written as null, which every JSON reader takes."""
    if self._file is None:
      return
    row = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **row}) + '\n')
    self._file.flush()
    for name, value in values.items():
      if math.isfinite(value):
        self._board.add_scalar(name, value, step)

  def add_audio(self, step: int, name: str, audio_N: np.ndarray, rate: int) -> None:
    """float [N] at `rate` Hz, clipped to [-1, 1], for TensorBoard."""
    if self._file is not None:
      self._board.add_audio(_tag(name), np.clip(audio_N, -1, 1), step, sample_rate=rate)

  def add_picture(self, step: int, name: str, grey_HW: np.ndarray) -> None:
    """uint8 [height, width] for TensorBoard."""
    if self._file is not None:
      self._board.add_image(_tag(name), grey_HW, step, dataformats='HW')

  def close(self) -> None:
    if self._file is None:
      return
    self._file.close()
    self._board.close()


def _tag(name: str) -> str:
  """As TensorBoard takes it: what strangers call their recordings may hold anything."""
  return re.sub(r'[^-/\w.]', '_', name)


def drop_rows_after(path: Path, step: int) -> int:
  """Keeps the rows of a file of JSON lines up to `step`; returns how many they are."""
  kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(line + '\n' for line in kept))
  temporary.replace(path)
  return len(kept)


def _step_of(line: str) -> float:
  # A kill can cut the last line short: it is dropped like the rows past the resumed step.
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError, TypeError):
    return math.inf
