"""The metrics of `lmspt evaluate` on the held-out utterances of a run (`train.eval_metrics`).

They are the same functions (`measures/`). What differs is what they are given: beginnings of `train.eval_seconds`, at
the model's rate and decoded by the evaluation's own batch.

Axes: N samples, K codebooks, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lmspt_jax import hosts
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.data.audio_io import to_mono_at
from lmspt_jax.errors import LmsptError
from lmspt_jax.measures.ears import Ears, language_code
from lmspt_jax.measures.measure import ON_CPU, RATE, Measured, Pool, fitted
from lmspt_jax.measures.names import METRICS, check_packages
from lmspt_jax.measures.on_device import Sound, measure_on_device
from lmspt_jax.models.tokenizer import PATHS

ORIGINAL = 'original'
_WORDS = ('wer', 'cer')
_FIELD = 'config field train.eval_metrics'


def wanted_metrics(config: ExperimentConfig) -> tuple[str, ...]:
  """What `train.eval_metrics` asks for. Raises LmsptError for what is no metric, and where nothing is held out."""
  text = config.train.eval_metrics
  names = tuple(METRICS) if text.strip() == 'all' else tuple(filter(None, map(str.strip, text.split(','))))
  for name in names:
    if name not in METRICS:
      raise LmsptError(f"{_FIELD} = {text!r}: {name!r} is none; use 'all' or some of {', '.join(METRICS)}")
  if names and not config.data.held_out:
    raise LmsptError(f'{_FIELD} = {text!r}: nothing is held out to measure them on; give data.held_out')
  return names


class Evaluators:
  """Measures the held-out utterances as the model gives them back. On host 0; the others wait for its figures.

  Args:
    config: the run's.
    wanted: metrics.
    utterances: `data.pipeline.held_out_utterances`.

  Raises:
    LmsptError: a package is missing that they need, or the ASR, or transcripts.
  """

  def __init__(self, config: ExperimentConfig, wanted: Sequence[str], utterances: Mapping[str, Any]):
    self._config, self._wanted = config, tuple(wanted)
    if not hosts.is_writer():
      return
    check_packages(wanted)
    if 'speaker_similarity' in wanted:
      from lmspt_jax.measures.speaker import weights_file  # needs a package
      weights_file()
    self._ears = _ears(config, wanted)
    self._languages = [language_code(language) for language in utterances['languages']]
    # What was said after the cut is in the transcript, and not to be heard.
    self._texts = [text if whole else '' for text, whole in zip(utterances['texts'], utterances['whole'], strict=True)]
    if not set(_WORDS).isdisjoint(wanted) and not any(map(str.strip, self._texts)):
      raise LmsptError(f'{_FIELD} = {config.train.eval_metrics!r}: of the {len(self._texts)} utterances of '
                       f'data.held_out none has a transcript and is within train.eval_seconds = '
                       f'{config.train.eval_seconds:g}; raise that, or leave out {" and ".join(_WORDS)}')
    self._originals = [to_mono_at(audio_N[:length], config.model.sample_rate, RATE) for audio_N, length in
                       zip(utterances['audio'], utterances['num_samples'], strict=True)]
    self._of_originals: list[tuple[Sound, Measured]] | None = None  # the same at every evaluation

  def __call__(self, waves: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """'PATH/METRIC' -> figure over the utterances; 'PATH/METRIC_missing', how many have none, where there are such.

    All hosts call it, and get the same. NaN where no utterance has it.

    Args:
      waves: of each utterance by path, float32 [N] at the path's rate; looked at on host 0 alone.
    """
    figures: dict[str, float] = {}
    if hosts.is_writer():
      # In a thread of its own, where the run's mesh isn't set: it is the work of this host's devices alone.
      with ThreadPoolExecutor(1, thread_name_prefix='lmspt-evaluators') as thread:
        figures = _figures(self._wanted, thread.submit(self._measure, waves).result())
    return hosts.told_by_writer('evaluators', figures)

  def _measure(self, waves: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Measured]]:
    """By utterance and system."""
    model, first = self._config.model, self._of_originals is None
    rates = dict.fromkeys(PATHS, model.sample_rate) | {'resynthesis': model.resynthesis_sample_rate}
    on_cpu = [name for name in self._wanted if name in ON_CPU]
    audio = [{path: fitted(to_mono_at(found[path], rates[path], RATE), len(original_N)) for path in PATHS}
             for original_N, found in zip(self._originals, waves, strict=True)]
    futures: list[Future] = []
    with Pool(None if on_cpu else 0) as pool:
      for original_N, decoded in zip(self._originals, audio, strict=True):
        # The originals once, and in front, as they were made.
        systems = {ORIGINAL: original_N, **decoded} if first else decoded
        futures.append(pool.submit(original_N, systems, on_cpu))
      rows = self._on_device(audio)
      for row, future in zip(rows, futures, strict=True):
        for system, measured in future.result().items():
          row[system].values |= measured.values
          row[system].missing |= measured.missing
    return rows

  def _on_device(self, audio: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Measured]]:
    if self._of_originals is None:
      sounds = self._sounds(self._originals, self._languages)
      self._of_originals = [(sound, measure_on_device(text, language, sound, None, self._wanted))
                            for sound, text, language in zip(sounds, self._texts, self._languages, strict=True)]
    decoded = self._sounds([found[path] for found in audio for path in PATHS],
                           [language for language in self._languages for _ in PATHS])
    if self._ears is not None:
      self._ears.rest()
    rows = []
    for number, (original, of_original) in enumerate(self._of_originals):
      sounds = dict(zip(PATHS, decoded[number * len(PATHS):], strict=False))
      rows.append({ORIGINAL: of_original} | {
          path: measure_on_device(self._texts[number], self._languages[number], original, sound, self._wanted)
          for path, sound in sounds.items()})
    return rows

  def _sounds(self, audios: Sequence[np.ndarray], languages: Sequence[str]) -> list[Sound]:
    if self._ears is None:
      return [Sound(audio_N) for audio_N in audios]
    return [Sound(*found) for found in zip(audios, *self._ears.hear(audios, languages), strict=True)]


def _ears(config: ExperimentConfig, wanted: Sequence[str]) -> Ears | None:
  """ASR and teacher as `lmspt evaluate` takes them for a run, as far as they are wanted."""
  asr = teacher = None
  with_features = 'teacher_distance' in wanted
  uri = config.teacher.source or config.train.eval_asr
  if not set(_WORDS).isdisjoint(wanted) or (with_features and uri == config.train.eval_asr):
    try:
      asr = load_whisper(config.train.eval_asr, ('encoder', 'decoder'))
    except LmsptError as error:
      raise LmsptError(f'config field train.eval_asr = {config.train.eval_asr!r}: {error}') from error
  if with_features and uri != config.train.eval_asr:
    teacher = load_whisper(uri)
  return Ears(asr, teacher) if asr or teacher else None


def _figures(wanted: Sequence[str], rows: Sequence[Mapping[str, Measured]]) -> dict[str, float]:
  figures: dict[str, float] = {}
  for system in (ORIGINAL, *PATHS):
    for name in wanted:
      if system == ORIGINAL and METRICS[name].needs_original:
        continue
      terms = [METRICS[name].terms(name, row[system].values) for row in rows]
      found = [term for term in terms if term is not None]
      total = sum(over for _, over in found)
      figures[f'{system}/{name}'] = sum(value for value, _ in found) / total if total else math.nan
      if len(found) < len(rows):
        figures[f'{system}/{name}_missing'] = len(rows) - len(found)
  return figures
