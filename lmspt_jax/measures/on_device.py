"""What is measured of one recording with the device: distances of spectra, of features and of speakers; words."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lmspt_jax.measures.measure import Measured
from lmspt_jax.measures.undefined import Undefined


@dataclass(frozen=True)
class Sound:
  """A system's version of a recording: float32 at 16 kHz, and what `Ears.hear` gave for it."""

  audio_N: np.ndarray
  heard: str | Undefined = ''
  features_TD: np.ndarray | None = None

  @functools.cached_property
  def voice_D(self) -> np.ndarray:
    """Embedding of the speaker."""
    from lmspt_jax.measures.speaker import speaker_embedding
    return speaker_embedding(self.audio_N)


def measure_on_device(reference: str, language: str, original: Sound, decoded: Sound | None,
                      wanted: Collection[str]) -> Measured:
  """Of `decoded`, or of the original itself where that is None.

  Args:
    reference: the transcript.
    language: its code, as Whisper has them.
    wanted: metrics; what is not wanted needs none of the arguments for it.
  """
  # What isn't wanted must not need its packages.
  found = Measured()
  sound = decoded or original
  if not {'wer', 'cer'}.isdisjoint(wanted):
    if isinstance(sound.heard, Undefined):
      found.missing |= dict.fromkeys(('wer', 'cer'), str(sound.heard))
    else:
      found.heard = sound.heard
      found.take('wer', lambda: _word_values(reference, sound.heard, language), ('cer',))
  if decoded is None:
    return found
  if not {'mel_distance', 'stft_distance'}.isdisjoint(wanted):
    from lmspt_jax.measures.spectral import spectral_distances
    mel, stft = spectral_distances(original.audio_N, decoded.audio_N)
    found.values |= {'mel_distance': mel, 'stft_distance': stft}
  if 'speaker_similarity' in wanted:
    found.take('speaker_similarity', lambda: float(np.dot(original.voice_D, decoded.voice_D)))
  if 'teacher_distance' in wanted:
    difference_TD = decoded.features_TD - original.features_TD
    distance_T = np.mean(np.square(difference_TD), axis=1, dtype=np.float64)
    found.along_time = [round(float(value), 4) for value in distance_T]
    found.values['teacher_distance'] = float(np.mean(distance_T))
  return found


def _word_values(reference: str, heard: str, language: str) -> dict[str, float]:
  from lmspt_jax.measures.words import text_errors
  found = text_errors(reference, heard, language)
  return {'wer': found.word_errors / found.words, 'cer': found.character_errors / found.characters,
          'word_errors': found.word_errors, 'words': found.words, 'character_errors': found.character_errors,
          'characters': found.characters}
