"""Augmentation of crops: gain, noise from a second source, telephone band.

A transform takes mono float32 samples, their rate and `Draws`, and gives as many samples. What it draws depends on the
run's seed, the example's global index and its own name only: not on workers, hosts, the order of calls, or on which
other transforms there are.

Samples may end up beyond full scale only as far as they were before: what a transform would push past a peak of 1 is
scaled down as a whole, so nothing is clipped. A crop that a transform passes over keeps its bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import soxr

from lmspt_jax.config import AugmentConfig
from lmspt_jax.data.audio_io import SILENCE, crop_mono, resampled_length
from lmspt_jax.data.draws import Draws
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import Source, open_source

NOISE_TRIES = 8  # recordings tried for one crop before it counts as a fault
TELEPHONE_BAND = (300.0, 3400.0)  # Hz
_TELEPHONE_RATE = 8_000  # Hz
_TAPS = 511


class Transform(Protocol):
  """What `Compose` and the pipeline call."""

  name: str

  def __call__(self, audio: np.ndarray, sample_rate: int, draws: Draws) -> np.ndarray:
    """float32 [N] at `sample_rate` Hz to float32 [N]; the argument stays as it is. Raises AudioError."""


@dataclass(frozen=True)
class Compose:
  """One transform after the other, each with its own draws."""

  transforms: tuple[Transform, ...]
  name: str = 'compose'

  def __call__(self, audio: np.ndarray, sample_rate: int, draws: Draws) -> np.ndarray:
    for transform in self.transforms:
      audio = transform(audio, sample_rate, draws.of(transform.name))
    return audio


@dataclass(frozen=True)
class Gain:
  """Louder or softer by an even draw of dB, but not past a peak of 1."""

  min_db: float
  max_db: float
  probability: float
  name: str = 'gain'

  def __call__(self, audio: np.ndarray, sample_rate: int, draws: Draws) -> np.ndarray:
    if draws.uniform() >= self.probability:
      return audio
    return _limited(audio * np.float32(10 ** (draws.uniform(self.min_db, self.max_db) / 20)), audio)


@dataclass(frozen=True)
class Noise:
  """Adds a crop of a recording of `source`, repeated if it is shorter, at an even draw of dB below the speech.

  The ratio is of mean squares over the crop. Silent speech, and a silent crop of noise, are left as they are.
  """

  source: Source
  min_snr_db: float
  max_snr_db: float
  probability: float
  name: str = 'noise'

  def __call__(self, audio: np.ndarray, sample_rate: int, draws: Draws) -> np.ndarray:
    if draws.uniform() >= self.probability:
      return audio
    ratio = draws.uniform(self.min_snr_db, self.max_snr_db)
    first, place = draws.below(len(self.source)), draws.uniform()
    noise = self._noise(first, place, len(audio), sample_rate)
    power, noise_power = _power(audio), _power(noise)
    if min(power, noise_power) < SILENCE ** 2:
      return audio
    scale = math.sqrt(power / noise_power / 10 ** (ratio / 10))
    return _limited(audio + noise * np.float32(scale), audio)

  def _noise(self, first: int, place: float, num_samples: int, sample_rate: int) -> np.ndarray:
    error = None
    for attempt in range(min(NOISE_TRIES, len(self.source))):
      try:
        return self._crop((first + attempt) % len(self.source), place, num_samples, sample_rate)
      except AudioError as found:
        error = found
    raise AudioError(f'{error} (noise for augmentation, and {attempt} before it can\'t be used either)',
                     error.reason) from error

  def _crop(self, position: int, place: float, num_samples: int, sample_rate: int) -> np.ndarray:
    utterance = self.source[position]
    with utterance.open() as file:
      total = resampled_length(file.frames, file.samplerate, sample_rate)
      start = int(place * (total - num_samples + 1)) if total > num_samples else 0
      noise = crop_mono(file, start, num_samples, sample_rate, name=utterance.name)
    return noise if len(noise) == num_samples else np.resize(noise, num_samples)


@dataclass(frozen=True)
class Telephone:
  """Passes 300 to 3400 Hz, at the same rate."""

  probability: float
  name: str = 'telephone'

  def __call__(self, audio: np.ndarray, sample_rate: int, draws: Draws) -> np.ndarray:
    if draws.uniform() >= self.probability:
      return audio
    narrow = _filtered(soxr.resample(audio, sample_rate, _TELEPHONE_RATE, 'HQ'))
    out = soxr.resample(narrow, _TELEPHONE_RATE, sample_rate, 'HQ')[:len(audio)]
    return _limited(np.pad(out, (0, len(audio) - len(out))), audio)


def from_config(config: AugmentConfig) -> Compose | None:
  """What the configuration asks for, in its order; None if that is nothing. Opens the source of noise.

  Raises LmsptError: no such noise.
  """
  transforms: list[Transform] = []
  if config.noise_probability:
    transforms.append(Noise(open_source(config.noise), *config.noise_snr_db, config.noise_probability))
  if config.telephone_probability:
    transforms.append(Telephone(config.telephone_probability))
  if config.gain_probability:
    transforms.append(Gain(*config.gain_db, config.gain_probability))
  return Compose(tuple(transforms)) if transforms else None


def _limited(audio: np.ndarray, before: np.ndarray) -> np.ndarray:
  peak, limit = _peak(audio), max(1.0, _peak(before))
  return audio * np.float32(limit / peak) if peak > limit else audio


def _peak(audio: np.ndarray) -> float:
  return float(max(audio.max(initial=0.0), -audio.min(initial=0.0)))


def _power(audio: np.ndarray) -> float:
  return float(np.mean(np.square(audio, dtype=np.float64))) if len(audio) else 0.0


@functools.cache
def _band_pass() -> np.ndarray:
  """A windowed sinc at 8 kHz, symmetric: float32 [511], 40 dB down 40 Hz outside the band."""
  times = np.arange(_TAPS) - _TAPS // 2
  low, high = (2 * edge / _TELEPHONE_RATE for edge in TELEPHONE_BAND)
  taps = (high * np.sinc(high * times) - low * np.sinc(low * times)) * np.hamming(_TAPS)
  return taps.astype(np.float32)


def _filtered(audio: np.ndarray) -> np.ndarray:
  size = 1 << (len(audio) + _TAPS - 2).bit_length()
  out = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(_band_pass(), size), size)
  return out[_TAPS // 2:_TAPS // 2 + len(audio)].astype(np.float32)
