"""The whole of `lmspt evaluate`: every utterance through every system, measured, and one table of it.

Batches change when what is computed, not what: the tokenizer gives the same for any batch (docs/same_tokens.md), the
ASR has a fixed number of rows, and everything else is of one recording.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lmspt_jax.checkpoint import run_and_which
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.data.dataset_info import write_atomic
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError
from lmspt_jax.evaluation import report, summary
from lmspt_jax.evaluation.summary import Row
from lmspt_jax.evaluation.systems import BASELINES, Model, Recording, baseline_audio, load, load_models
from lmspt_jax.files import writable_folder
from lmspt_jax.inference.tokenizer import PATHS
from lmspt_jax.measures import speaker, statistics
from lmspt_jax.measures.ears import Ears
from lmspt_jax.measures.measure import ON_CPU, Measured, Pool
from lmspt_jax.measures.names import METRICS, check_packages
from lmspt_jax.measures.on_device import Sound, measure_on_device
from lmspt_jax.measures.tokens import codebook_statistics
from lmspt_jax.version import __version__

FORMAT = 1
METRICS_FILE, ROWS_FILE = 'metrics.json', 'utterances.jsonl'
_LIMIT_SEED = 0
_WAITING = 64  # recordings that the pool may be behind
_PACKAGES = ('jax', 'jaxlib', 'jiwer', 'librosa', 'numpy', 'onnxruntime', 'pesq', 'pycodec2', 'pystoi', 'pyworld',
             'scipy', 'soundfile', 'soxr', 'speechmos', 'tokenizers', 'whisper-normalizer')


@dataclass(frozen=True)
class Settings:
  """What an evaluation is of; enough to repeat it.

  Attributes:
    model, baselines: MODELs.
    data, split: a source and its split ('' takes all).
    limit: utterances, drawn with a fixed seed; 0 takes all.
    asr: Whisper that transcribes.
    teacher: Whisper or audio tower in whose features distances are taken; '' is that of the run, else the ASR.
    beams: of the transcription; 1 is greedy.
    batch_size: recordings that are held at a time. Changes no number.
  """

  model: str
  data: str
  split: str = ''
  limit: int = 0
  baselines: tuple[str, ...] = ()
  asr: str = 'package:tiny.en'
  teacher: str = ''
  beams: int = 1
  batch_size: int = 8


def evaluate(settings: Settings, out: str | Path, processes: int | None = None) -> dict[str, Any]:
  """Writes OUT/metrics.json, OUT/utterances.jsonl and OUT/report.html; returns what is in the first.

  Args:
    processes: that measure signals beside the device (`measure.Pool`).

  Raises:
    LmsptError: no such model, data or ASR, a package that is missing, or an OUT that can't be written.
  """
  check_packages(METRICS, also=('matplotlib', 'pycodec2'))
  speaker.weights_file()
  for name, least in (('limit', 0), ('beams', 1), ('batch_size', 1)):
    if getattr(settings, name) < least:
      raise LmsptError(f'--{name.replace("_", "-")}={getattr(settings, name)}: must be at least {least}')
  out = writable_folder(out)
  source = _chosen(open_source(settings.data, settings.split), settings.limit)
  models = load_models(settings.model, settings.baselines)
  ears = _Ears(settings, models[0])
  digest, rows = hashlib.sha256(), []
  waiting: collections.deque[tuple[Row, Future | None]] = collections.deque()
  with Pool(processes) as pool, tqdm(total=len(source), unit='utterance', dynamic_ncols=True, disable=None) as bar:

    def finish() -> None:
      _merge(*waiting.popleft())
      bar.update()

    for first in range(0, len(source), settings.batch_size):
      here = [load(source, position) for position in range(first, min(first + settings.batch_size, len(source)))]
      for recording in here:
        digest.update(recording.digest())
      for row, future in _measure(here, models, ears, pool):
        rows.append(row)
        waiting.append((row, future))
      while len(waiting) > _WAITING:  # their waveforms are in memory
        finish()
    while waiting:
      finish()
  rows_text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  found = _table(settings, models, ears, rows, digest.hexdigest())
  write_atomic(out / ROWS_FILE, rows_text)
  write_atomic(out / METRICS_FILE, json.dumps(found, indent=2, ensure_ascii=False) + '\n')
  chosen, worst = ([_example(rows[number], load(source, number), models[0]) for number in numbers]
                   for numbers in report.choose(rows))
  curves = report.run_curves(str(run_and_which(settings.model)[0]))
  write_atomic(out / report.REPORT_FILE, report.page(found, rows, chosen, worst, curves))
  return found


def _example(row: Row, recording: Recording, model: Model) -> report.Example:
  codes = model.encode([recording])
  audio = {path: model.decode(codes, path, [len(recording.audio_N)])[0] for path in PATHS}
  return report.Example(row, {'original': recording.audio_N, **audio}, codes[0].ids)


class _Ears(Ears):
  """The ASR and the teacher of an evaluation, and which files they are."""

  def __init__(self, settings: Settings, model: Model):
    asr = load_whisper(settings.asr, ('encoder', 'decoder'))
    self.asr_sha256 = self.teacher_sha256 = asr.sha256
    self.teacher_uri = settings.teacher or _own_teacher(model) or settings.asr
    teacher = None
    if self.teacher_uri != settings.asr:
      try:
        teacher = load_whisper(self.teacher_uri)
      except LmsptError as error:
        raise LmsptError(f'{error}; or measure in another one with --teacher={settings.asr}') from error
      self.teacher_sha256 = teacher.sha256
    super().__init__(asr, teacher, settings.beams)


def _own_teacher(model: Model) -> str:
  """Of a run; files and exported folders have no teacher's checkpoint in their config."""
  trained = model.tokenizer.model
  return trained.config.teacher.source if trained.weights else ''


