"""What lies beside the shards: index.parquet, dataset.json, the durations' picture, the source's licence files."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmspt_jax.data import storage
from lmspt_jax.data.dataset_info import INDEX_NAME, DatasetInfo, replacing, write_atomic
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.kept import read_batch, read_note
from lmspt_jax.data.prepare.job import Job
from lmspt_jax.data.prepare.parts import SCORE
from lmspt_jax.data.prepare.shards import shard_info
from lmspt_jax.files import sha256

PICTURE_NAME = 'durations.svg'
MAX_NAMES = 1000  # of each kind of fault
_LICENCE_NAME = re.compile(r'(licen[cs]e|copying|notice|attribution)', re.IGNORECASE)
_MAX_LICENCE_BYTES = 1 << 20
_CREATIVE_COMMONS = re.compile(r'CC-(BY(?:-NC)?(?:-SA|-ND)?)-(\d\.\d)', re.IGNORECASE)
_TOTALS = {'splits': 'split', 'languages': 'language', 'speakers': 'speaker', 'licenses': 'license'}
_MAX_BINS = 60
_BIN_TENTHS = (5, 10, 20, 50, 100, 300, 600, 3000, 6000, 36000)  # widths of bins, in tenths of a second


def write_summary(job: Job, num_parts: int, names: Sequence[str]) -> DatasetInfo:
  """Writes everything but dataset.json, whose contents it returns. Holds one shard's rows at a time."""
  totals, tenths = _write_index(job, names)
  durations = _histogram(tenths)
  write_atomic(job.out / PICTURE_NAME, _picture(durations))
  licences = _copy_licences(job)
  source = job.source.short_uri
  named = {key: {label: {'utterances': count, 'hours': _hours(seconds)}
                 for label, (count, seconds) in sorted(part.items())} for key, part in totals.items()}
  for name, total in named['licenses'].items():
    total['attribution'] = _attribution(name, total, source, licences)
  seconds = sum((seconds for _, seconds in totals['splits'].values()), Fraction())
  return DatasetInfo(
    source=source, utterances=sum(tenths.values()), hours=_hours(seconds), splits=named['splits'],
    languages=named['languages'], speakers=named['speakers'], licenses=named['licenses'],
    sample_rates={str(rate): count for rate, (count, _) in sorted(totals['sample_rates'].items())},
    durations=durations, faults=faults(job, num_parts), shards=[shard_info(job, name) for name in names],
    files={name: sha256(job.out / name) for name in sorted([INDEX_NAME, PICTURE_NAME, *licences])})


def faults(job: Job, num_parts: int) -> dict[str, dict[str, Any]]:
  """Reason -> {'count', 'names'}, of the source's own files and then of its utterances, in its order."""
  found: dict[str, dict[str, Any]] = {}
  def add(reason: str, name: str) -> None:
    entry = found.setdefault(reason, {'count': 0, 'names': []})
    entry['count'] += 1
    if len(entry['names']) < MAX_NAMES:
      entry['names'].append(name)
  for fault in job.source.shard_faults:
    add(fault.reason, job.source.relative(fault.shard))
  for number in range(num_parts):
    for reason, name in read_note(job.part(number))['faults']:
      add(reason, name)
  return dict(sorted(found.items()))


