"""What is measured of one recording on the CPU, in processes of their own beside the device's work."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmspt_jax.evaluation.undefined import Undefined

MAX_PROCESSES = 16


@dataclass
class Measured:
  """Of one system on one recording.

  Attributes:
    values: by metric; those of a row's sums too (`names.Metric.over`).
    missing: why a metric has none.
    heard: by the ASR.
    along_time: distance in the teacher's features, at its positions.
  """

  values: dict[str, float] = field(default_factory=dict)
  missing: dict[str, str] = field(default_factory=dict)
  heard: str = ''
  along_time: list[float] = field(default_factory=list)

  def take(self, name: str, measure: Callable[[], Any], also: tuple[str, ...] = ()) -> None:
    """Keeps what `measure` gives under `name` (a dictionary under its own names), or why it gives nothing."""
    try:
      found = measure()
    except Undefined as error:
      self.missing |= dict.fromkeys((name, *also), str(error))
      return
    self.values |= found if isinstance(found, dict) else {name: found}


def measure_signals(original_N: np.ndarray, decoded: Mapping[str, np.ndarray]) -> dict[str, Measured]:
  """Of every system but the original what needs no device; of 'original' what needs no original.

  Args:
    original_N, decoded: float32 at 16 kHz, of one length.
  """
  # In the worker: they take seconds to import, and the main process does not need them.
  from lmspt_jax.evaluation import pitch, quality, signal

  names = tuple(quality.NAMES.values())
  out = {'original': Measured()}
  out['original'].take(names[0], lambda: quality.dnsmos_scores(original_N), names)
  truth_T = pitch.pitch_track(original_N)
  for system, audio_N in decoded.items():
    found = out[system] = Measured()
    found.take('pesq', lambda: signal.pesq_wide_band(original_N, audio_N))  # noqa: B023
    found.take('stoi', lambda: signal.short_time_intelligibility(original_N, audio_N))  # noqa: B023
    found.take('si_sdr', lambda: signal.si_sdr(original_N, audio_N))  # noqa: B023
    found.take(names[0], lambda: quality.dnsmos_scores(audio_N), names)  # noqa: B023
    track_T = pitch.pitch_track(audio_N)
    found.take('pitch_error', lambda: pitch.pitch_error(truth_T, track_T))  # noqa: B023
    found.take('voicing_f1', lambda: pitch.voicing_f1(truth_T, track_T))  # noqa: B023
  return out


class Pool:
  """Runs `measure_signals` in processes; with none of them here and now."""

  def __init__(self, processes: int | None = None):
    """`processes` None takes one a core, up to MAX_PROCESSES."""
    if processes is None:
      processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    # Spawned: what has started jax must not be forked.
    context = multiprocessing.get_context('spawn')
    self._pool = ProcessPoolExecutor(processes, mp_context=context) if processes else None

  def submit(self, original_N: np.ndarray, decoded: Mapping[str, np.ndarray]) -> Future:
    if self._pool is not None:
      return self._pool.submit(measure_signals, original_N, decoded)
    future: Future = Future()
    future.set_result(measure_signals(original_N, decoded))
    return future

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *_: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
