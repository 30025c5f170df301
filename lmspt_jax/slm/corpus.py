"""A corpus to token shards, resumable at any point, on any number of hosts.

The plan (plan.py) says which rows of the source become which shard; host i of n makes every n-th shard, from the i-th
on. The recordings of all its shards go through the encoder as one stream, and as soon as a part of a shard (some
hundred rows) is complete it is kept in OUT/.tokenize; a shard is put together from its parts. A file that is there,
made from the same things, is not made again. So whatever was killed is finished by the same command, and the bytes
depend on the model and the data alone.

  OUT/SPLIT-00000-of-00004.arrayrecord, .parquet    the rows (token_rows.py), in both the same
  OUT/manifest.json                                 what they are (manifest.py)
  OUT/faults.jsonl, degenerate.jsonl                utterances that were left out, and that deserve a look
  OUT/.tokenize/job.json                            what the tokens are of
  OUT/.tokenize/parts/SHARD-00000.arrow             rows of a part, with its faults
  OUT/.tokenize/shards/SHARD.arrow                  how often a shard has each code, and what the manifest says of it
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmspt_jax import hosts
from lmspt_jax.data import storage
from lmspt_jax.data.dataset_info import replacing, write_atomic
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.kept import digest, is_whole, named_errors, read_batch, read_note, write_records, write_rows
from lmspt_jax.data.mixture import check_shards
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import read_json, sha256
from lmspt_jax.inference.codes import Codes, ids_dtype
from lmspt_jax.inference.tokenizer import Tokenizer
from lmspt_jax.slm import quality, summary
from lmspt_jax.slm.manifest import SUFFIXES, Manifest, write_manifest
from lmspt_jax.slm.plan import SHARD_UTTERANCES, Shard, plan_shards
from lmspt_jax.slm.progress import Progress
from lmspt_jax.slm.recordings import Recording, recordings
from lmspt_jax.slm.token_rows import TokenRow, from_table, pack_row, to_table
from lmspt_jax.version import __version__

FORMAT = 2  # of what is kept; raise it when the same data and model come out differently
MAX_FAULT_RATE = 0.01
GRACE = 3  # faults before the rate is looked at


@dataclass(frozen=True)
class Job:
  """One run: a model, a source, and where its tokens go."""

  tokenizer: Tokenizer
  source: Source
  split: str
  out: Path
  shards: list[Shard]
  shard_utterances: int

  @property
  def state(self) -> Path:
    return self.out / '.tokenize'

  def part(self, shard: Shard, number: int) -> Path:
    return self.state / 'parts' / f'{shard.name}-{number:05d}.arrow'

  def note(self, shard: Shard) -> Path:
    return self.state / 'shards' / f'{shard.name}.arrow'

  @property
  def dtype(self) -> str:
    """Of stored ids."""
    return ids_dtype(max(self.tokenizer.codebook_sizes)).name

  @property
  def made_with(self) -> dict[str, str]:
    """What, beside the model, decides which of two nearly equal codes is taken."""
    return {'backend': jax.local_devices()[0].device_kind, 'jax': jax.__version__, 'lmspt_jax': __version__}

  @property
  def identity(self) -> dict[str, Any]:
    """What tokens in one folder have in common."""
    return {'format': FORMAT, 'model': self.tokenizer.model_hash, **self.made_with,
            'data': self.source.index.fingerprint(), 'utterances': len(self.source), 'split': self.split,
            'shard_utterances': self.shard_utterances}

  def fingerprint(self, rows: range) -> str:
    """Of all that decides what is in a part."""
    return digest([self.identity, self.source.select(np.arange(rows.start, rows.stop)).contents()])


def tokenize(tokenizer: Tokenizer, data: str, out: str | Path, *, split: str = '',
             shard_utterances: int = SHARD_UTTERANCES, max_fault_rate: float = MAX_FAULT_RATE,
             progress: bool = True) -> Manifest | None:
  """Writes the tokens of a corpus into `out`, or what is still missing of them.

  On several hosts (`hosts.start`) all of them call it alike, with `out` on storage that they share.

  Args:
    data: KIND:URI, see `open_source`.
    out: a local folder, created if needed.
    split: of the data; '' takes every utterance.
    shard_utterances: at most so many in a shard.
    max_fault_rate: share of the utterances that may be left out; above it (and above GRACE of them) the run stops.
    progress: a bar on stderr.

  Returns:
    The manifest; None on hosts other than the first.

  Raises:
    LmsptError: a bad source, tokens of another model or of other data in `out`, too many utterances that can't be
      used, `out` can't be written.
  """
  if storage.is_url(out):
    raise LmsptError(f'--out={out}: must be a local folder; write there and copy it (gsutil, aws s3 sync, ...)')
  if not 1 <= shard_utterances or not 0 <= max_fault_rate <= 1:
    raise LmsptError(f'shard_utterances = {shard_utterances}, max_fault_rate = {max_fault_rate}: use at least 1, and a '
                     'share in [0, 1]')
  source, out = open_source(data, split), Path(out).expanduser().absolute()
  check_shards(source, max_fault_rate, 'max_fault_rate')
  job = Job(tokenizer, source, split, out, plan_shards(source, shard_utterances), shard_utterances)
  with named_errors(out):
    for folder in ('parts', 'shards'):
      (job.state / folder).mkdir(parents=True, exist_ok=True)
    _check_identity(job)
    mine = job.shards[jax.process_index()::jax.process_count()]
    with Progress(source, mine, show=progress) as bar:
      _Run(job, mine, max_fault_rate, bar).run()
    hosts.gather('tokenized', '')
    if not hosts.is_writer():
      return None
    manifest = summary.summarize(job.source, job.state, out, [(shard, job.note(shard)) for shard in job.shards],
                                 tokenizer, job.made_with, split)
    write_manifest(out, manifest)
    _clean(job)
  return manifest


def _check_identity(job: Job) -> None:
  path, identity = job.state / 'job.json', job.identity
  hosts.check_same('tokenize', json.dumps(identity), 'start all hosts with the same model, data and versions')
  if not path.exists():
    if hosts.is_writer():
      write_atomic(path, json.dumps(identity, indent=1) + '\n')
    return
  found = read_json(path)
  if found == identity:
    return
  found = found if isinstance(found, dict) else {}
  there, here = ([f'{key} {values.get(key)}' for key in identity if found.get(key) != identity[key]]
                 for values in (found, identity))
  raise LmsptError(f'--out={job.out}: holds tokens made with {", ".join(there)}, not {", ".join(here)}: they would not '
                   'be one corpus; choose another --out')


@dataclass
class _Part:
  """Rows of a shard of which some are still with the encoder."""

  shard: Shard
  number: int
  rows: range
  fingerprint: str
  done: dict[int, TokenRow | AudioError] = field(default_factory=dict)


class _Run:
  """Makes what is missing of one host's shards."""

  def __init__(self, job: Job, shards: list[Shard], max_fault_rate: float, bar: Progress):
    self._job, self._shards, self._max_fault_rate, self._bar = job, shards, max_fault_rate, bar
    self._dtype = job.dtype
    self._parts: dict[int, _Part] = {}  # by row
    self._missing: dict[str, int] = {}  # parts of a shard
    self._seen, self._faults = 0, 0

  def run(self) -> None:
    config = self._job.tokenizer.config
    least = config.model.hop if config.quirks.drop_tail else 1
    encoding: dict[int, Recording] = {}  # by their number among those that are encoded
    numbers = itertools.count()

    def usable() -> Iterator[Iterator[np.ndarray]]:
      for recording in recordings(self._job.source, self._rows(), config.model.sample_rate, least):
        if recording.fault:
          self._done(recording.row, recording.fault)
        else:
          encoding[next(numbers)] = recording
          yield recording.take()

    for number, codes in self._job.tokenizer.encode_each(usable()):
      recording = encoding.pop(number)
      self._done(recording.row, recording.fault or self._token_row(recording.row, codes))

  def _rows(self) -> Iterator[int]:
    """What has to be encoded, found out as it is asked for."""
    for shard in self._shards:
      fingerprints = [self._job.fingerprint(rows) for rows in shard.parts]
      if self._is_made(shard, digest(fingerprints)):
        self._bar.skip(shard.bounds[0], shard.bounds[-1])
        continue
      self._missing[shard.name] = len(shard.parts)
      for number, (rows, fingerprint) in enumerate(zip(shard.parts, fingerprints, strict=True)):
        note = read_note(self._job.part(shard, number))
        if note and note['fingerprint'] == fingerprint:
          self._bar.skip(rows.start, rows.stop)
          self._has_part(shard)
          continue
        part = _Part(shard, number, rows, fingerprint)
        self._parts.update(dict.fromkeys(rows, part))
        yield from rows

  def _is_made(self, shard: Shard, fingerprint: str) -> bool:
    note = read_note(self._job.note(shard))
    return note is not None and note['fingerprint'] == fingerprint and all(
        is_whole(self._job.out / f'{shard.name}{suffix}', file['bytes'], file['sha256'])
        for suffix, file in note['files'].items())

  def _token_row(self, row: int, codes: Codes) -> TokenRow:
    labels = self._job.source.index.labels(row)
    return TokenRow(labels['id'], labels['text'], labels['language'], labels['speaker'], codes.num_samples,
                    codes.ids.astype(self._dtype))

  def _done(self, row: int, result: TokenRow | AudioError) -> None:
    self._seen += 1
    if isinstance(result, AudioError):
      self._faults += 1
      count, rate = self._faults, self._max_fault_rate
      if count > (GRACE if rate else 0) and count > rate * self._seen:
        raise LmsptError(f'data {self._job.source.uri!r}: {count} of {self._seen} utterances can\'t be used, more than '
                         f'max_fault_rate = {rate}; the last one: {result}; mend them or raise the rate, and run the '
                         'same command again')
    self._bar.add(row, isinstance(result, AudioError))
    part = self._parts.pop(row)
    part.done[row] = result
    if len(part.done) == len(part.rows):
      self._write_part(part)
      self._has_part(part.shard)

  def _write_part(self, part: _Part) -> None:
    good = [result for _, result in sorted(part.done.items()) if isinstance(result, TokenRow)]
    source = self._job.source
    faults = [{'id': source.index.value(row, 'id'), 'name': source.relative(source.name(row)), 'reason': result.reason}
              for row, result in sorted(part.done.items()) if isinstance(result, AudioError)]
    write_rows(self._job.part(part.shard, part.number), to_table(good, self._dtype),
               {'fingerprint': part.fingerprint, 'faults': faults})

  def _has_part(self, shard: Shard) -> None:
    self._missing[shard.name] -= 1
    if not self._missing[shard.name]:
      _write_shard(self._job, shard)