def _measure(recordings: Sequence[Recording], models: Sequence[Model], ears: _Ears,
             pool: Pool) -> list[tuple[Row, Future | None]]:
  """Rows of utterances, and what will still come in from the pool."""
  heard = [one for one in recordings if not one.fault]
  audio = {'original': [one.audio_N for one in heard]}  # by system, None where it has none
  bits: list[dict[str, int]] = []
  for name in BASELINES:
    audio[name] = []
  for one in heard:
    made, taken = baseline_audio(one)
    bits.append(taken)
    for name in BASELINES:
      audio[name].append(made[name])
  codes = {}
  for model in models:
    codes[model.label] = model.encode(heard)
    coded = [number for number, found in enumerate(codes[model.label]) if found is not None]
    for path in PATHS:
      decoded = model.decode([codes[model.label][n] for n in coded], path, [len(heard[n].audio_N) for n in coded])
      audio[model.system(path)] = [None] * len(heard)
      for number, audio_N in zip(coded, decoded, strict=True):
        audio[model.system(path)][number] = audio_N
  sounds: dict[tuple[str, int], Sound] = {}
  # A call of the ASR takes as many steps as its longest text. What a model says can be heard as one without end: apart,
  # it doesn't hold up the rest.
  for systems in (('original', *BASELINES), [system for model in models for system in model.systems]):
    there = [(system, number) for system in systems for number in range(len(heard))
             if audio[system][number] is not None]
    texts, features = ears.hear([audio[system][number] for system, number in there],
                                [heard[number].language for _, number in there])
    sounds |= {(system, number): Sound(audio[system][number], *found) for (system, number), *found in
               zip(there, texts, features, strict=True)}
  results = []
  for one in recordings:
    row = {'id': one.id, 'language': one.language, 'speaker': one.speaker, 'seconds': one.seconds, 'text': one.text}
    if one.fault:
      results.append(({**row, 'fault': one.fault, 'systems': {}}, None))
      continue
    number = next(n for n, other in enumerate(heard) if other is one)
    row['bits'] = bits[number]
    row['codes'] = {label: found[number].ids.tolist() for label, found in codes.items() if found[number] is not None}
    original = sounds['original', number]
    row['systems'] = {system: _on_device(one, original, system, sounds, number) for system in audio}
    made = {system: found[number] for system, found in audio.items() if found[number] is not None}
    results.append((row, pool.submit(one.audio_N, made, ON_CPU)))
  return results


