"""The ASR and the teacher, whose ears the metrics of words and of features borrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmspt_jax.convert.whisper import WhisperCheckpoint
from lmspt_jax.errors import LmsptError
from lmspt_jax.measures.undefined import Undefined
from lmspt_jax.models.whisper_decoding import Listener, WhisperVocabulary, encode_recordings

_ROWS = 8  # windows of one call, whatever the caller's batch


class Ears:
  """Hears recordings at 16 kHz. What it needs on the devices is there from the first `hear` on.

  Args:
    asr: encoder and decoder of what transcribes; None transcribes nothing.
    teacher: encoder whose features are taken; None takes the ASR's.
    beams: of the transcription; 1 is greedy.

  Raises:
    LmsptError: the ASR has no vocabulary, or that of another model.
  """

  def __init__(self, asr: WhisperCheckpoint | None, teacher: WhisperCheckpoint | None, beams: int = 1):
    self._asr, self._teacher, self._beams = asr, teacher, beams
    self._vocabulary = None if asr is None else WhisperVocabulary.from_file(asr.tokenizer_path)
    self._listener: Listener | None = None
    self._params: Any = None

  def hear(self, audios: Sequence[np.ndarray],
           languages: Sequence[str]) -> tuple[list[str | Undefined], list[np.ndarray]]:
    """Transcripts (or why there is none) and the teacher's features [T, D] of float32 recordings."""
    texts: list[str | Undefined] = [''] * len(audios)
    features: list[np.ndarray] = [np.zeros(0)] * len(audios)
    if self._asr is not None:
      self._transcribe(audios, languages, texts, features)
    if self._teacher is not None:
      if self._params is None:
        self._params = jax.tree.map(jnp.asarray, self._teacher.params['encoder'])
      features = encode_recordings(self._teacher.dims, self._params, audios, _ROWS)
    return texts, features

  def _transcribe(self, audios: Sequence[np.ndarray], languages: Sequence[str], texts: list[str | Undefined],
                  features: list[np.ndarray]) -> None:
    if self._listener is None:
      self._listener = Listener(self._asr.dims, self._asr.params, self._vocabulary, beams=self._beams, rows=_ROWS)
    for language in sorted(set(languages)):
      here = [number for number, one in enumerate(languages) if one == language]
      asked, refusal = language, None
      try:
        self._vocabulary.prompt(self._asr.dims, language)
      except LmsptError as error:
        asked, refusal = 'en', Undefined(f'ASR: {error}')
      for number, heard in zip(here, self._listener.listen([audios[number] for number in here], asked), strict=True):
        texts[number], features[number] = refusal or heard.text, heard.features_TD

  def rest(self) -> None:
    """Frees the devices until the next `hear`."""
    self._listener = self._params = None


def language_code(language: str) -> str:
  """Whisper's code of a corpus' label: 'en-GB' and no label at all are English."""
  return language.lower().replace('_', '-').partition('-')[0] or 'en'
