"""A source to ArrayRecord shards, index.parquet and dataset.json, on this machine's processes or on Apache Beam.

Two stages, each a list of independent tasks that leave files in OUT/.prepare. First, runs of the source's index become
parts: decoded, checked, resampled, cut at pauses, encoded. Then all records, in the order of their ids' hashes, are cut
into shards. A task whose files are there, made from the same things, is skipped; so a run that was killed is finished
by the next, and the bytes are the same for any runner and any number of workers.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import MAX_RATE, MIN_RATE
from lmspt_jax.data.dataset_info import FILE_NAME, SHARD_PATTERN, DatasetInfo, load_info, save_info, write_atomic
from lmspt_jax.data.kept import digest, is_whole, named_errors, read_note, write_batches
from lmspt_jax.data.prepare import parts, shards, summary
from lmspt_jax.data.prepare.job import FORMAT, Job
from lmspt_jax.data.prepare.runners import Progress, Runner, find_runner
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import sha256

__all__ = ['MAX_SECONDS', 'SHARD_MB', 'prepare']

MAX_SECONDS = 30.0
SHARD_MB = 256


def prepare(source_uri: str, out: str | os.PathLike, *, num_shards: int | None = None, shard_mb: int = SHARD_MB,
            num_workers: int | None = None, runner: str = 'local', beam_options: Sequence[str] = (),
            sample_rate: int | None = None, max_seconds: float = MAX_SECONDS, progress: bool = True) -> DatasetInfo:
  """Writes shards, index.parquet, dataset.json, durations.svg and the source's licence files into `out`.

  Utterances that can't be used are left out, counted by reason and named in dataset.json.

  Args:
    source_uri: KIND:URI, see `open_source`.
    out: a local folder, created if needed; what another run left there is finished or replaced, other files are kept.
    num_shards: per split, at most its utterances; in place of `shard_mb`.
    shard_mb: MiB that a shard should have.
    num_workers: processes; default: the CPUs. For the runners 'local' and 'direct'.
    runner: 'local' (no Beam), 'direct' (Beam on this machine), or a runner of Beam's by name.
    beam_options: --NAME=VALUE each, for Beam.
    sample_rate: Hz to resample to; default: what the recordings have.
    max_seconds: longer recordings are cut at pauses into pieces ID/0000, ID/0001, ..., which have no text.
    progress: a bar on stderr.

  Raises:
    LmsptError: a bad source, nothing usable in it, `out` can't be written, a bad number, a runner that is not there.
  """
  _check(num_shards, shard_mb, num_workers, sample_rate, max_seconds)
  if storage.is_url(out):
    raise LmsptError(f'--out={out}: must be a local folder; write there and copy it (gsutil, aws s3 sync, ...)')
  run = find_runner(runner, num_workers=num_workers, beam_options=beam_options)
  source, out = open_source(source_uri), Path(out).expanduser()
  if not storage.is_url(source.root) and out.resolve() == Path(source.root).resolve():
    raise LmsptError(f'{out}: is where the source is; choose another --out')
  job = Job(Path(os.path.abspath(out)), source.select(np.zeros(0, np.int64)), sample_rate, float(max_seconds))
  with named_errors(out):
    for folder in (job.state / 'parts', job.state / 'shards'):
      folder.mkdir(parents=True, exist_ok=True)
    num_parts = _write_source(job, source)
    layout = [FORMAT, source_uri.partition(':')[0], Path(source_uri).name, num_shards, shard_mb,
              [(fault.shard, fault.reason) for fault in source.shard_faults]]
    finished = _finished(job, num_parts, layout)
    if finished is None:
      finished = _make(job, num_parts, layout, run, num_shards, shard_mb << 20, progress)
    _clean(job, {shard.name for shard in finished.shards})
  return finished


def _check(num_shards: int | None, shard_mb: int, num_workers: int | None, sample_rate: int | None,
           max_seconds: float) -> None:
  for field, value in (('num_shards', num_shards), ('shard_mb', shard_mb), ('num_workers', num_workers),
                       ('max_seconds', max_seconds)):
    if value is not None and not value >= 1:
      raise LmsptError(f'{field} = {value}: use at least 1')
  if num_shards is not None and num_shards > 99_999:
    raise LmsptError(f'num_shards = {num_shards}: use at most 99999')
  if sample_rate is not None and not MIN_RATE <= sample_rate <= MAX_RATE:
    raise LmsptError(f'sample_rate = {sample_rate}: use {MIN_RATE} to {MAX_RATE} Hz')


def _write_source(job: Job, source: Source) -> int:
  """Writes source.arrow; returns the number of parts."""
  bounds = parts.part_bounds(source)
  table = source.index.table
  place = table.schema.get_field_index('path')

  def batch(start: int, stop: int) -> pa.Table:
    rows = table.slice(start, stop - start)
    return rows.set_column(place, 'path', rows.column('path').cast(pa.large_string()))  # a dictionary would go along
  write_batches(job.index, batch(0, 0).schema, itertools.starmap(batch, itertools.pairwise(bounds)), {})
  return len(bounds) - 1


def _make(job: Job, num_parts: int, layout: list[Any], run: Runner, num_shards: int | None, shard_bytes: int,
          progress: bool) -> DatasetInfo:
  job.done.unlink(missing_ok=True)
  (job.out / FILE_NAME).unlink(missing_ok=True)  # of an earlier run; it would describe other shards
  part_files = [job.part(number) for number in range(num_parts)]
  with Progress('prepare: decode', num_parts, _counter(part_files), show=progress):
    run(functools.partial(parts.make_part, job), num_parts)
  names = shards.plan_shards(job, num_parts, num_shards=num_shards, shard_bytes=shard_bytes)
  if not names:
    found = summary.faults(job, num_parts)
    reasons = ', '.join(f'{reason}: {entry["count"]} (e.g. {entry["names"][0]})' for reason, entry in found.items())
    raise LmsptError(f'data {job.source.uri!r}: nothing in it can be used; {reasons}')
  with Progress('prepare: shuffle', len(names), _counter([job.shard(name) for name in names]), show=progress):
    run(functools.partial(shards.make_shard, job), len(names))
  info = summary.write_summary(job, num_parts, names)
  made_from = [read_note(path)['fingerprint'] for path in part_files]
  save_info(info, job.out)
  write_atomic(job.done, json.dumps(_done(job, layout, made_from)))
  return info


def _done(job: Job, layout: list[Any], made_from: list[str]) -> dict[str, str]:
  described = job.out / FILE_NAME
  return {'made_from': digest([layout, made_from]), FILE_NAME: sha256(described) if described.is_file() else ''}


def _counter(files: Sequence[Path]) -> Callable[[], tuple[int, float]]:
  """A function that says how many of the files are there, and the seconds of audio in them; each is read once."""
  waiting, seconds = {path.name: path for path in files}, 0.0

  def count() -> tuple[int, float]:
    nonlocal seconds
    for name in waiting.keys() & set(os.listdir(files[0].parent)):  # one listing: there may be 50,000 to wait for
      note = read_note(waiting[name])
      if note:
        del waiting[name]
        seconds += note['seconds']
    return len(files) - len(waiting), seconds
  return count


def _finished(job: Job, num_parts: int, layout: list[Any]) -> DatasetInfo | None:
  """What is there, if an earlier run made it from the same things and every file is as it left it."""
  try:
    done = json.loads(job.done.read_text())
  except (FileNotFoundError, ValueError):
    return None
  with ThreadPoolExecutor() as pool:  # the work is asking a disk or a store
    found = list(pool.map(lambda number: parts.part_fingerprint(job, job.part_source(number)), range(num_parts)))
    if done != _done(job, layout, found):
      return None
    info = load_info(job.out)
    whole = pool.map(lambda shard: is_whole(job.out / shard.name, shard.bytes, shard.sha256), info.shards)
    files = (path.is_file() and sha256(path) == checksum
             for path, checksum in ((job.out / name, checksum) for name, checksum in info.files.items()))
    return info if all(whole) and all(files) else None


def _clean(job: Job, names: set[str]) -> None:
  """Removes what the finished dataset has no need of: parts, shards of an earlier run, files that were cut short."""
  shutil.rmtree(job.state / 'parts')
  for path in (job.index, job.order):
    path.unlink(missing_ok=True)
  for state in (job.state / 'shards').glob('*.arrow'):
    name = state.name.removesuffix('.arrow')
    if name not in names and SHARD_PATTERN.fullmatch(name):  # only those that a run made
      (job.out / name).unlink(missing_ok=True)
      state.unlink()
  for folder in (job.out, job.state, job.state / 'shards'):
    for stale in folder.glob('.*.tmp'):
      stale.unlink()
