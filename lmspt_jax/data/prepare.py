"""A source to ArrayRecord shards plus dataset.json.

Utterances keep the source's order and are cut into contiguous runs, one a shard, so that each shard can be made
alone: a run that was killed leaves whole shards behind, and the next one makes only what is missing. What a
finished shard was made from, and what it holds, is kept in OUT/.prepare. The same source gives the same bytes for any
number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.data import records
from lmspt_jax.data.audio_io import MAX_FRAMES, SILENCE, AudioError, encode_flac, read_range
from lmspt_jax.data.dataset_info import (
  FILE_NAME,
  SHARD_PATTERN,
  SPLIT_PATTERN,
  DatasetInfo,
  ShardInfo,
  save_info,
  write_atomic,
)
from lmspt_jax.data.sources import Source, Utterance, open_source
from lmspt_jax.errors import LmsptError

SHARD_BYTES = 256 << 20  # of source audio, where num_shards is not given
LICENCE_PATTERNS = ('LICENSE*', 'LICENCE*', 'COPYING*', 'NOTICE*', 'ATTRIBUTION*')
_STATE = '.prepare'
_FORMAT = 1  # of the state; raise it when shards of the same source come out differently
_MAX_NAMES = 1000
_FLAC_24 = ('PCM_24', 'PCM_32', 'FLOAT', 'DOUBLE')  # stored with 24 bits, everything else with 16


def to_record(utterance: Utterance) -> records.Record:
  """Decodes everything, checks it, and gives the record to store: FLAC is kept byte for byte, the rest is encoded.

  Raises AudioError: missing, undecodable, truncated, empty, non-finite, silent, too large, bad rate.
  """
  encoded = utterance.encoded()
  with Utterance(id=utterance.id, name=utterance.name, content=encoded).open() as file:
    audio = read_range(file, 0, MAX_FRAMES, name=utterance.name)
    rate, kind, subtype = file.samplerate, file.format, file.subtype
  if np.abs(audio).max() < SILENCE:
    raise AudioError(f'{utterance.name}: silent (peak below {SILENCE}); remove it', 'silent')
  if kind != 'FLAC':
    if audio.shape[1] > 8:  # FLAC holds no more
      audio = audio.mean(axis=1, keepdims=True, dtype=np.float32)
    encoded = encode_flac(audio, rate, 'PCM_24' if subtype in _FLAC_24 else 'PCM_16')
  return records.Record(id=utterance.id, audio=encoded, sample_rate=rate, num_samples=len(audio), text=utterance.text,
                        language=utterance.language, speaker=utterance.speaker, license=utterance.license)


def prepare(source_uri: str, out: str | os.PathLike, *, num_shards: int | None = None, num_workers: int | None = None,
            progress: bool = True) -> DatasetInfo:
  """Writes SPLIT-00000-of-0000N.arrayrecord files, dataset.json and the source's licence files into `out`.

  Utterances that can't be used are left out, counted by reason and named in dataset.json.

  Args:
    source_uri: KIND:PATH, see `open_source`.
    out: folder, created if needed. Shards that are already there and whole are kept; other files are left alone.
    num_shards: per split, at most its utterances; default: one per 256 MiB of source audio.
    num_workers: threads that decode and encode; default: the CPUs. Results do not depend on it.
    progress: report shards on stderr.

  Raises:
    LmsptError: a bad source, nothing usable in it, `out` can't be written, a bad number.
  """
  for field, value in (('num_shards', num_shards), ('num_workers', num_workers)):
    if value is not None and value < 1:
      raise LmsptError(f'{field} = {value}: use at least 1')
  if num_shards is not None and num_shards > 99_999:
    raise LmsptError(f'num_shards = {num_shards}: use at most 99999')
  source, out = open_source(source_uri), Path(out).expanduser()
  if out.resolve() == source.root.resolve():
    raise LmsptError(f'{out}: is where the source is; choose another --out')
  state = out / _STATE
  workers = num_workers or os.cpu_count() or 1
  try:
    state.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob('.*.arrayrecord.*.tmp'), *state.glob('.*.tmp')]:  # of a run that was killed
      stale.unlink()
    with ThreadPoolExecutor(workers) as executor:
      pool = _Pool(executor, ahead=4 * workers)
      plan = _plan(source, num_shards, pool)
      done = []
      for number, (name, indices) in enumerate(plan):
        done.append(_shard(source, out, name, indices, pool))
        if progress:
          print(f'\rprepare: shard {number + 1} of {len(plan)}, {done[-1]["records"]} utterances',
                end='\n' if number + 1 == len(plan) else '', file=sys.stderr, flush=True)
    info = _summary(source_uri, done)
    if not info.utterances:
      reasons = ', '.join(f'{reason}: {entry["count"]} (e.g. {entry["names"][0]})'
                          for reason, entry in info.faults.items())
      raise LmsptError(f'data {source_uri!r}: none of its {len(source)} utterances can be used; {reasons}')
    _copy_licences(source, out)
    save_info(info, out)
    _remove_old(out, {name for name, _ in plan})
  except OSError as error:
    raise LmsptError(f'{error.filename or out}: can\'t be written ({error.strerror or error}); choose another --out or '
                     'make room') from error
  return info


class _Pool:
  """Threads: decoding and encoding leave the interpreter free."""

  def __init__(self, executor: ThreadPoolExecutor, ahead: int):
    self._executor, self._ahead = executor, ahead

  def ordered(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results in the order of the items; runs only a little ahead, so that they don't pile up."""
    waiting = deque()
    for item in items:
      waiting.append(self._executor.submit(function, item))
      if len(waiting) >= self._ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