def _write_index(job: Job, names: Sequence[str]) -> tuple[dict[str, dict[Any, tuple[int, Fraction]]], Counter[int]]:
  """index.parquet, shard by shard; returns totals {key: {label: (utterances, seconds)}} and durations in tenths."""
  totals: dict[str, dict[Any, tuple[int, Fraction]]] = {key: {} for key in (*_TOTALS, 'sample_rates')}
  tenths: Counter[int] = Counter()
  writer = None
  with replacing(job.out / INDEX_NAME) as temporary:
    for name in names:
      rows, _ = read_batch(job.shard(name))
      _add_totals(totals, rows)
      tenths.update((rows.column('num_samples').to_numpy() * 10 // rows.column('sample_rate').to_numpy()).tolist())
      rows = rows.drop_columns(['num_samples', 'sample_rate'])
      rows = rows.rename_columns([column.removeprefix(SCORE) for column in rows.column_names])
      writer = writer or pq.ParquetWriter(str(temporary), rows.schema.remove_metadata(), compression='zstd')
      writer.write_table(rows.replace_schema_metadata())
    writer.close()
  return totals, tenths


def _add_totals(totals: dict[str, dict[Any, tuple[int, Fraction]]], rows: pa.Table) -> None:
  for key, column in {**_TOTALS, 'sample_rates': 'sample_rate'}.items():
    names = [column] if column == 'sample_rate' else [column, 'sample_rate']
    for row in rows.group_by(names).aggregate([('num_samples', 'sum'), ('num_samples', 'count')]).to_pylist():
      count, seconds = totals[key].get(row[column], (0, Fraction()))
      totals[key][row[column]] = (count + row['num_samples_count'],
                                  seconds + Fraction(row['num_samples_sum'], row['sample_rate']))


def _hours(seconds: Fraction) -> float:
  return round(float(seconds / 3600), 6)


# ---------------------------------------------------------------- durations


def _histogram(tenths: Counter[int]) -> dict[str, Any]:
  longest = max(tenths)
  width = next((width for width in _BIN_TENTHS if longest // width < _MAX_BINS), _BIN_TENTHS[-1])
  counts = [0] * (longest // width + 1)
  for duration, count in tenths.items():
    counts[duration // width] += count
  return {'bin_seconds': width / 10, 'utterances': counts}


def _picture(durations: dict[str, Any]) -> str:
  """The histogram as SVG text: the same bytes everywhere, which a plotting library's next version would change."""
  counts, width = durations['utterances'], durations['bin_seconds']
  left, top, wide, high = 70, 30, 640, 260
  highest = max(counts)
  shapes = []
  for number, count in enumerate(counts):
    x, size = left + wide * number / len(counts), high * count / highest
    shapes.append(f'<rect x="{x:.2f}" y="{top + high - size:.2f}" width="{0.9 * wide / len(counts):.2f}" height='
                  f'"{size:.2f}"><title>{number * width:g} to {(number + 1) * width:g} s: {count}</title></rect>')
  every = math.ceil(len(counts) / 10)
  for number in range(0, len(counts) + 1, every):
    shapes.append(f'<text x="{left + wide * number / len(counts):.2f}" y="{top + high + 18}" text-anchor="middle">'
                  f'{number * width:g}</text>')
  for share in (0, 0.5, 1):
    shapes.append(f'<text x="{left - 8}" y="{top + high * (1 - share) + 4:.2f}" text-anchor="end">'
                  f'{highest * share:g}</text>')
  return '\n'.join([
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 30}" height="{top + high + 50}" '
    'font-family="sans-serif" font-size="12">',
    '<rect width="100%" height="100%" fill="white"/>', '<g fill="#31688e">',
    *(s for s in shapes if s[1] == 'r'), '</g>',
    f'<path d="M{left} {top}V{top + high}H{left + wide}" fill="none" stroke="black"/>',
    *(s for s in shapes if s[1] == 't'),
    f'<text x="{left + wide / 2}" y="{top + high + 40}" text-anchor="middle">seconds</text>',
    f'<text x="{left}" y="{top - 12}">utterances by duration, {width:g} s a bar</text>', '</svg>', ''])


# ---------------------------------------------------------------- licences


def _copy_licences(job: Job) -> list[str]:
  """Copies the files whose names begin with LICENSE, NOTICE or the like from the source's folder; returns the names.

  http has no listings, so nothing is found there.
  """
  names = []
  for place in [] if storage.is_http(job.source.root) else storage.expand(storage.join(job.source.root, '*')):
    name = place.rpartition('/')[2]
    if not _LICENCE_NAME.match(name):
      continue
    try:
      if not Path(place).is_dir() and storage.stat(place).size <= _MAX_LICENCE_BYTES:
        with replacing(job.out / name) as temporary:
          shutil.copyfile(storage.local_copy(place, name=place), temporary)
        names.append(name)
    except AudioError as error:
      if error.reason != 'missing':  # as a store's folders are
        raise
  return names


def _attribution(name: str, total: dict[str, Any], source: str, licences: Sequence[str]) -> str:
  found = _CREATIVE_COMMONS.fullmatch(name)
  terms = f' (https://creativecommons.org/licenses/{found[1].lower()}/{found[2]}/)' if found else ''
  return (f'{total["utterances"]} utterances of {source}, {"licence " + name if name else "licence not stated"}{terms}'
          f'{"; see " + ", ".join(licences) if licences else ""}')