def _on_device(one: Recording, original: Sound, system: str, sounds: dict[tuple[str, int], Sound],
               number: int) -> Measured:
  """What needs the device, of one system on one recording."""
  if (system, number) not in sounds:
    return Measured(missing=dict.fromkeys(METRICS, 'shorter than a frame of this model'))
  decoded = None if system == 'original' else sounds[system, number]
  return measure_on_device(one.text, one.language, original, decoded, METRICS)


def _merge(row: Row, future: Future | None) -> None:
  """What the pool found into a row, which becomes plain JSON."""
  if future is not None:
    for system, measured in future.result().items():
      row['systems'][system].values |= measured.values
      row['systems'][system].missing |= measured.missing
  row['systems'] = {system: asdict(measured) for system, measured in row['systems'].items()}


def _table(settings: Settings, models: Sequence[Model], ears: _Ears, rows: Sequence[Row],
           data_hash: str) -> dict[str, Any]:
  systems = ['original', *(system for model in models for system in model.systems), *BASELINES]
  found = [row for row in rows if 'fault' not in row]
  seconds = sum(row['seconds'] for row in rows)
  bitrates = {model.system(path): model.bitrate(path) for model in models for path in PATHS}
  for name in {name for row in found for name in row['bits']}:
    bitrates[name] = sum(row['bits'][name] for row in found) / seconds
  pairs = [(model.system(path), path) for model in models[1:] for path in PATHS]
  pairs = [(path, other) for other, path in pairs] + [('full', other) for other in ('original', *BASELINES)]
  return {
      'format': FORMAT,
      'settings': {**asdict(settings), 'baselines': list(settings.baselines), 'teacher': ears.teacher_uri},
      'statistics': {'interval': 'percentile bootstrap over utterances', 'confidence': statistics.CONFIDENCE,
                     'resamples': statistics.RESAMPLES, 'test': 'paired permutation of signs, two-sided',
                     'permutations': statistics.PERMUTATIONS, 'seed': statistics.SEED},
      'hashes': {'model': models[0].tokenizer.model_hash, 'data': data_hash, 'asr': ears.asr_sha256,
                 'teacher': ears.teacher_sha256, 'speaker_encoder': speaker.SHA256,
                 'baselines': {model.label: model.tokenizer.model_hash for model in models[1:]}},
      'versions': {'lmspt_jax': __version__, **{name: metadata.version(name) for name in _PACKAGES}},
      'backend': jax.default_backend(),
      'data': {'utterances': len(rows), 'seconds': seconds,
               'faults': {row['id']: row['fault'] for row in rows if 'fault' in row}},
      'systems': {system: {'bitrate': bitrates.get(system), 'metrics': summary.system_figures(rows, system)}
                  for system in systems},
      'tokens': {model.label or 'model': codebook_statistics(
          [np.array(row['codes'][model.label]) for row in found if model.label in row['codes']],
          model.tokenizer.codebook_sizes, model.tokenizer.frame_rate) for model in models},
      'comparisons': [{'first': first, 'second': second, 'metrics': summary.comparisons(rows, first, second)}
                      for first, second in pairs]}


def _chosen(source: Source, limit: int) -> Source:
  if not limit or limit >= len(source):
    return source
  return source.select(np.sort(np.random.default_rng(_LIMIT_SEED).choice(len(source), limit, replace=False)))