# ---------------------------------------------------------------- shards


def _stamp(source: Source, index: int) -> tuple[str, str, int]:
  """(split, fingerprint, bytes) of one utterance, without decoding it."""
  try:
    utterance = source[index]
  except AudioError as error:  # a damaged record of a shard; it is counted where it would be stored
    return '', _digest(str(error)), 0
  fields = [utterance.id, utterance.name, utterance.text, utterance.language, utterance.speaker, utterance.split,
            utterance.license]
  if isinstance(utterance.content, bytes):
    fields.append(hashlib.sha256(utterance.content).hexdigest())
    size = len(utterance.content)
  else:
    try:
      status = utterance.content.stat()
      size = status.st_size
      fields += [str(size), str(status.st_mtime_ns)]
    except OSError:
      size = 0
  return utterance.split, _digest(json.dumps(fields)), size


def _plan(source: Source, num_shards: int | None, pool: _Pool) -> list[tuple[str, list[tuple[int, str]]]]:
  """[(shard's file name, [(index, fingerprint)])]: contiguous runs of each split."""
  splits: dict[str, list[tuple[int, str]]] = {}
  sizes = Counter()
  split = ''
  for index, (found, stamp, size) in enumerate(pool.ordered(lambda i: _stamp(source, i), range(len(source)))):
    split = found or split or 'train'  # a damaged record stays with its neighbours
    if not SPLIT_PATTERN.fullmatch(split):
      raise LmsptError(f'data {source.uri!r}: split {split!r}: use up to 64 letters, digits and . _ + -')
    splits.setdefault(split, []).append((index, stamp))
    sizes[split] += size
  plan = []
  for split, entries in sorted(splits.items()):
    count = min(num_shards or max(1, -(-sizes[split] // SHARD_BYTES)), len(entries))
    for shard in range(count):
      part = entries[shard * len(entries) // count:(shard + 1) * len(entries) // count]
      plan.append((f'{split}-{shard:05d}-of-{count:05d}.arrayrecord', part))
  return plan


def _shard(source: Source, out: Path, name: str, entries: list[tuple[int, str]],
           pool: _Pool) -> dict[str, Any]:
  """Makes one shard unless it is there already; returns what it holds (what OUT/.prepare/NAME.json says)."""
  path, state = out / name, out / _STATE / f'{name}.json'
  fingerprint = _digest('\n'.join([str(_FORMAT), *(stamp for _, stamp in entries)]))
  kept = _read_state(state)
  if kept and kept.get('fingerprint') == fingerprint and path.is_file() and path.stat().st_size == kept.get('bytes'):
    if _sha256(path) == kept.get('sha256'):
      return kept
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
  shard = {'fingerprint': fingerprint, 'name': name, 'split': SHARD_PATTERN.fullmatch(name)[1]}
  totals = {key: {} for key in ('languages', 'speakers', 'licenses', 'sample_rates')}
  faults, count, seconds = [], 0, 0.0
  temporary = out / f'.{name}.{os.getpid()}.tmp'
  (out / FILE_NAME).unlink(missing_ok=True)  # of an earlier run; it would describe other shards
  temporary.touch()  # an OSError here names what is wrong; the writer's own errors don't
  try:
    writer = ArrayRecordWriter(str(temporary), 'group_size:1,uncompressed')  # FLAC does not compress
    for made in pool.ordered(lambda entry: _make(source, entry[0]), entries):
      if not isinstance(made, tuple):
        faults.append(made)
        continue
      data, labels, length = made
      writer.write(data)
      count, seconds = count + 1, seconds + length
      for key, label in labels.items():
        entry = totals[key].setdefault(label, [0, 0.0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + length
    writer.close()
    reader = ArrayRecordReader(str(temporary))
    written = reader.num_records() if reader.ok() else -1
    reader.close()
  except RuntimeError as error:  # what array_record raises, e.g. on a full disk
    temporary.unlink(missing_ok=True)
    raise LmsptError(f'{path}: can\'t be written ({" ".join(str(error).split())[:200]}); make room') from error
  if written != count:
    temporary.unlink(missing_ok=True)
    raise LmsptError(f'{path}: {written} of {count} records arrived on disk; make room')
  shard.update(records=count, bytes=temporary.stat().st_size, sha256=_sha256(temporary), seconds=seconds,
               totals=totals, faults=faults)
  os.replace(temporary, path)
  write_atomic(state, json.dumps(shard, ensure_ascii=False))
  return shard


def _make(source: Source, index: int) -> tuple[bytes, dict[str, str], float] | dict[str, str]:
  """(packed record, labels for the totals, seconds), or {'reason', 'name'} of a fault."""
  try:
    record = to_record(source[index])
    data = records.pack(record)
  except AudioError as error:
    return {'reason': error.reason, 'name': source.name(index)}
  labels = {'languages': record.language, 'speakers': record.speaker, 'licenses': record.license,
            'sample_rates': str(record.sample_rate)}
  return data, labels, record.num_samples / record.sample_rate


def _read_state(path: Path) -> dict[str, Any] | None:
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


# ---------------------------------------------------------------- the summary


def _summary(source_uri: str, shards: list[dict[str, Any]]) -> DatasetInfo:
  totals: dict[str, dict[str, list]] = {key: {} for key in ('splits', 'languages', 'speakers', 'licenses',
                                                            'sample_rates')}
  faults: dict[str, list[str]] = {}
  for shard in shards:
    parts = {**shard['totals'], 'splits': {shard['split']: [shard['records'], shard['seconds']]}}
    for key, part in parts.items():
      for label, (count, seconds) in part.items():
        entry = totals[key].setdefault(label, [0, 0.0])
        entry[0], entry[1] = entry[0] + count, entry[1] + seconds
    for fault in shard['faults']:
      faults.setdefault(fault['reason'], []).append(fault['name'])
  named = {key: {label: {'utterances': count, 'hours': _hours(seconds)}
                 for label, (count, seconds) in sorted(part.items())} for key, part in totals.items()}
  kind, _, path = source_uri.partition(':')
  return DatasetInfo(
    source=f'{kind}:{Path(path).name}',
    utterances=sum(shard['records'] for shard in shards),
    hours=_hours(sum(shard['seconds'] for shard in shards)),
    splits=named['splits'], languages=named['languages'], speakers=named['speakers'], licenses=named['licenses'],
    sample_rates={rate: entry['utterances'] for rate, entry in named['sample_rates'].items()},
    faults={reason: {'count': len(names), 'names': names[:_MAX_NAMES]} for reason, names in sorted(faults.items())},
    shards=[ShardInfo(**{key: shard[key] for key in ('name', 'split', 'records', 'bytes', 'sha256')})
            for shard in shards])


def _hours(seconds: float) -> float:
  return round(seconds / 3600, 6)


def _copy_licences(source: Source, out: Path) -> None:
  root = getattr(source, 'root', None)
  for pattern in LICENCE_PATTERNS if root else ():
    for path in sorted(root.glob(pattern)):
      if path.is_file() and path.resolve().parent != out.resolve():
        shutil.copyfile(path, out / path.name)


def _remove_old(out: Path, names: set[str]) -> None:
  """Shards of an earlier run with another number of shards; only those that OUT/.prepare says we made."""
  for state in (out / _STATE).glob('*.arrayrecord.json'):
    name = state.name.removesuffix('.json')
    if name not in names and SHARD_PATTERN.fullmatch(name):
      (out / name).unlink(missing_ok=True)
      state.unlink()
