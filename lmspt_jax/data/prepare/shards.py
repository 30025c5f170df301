"""Stage 2: the records of all parts, shuffled within each split, to ArrayRecord shards, each made alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from lmspt_jax.data.dataset_info import ShardInfo
from lmspt_jax.data.kept import digest, is_whole, read_batch, read_note, write_batches, write_records, write_rows
from lmspt_jax.data.metadata import SPLIT_PATTERN
from lmspt_jax.data.prepare.job import FORMAT, Job, task
from lmspt_jax.data.prepare.parts import record_digest
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import sha256

_ORDER = pa.schema([('part', pa.int32()), ('row', pa.int32())])
_INTERNAL = ('part', 'offset', 'length', 'high', 'low', 'digest')  # columns of parts that shards don't keep


def plan_shards(job: Job, num_parts: int, *, num_shards: int | None, shard_bytes: int) -> list[str]:
  """Writes order.arrow and returns the shards' names.

  The order in a split is that of the ids' hashes, so it depends on nothing else; a split's shards hold equally many
  records. Held in memory: about 60 bytes a record.

  Raises LmsptError: an id used twice, a bad name of a split.
  """
  columns: dict[str, list[np.ndarray]] = {name: [] for name in ('part', 'row', 'split', 'length', 'high', 'low')}
  splits: dict[str, int] = {}
  for number in range(num_parts):
    table, _ = read_batch(job.part(number))
    names = table.column('split').combine_chunks().dictionary_encode()
    codes = np.array([splits.setdefault(name, len(splits)) for name in names.dictionary.to_pylist()], np.int32)
    columns['split'].append(codes[names.indices.to_numpy()])
    columns['part'].append(np.full(len(names), number, np.int32))
    columns['row'].append(np.arange(len(names), dtype=np.int32))
    for name in ('length', 'high', 'low'):
      columns[name].append(table.column(name).to_numpy())
  found = {name: np.concatenate(arrays) for name, arrays in columns.items()}
  by_key = np.lexsort((found['low'], found['high']))
  same = (np.diff(found['high'][by_key]) == 0) & (np.diff(found['low'][by_key]) == 0)
  if same.any():
    first = by_key[np.flatnonzero(same)[0]]
    name = read_batch(job.part(int(found['part'][first])))[0].column('id')[int(found['row'][first])].as_py()
    raise LmsptError(f'data {job.source.uri!r}: id {name!r} is used twice, by a recording and by a piece of a longer '
                     'one; rename that recording')
  plan: list[tuple[str, np.ndarray]] = []
  for split, code in sorted(splits.items()):
    if not SPLIT_PATTERN.fullmatch(split):
      raise LmsptError(f'data {job.source.uri!r}: split {split!r}: use up to 64 letters, digits and . _ + -')
    order = by_key[found['split'][by_key] == code]
    total = int(found['length'][order].sum())
    count = min(num_shards or max(1, -(-total // shard_bytes)), len(order))
    if count > 99_999:
      raise LmsptError(f'data {job.source.uri!r}: {count} shards in split {split!r}; at most 99999, so use a larger '
                       '--shard_mb')
    for shard in range(count):
      rows = order[shard * len(order) // count:(shard + 1) * len(order) // count]
      plan.append((f'{split}-{shard:05d}-of-{count:05d}.arrayrecord', rows))
  names = [name for name, _ in plan]
  write_batches(job.order, _ORDER, (pa.table({key: found[key][rows] for key in _ORDER.names}) for _, rows in plan),
                {'names': names})
  return names


@task
def make_shard(job: Job, number: int) -> None:
  """Writes one shard, unless it is there."""
  order, note = read_batch(job.order, number)
  name = note['names'][number]
  rows = _rows(job, order)
  fingerprint = digest([FORMAT, name, rows.to_pylist()])
  kept, path = read_note(job.shard(name)), job.out / name
  if kept and kept['fingerprint'] == fingerprint and is_whole(path, kept['bytes'], kept['sha256']):
    return
  job.shard(name).unlink(missing_ok=True)
  write_records(path, _records(job, rows), len(rows))
  size, checksum = path.stat().st_size, sha256(path)
  table = rows.drop_columns(list(_INTERNAL))
  table = table.append_column('path', pa.array([name] * len(rows), pa.large_string()))
  table = table.append_column('position', pa.array(range(len(rows)), pa.int64()))
  write_rows(job.shard(name), table, {'fingerprint': fingerprint, 'bytes': size, 'sha256': checksum,
                                      'records': len(rows), 'seconds': sum(table.column('seconds').to_pylist())})


def shard_info(job: Job, name: str) -> ShardInfo:
  """Of a finished shard."""
  note = read_note(job.shard(name))
  return ShardInfo(name=name, split=name[:-len('-00000-of-00000.arrayrecord')], records=note['records'],
                   bytes=note['bytes'], sha256=note['sha256'])


def _rows(job: Job, order: pa.Table) -> pa.Table:
  """The rows of a shard's records, in its order; each part is opened once."""
  parts, rows = order.column('part').to_numpy(), order.column('row').to_numpy()
  by_part = np.argsort(parts, kind='stable')
  numbers, starts = np.unique(parts[by_part], return_index=True)
  tables = []
  for number, chosen in zip(numbers, np.split(by_part, starts[1:]), strict=True):
    tables.append(read_batch(job.part(int(number)))[0].take(pa.array(rows[chosen])))
  back = np.empty(len(by_part), np.int64)
  back[by_part] = np.arange(len(by_part))
  return pa.concat_tables(tables).take(pa.array(back))


def _records(job: Job, rows: pa.Table) -> Iterator[bytes]:
  """The packed records, read one at a time from the parts that hold them."""
  places = zip(*(rows.column(name).to_pylist() for name in ('part', 'offset', 'length', 'digest')), strict=True)
  for part, offset, length, checksum in places:
    path = job.part(part).with_suffix('.records')
    with open(path, 'rb') as file:
      file.seek(offset)
      packed = file.read(length)
    if record_digest(packed) != checksum:
      raise LmsptError(f'{path}: damaged since it was written; remove {job.state} and run again')
    yield packed
