"""Stage 1: runs of the source's index to part files, each made alone from the source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from lmspt_jax.data import records
from lmspt_jax.data.dataset_info import replacing
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import table_from_rows
from lmspt_jax.data.kept import digest, read_note, write_rows
from lmspt_jax.data.prepare.audio import to_records
from lmspt_jax.data.prepare.job import FORMAT, Job, task
from lmspt_jax.data.sources import Source, Utterance

_MAX_UTTERANCES = 512
_MAX_SECONDS = 4 * 3600.0  # where the source knows durations
_FEW, _MANY = 64, 50_000  # parts: at least so many, so that all workers have some; about so many at most
SCORE = 'score:'  # before the names of scores, which may be any
_EXTRA = {'part': pa.int32(), 'offset': pa.int64(), 'length': pa.int64(), 'sample_rate': pa.int32(),
          'num_samples': pa.int64(), 'high': pa.uint64(), 'low': pa.uint64(), 'digest': pa.string()}


def part_bounds(source: Source) -> list[int]:
  """Where parts begin in the source's index, and its end: [0, ..., len(source)]. The data alone decides."""
  count = len(source)
  most = max(1, min(_MAX_UTTERANCES, count // _FEW), -(-count // _MANY))
  seconds = np.nan_to_num(source.index.numbers('seconds'), nan=0.0)
  bounds, held = [0], 0.0
  for row, length in enumerate(seconds):
    if row - bounds[-1] == most or (held and held + length > _MAX_SECONDS):
      bounds.append(row)
      held = 0.0
    held += length
  return [*bounds, count]


def part_fingerprint(job: Job, source: Source) -> str:
  """Of all that decides what is in a part: its rows, the versions of the files that hold it, the options."""
  return digest([FORMAT, job.sample_rate, job.max_seconds, *source.contents()])


@task
def make_part(job: Job, number: int) -> None:
  """Writes one part, unless it is there."""
  source, rows_path = job.part_source(number), job.part(number)
  data_path = rows_path.with_suffix('.records')
  fingerprint = part_fingerprint(job, source)
  note = read_note(rows_path)
  if note and note['fingerprint'] == fingerprint and data_path.is_file() and data_path.stat().st_size == note['bytes']:
    return
  rows_path.unlink(missing_ok=True)  # first: it says that the records are whole
  rows: list[dict[str, Any]] = []
  faults: list[tuple[str, str]] = []
  with replacing(data_path) as temporary, open(temporary, 'wb') as data:
    for position in range(len(source)):
      mark, num_rows, num_faults = data.tell(), len(rows), len(faults)
      scores = {name: source.index.value(position, name) for name in source.index.number_columns if name != 'seconds'}
      try:
        for row in _stored(job, source[position], data, faults):
          true = {name: float(row[name]) for name in ('sample_rate', 'num_samples') if name in scores}
          rows.append({**row, 'scores': {SCORE + name: value for name, value in {**scores, **true}.items()},
                       'part': number})
      except AudioError as error:
        if error.reason == 'unreachable':  # no fault of the utterance: what is stored must not depend on the network
          raise
        data.seek(mark)
        data.truncate()
        del rows[num_rows:], faults[num_faults:]
        faults.append((error.reason, job.source.relative(source.name(position))))
    size = data.tell()
  seconds = math.fsum(row['seconds'] for row in rows)
  write_rows(rows_path, _table(rows), {'fingerprint': fingerprint, 'bytes': size, 'seconds': seconds, 'faults': faults})


def _stored(job: Job, utterance: Utterance, data: BinaryIO, faults: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
  """Writes an utterance's records to `data` and yields their rows."""
  made = to_records(utterance, sample_rate=job.sample_rate, max_seconds=job.max_seconds)
  for number, record in enumerate(made):
    if isinstance(record, AudioError):
      faults.append((record.reason, job.source.relative(f'{utterance.name}/{number:04d}')))
      continue
    packed = records.pack(record)
    key = hashlib.blake2b(record.id.encode(), digest_size=16, person=b'lmspt shuffle').digest()
    yield {'id': record.id, 'split': utterance.split, 'text': record.text, 'language': record.language,
           'speaker': record.speaker, 'license': record.license, 'path': '', 'size': len(record.audio),
           'seconds': record.num_samples / record.sample_rate, 'offset': data.tell(), 'length': len(packed),
           'sample_rate': record.sample_rate, 'num_samples': record.num_samples,
           'high': int.from_bytes(key[:8], 'big'), 'low': int.from_bytes(key[8:], 'big'),
           'digest': record_digest(packed)}
    data.write(packed)


def record_digest(packed: bytes) -> str:
  return hashlib.blake2b(packed, digest_size=16).hexdigest()


def _table(rows: list[dict[str, Any]]) -> pa.Table:
  table = table_from_rows(rows).drop_columns(['path', 'position'])  # known when the shards are
  for name, kind in _EXTRA.items():
    table = table.append_column(name, pa.array([row[name] for row in rows], kind))
  return table