def _write_shard(job: Job, shard: Shard) -> None:
  paths = [job.part(shard, number) for number in range(len(shard.parts))]
  notes = [read_note(path) for path in paths]
  rows = sum(read_batch(path)[0].num_rows for path in paths)

  def token_rows() -> Iterator[TokenRow]:
    for path in paths:
      yield from from_table(read_batch(path)[0])

  parquet, records = (job.out / f'{shard.name}{suffix}' for suffix in ('.parquet', '.arrayrecord'))
  with replacing(parquet) as temporary, contextlib.closing(
      pq.ParquetWriter(str(temporary), to_table([], job.dtype).schema,
                       compression='zstd')) as writer:
    for path in paths:
      writer.write_table(read_batch(path)[0].replace_schema_metadata())
  write_records(records, map(pack_row, token_rows()), rows)
  counts = [np.zeros(size, np.int64) for size in job.tokenizer.codebook_sizes]
  totals = summary.Totals()
  for row in token_rows():
    quality.count_codes(row.ids, counts)
    totals.add(row, quality.degenerate(row))
  files = {suffix: {'bytes': (job.out / f'{shard.name}{suffix}').stat().st_size,
                    'sha256': sha256(job.out / f'{shard.name}{suffix}')} for suffix in SUFFIXES}
  write_rows(job.note(shard), pa.table({'counts': pa.array([count.tolist() for count in counts])}),
             {'fingerprint': digest([note['fingerprint'] for note in notes]), 'files': files,
              'faults': [fault for note in notes for fault in note['faults']], **totals.to_json()})
  for path in paths:
    path.unlink()


def _clean(job: Job) -> None:
  """Removes what a killed run left half written, and parts of shards that were finished otherwise."""
  for folder in (job.out, job.state, job.state / 'parts', job.state / 'shards'):
    for stale in folder.glob('.*.tmp'):
      stale.unlink()
  for part in (job.state / 'parts').glob('*.arrow'):
    part.unlink()
