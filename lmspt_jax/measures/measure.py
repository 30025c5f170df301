"""What is measured of one recording on the CPU, in processes of their own beside the device's work.

Recordings are float32 at 16 kHz, those of an utterance of one length.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmspt_jax.data.workers import start_worker
from lmspt_jax.measures.undefined import Undefined

RATE = 16_000  # Hz
MAX_PROCESSES = 16
DNSMOS = ('dnsmos', 'dnsmos_speech', 'dnsmos_background', 'dnsmos_p808')  # quality.py's, which is not imported here
# What is measured in the pool; the rest needs a device.
ON_CPU = ('pesq', 'stoi', 'si_sdr', *DNSMOS, 'pitch_error', 'voicing_f1')


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


def fitted(audio_N: np.ndarray, length: int) -> np.ndarray:
  """Cut, or with zeros after its end: rates leave a sample more or less, and some models drop the tail."""
  return np.pad(audio_N[:length], (0, max(0, length - len(audio_N))))


# -------------------------------------------------------------------- on the CPU


def measure_signals(original_N: np.ndarray, audio: Mapping[str, np.ndarray],
                    wanted: Collection[str]) -> dict[str, Measured]:
  """By system what needs no device; of 'original' what needs no original.

  Args:
    original_N: the original.
    audio: by system.
    wanted: metrics; others are not computed, but for those that come along (pitch with voicing, DNSMOS' four).
  """
  out = {system: Measured() for system in audio}
  decoded = [system for system in audio if system != 'original']
  # In the worker, and only what is wanted: they take seconds to import, and need packages.
  if not {'pesq', 'stoi', 'si_sdr'}.isdisjoint(wanted):
    from lmspt_jax.measures import signal
    for name, measure in (('pesq', signal.pesq_wide_band), ('stoi', signal.short_time_intelligibility),
                          ('si_sdr', signal.si_sdr)):
      for system in decoded if name in wanted else ():
        out[system].take(name, lambda: measure(original_N, audio[system]))  # noqa: B023
  if not set(DNSMOS).isdisjoint(wanted):
    from lmspt_jax.measures import quality
    for system, audio_N in audio.items():
      out[system].take(DNSMOS[0], lambda: quality.dnsmos_scores(audio_N), DNSMOS)  # noqa: B023
  if not {'pitch_error', 'voicing_f1'}.isdisjoint(wanted):
    from lmspt_jax.measures import pitch
    truth_T = pitch.pitch_track(original_N)
    for system in decoded:
      track_T = pitch.pitch_track(audio[system])
      out[system].take('pitch_error', lambda: pitch.pitch_error(truth_T, track_T))  # noqa: B023
      out[system].take('voicing_f1', lambda: pitch.voicing_f1(truth_T, track_T))  # noqa: B023
  return out


class Pool:
  """Runs `measure_signals` in processes; with none of them here and now."""

  def __init__(self, processes: int | None = None):
    """`processes` None takes one a core, up to MAX_PROCESSES."""
    if processes is None:
      processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    # Spawned: what has started jax must not be forked.
    context = multiprocessing.get_context('spawn')
    self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker,
                                     initargs=(0, processes)) if processes else None

  def submit(self, original_N: np.ndarray, audio: Mapping[str, np.ndarray], wanted: Collection[str]) -> Future:
    if self._pool is not None:
      return self._pool.submit(measure_signals, original_N, audio, wanted)
    future: Future = Future()
    future.set_result(measure_signals(original_N, audio, wanted))
    return future

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *_: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
