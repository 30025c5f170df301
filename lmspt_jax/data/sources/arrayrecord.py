"""arrayrecord:DIR, the shards that `lmspt prepare` writes, in a folder or a store."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmspt_jax.data import records, storage
from lmspt_jax.data.dataset_info import INDEX_NAME, ShardInfo, load_info
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import Index, assemble, check_columns
from lmspt_jax.data.sources.base import ShardFault, Source
from lmspt_jax.errors import LmsptError

MAX_OPEN = 64  # shards with an open reader; each holds a file descriptor
_REMEDY = 'copy it again or rerun "lmspt prepare" with the same --out'


class ArrayRecordSource(Source):
  """Shards as dataset.json and index.parquet list them. A shard is opened when a record of it is first read."""

  def __init__(self, uri: str, path: str):
    self.uri, self.root = uri, path if storage.is_url(path) else os.path.expanduser(path)
    info = load_info(self.root)
    self._shards = {shard.name: shard for shard in info.shards}
    self.index = self._read_index()
    found = storage.stats([storage.join(self.root, shard.name) for shard in info.shards])
    self.shard_faults = tuple(filter(None, map(self._fault, info.shards, found)))
    self._readers, self._lock = OrderedDict(), threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_readers': OrderedDict(), '_lock': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def _read_index(self) -> Index:
    path = storage.join(self.root, INDEX_NAME)
    try:
      table = pq.read_table(storage.local_copy(path, name=path))
      table.validate(full=True)  # lengths, and texts that are UTF-8
      table = check_columns(table, path)
    except (AudioError, OSError, UnicodeDecodeError, pa.ArrowException) as error:
      raise LmsptError(f'{path}: can\'t be read ({" ".join(str(error).split())[:120]}); {_REMEDY}') from error
    unknown = set(table.column('path').unique().to_pylist()) - set(self._shards)
    if unknown:
      raise LmsptError(f'{path}: names the shard {min(unknown)!r}, which dataset.json does not list; {_REMEDY}')
    self._check_positions(table, path)
    return assemble([table], name=path)

  def _check_positions(self, table: pa.Table, path: str) -> None:
    for shard, position in zip(table.column('path').to_pylist(), table.column('position').to_numpy(), strict=True):
      if not 0 <= position < self._shards[shard].records:
        raise LmsptError(f'{path}: names record {position} of {shard}, which has {self._shards[shard].records}; '
                         f'{_REMEDY}')

  def _fault(self, shard: ShardInfo, found: storage.Stat | AudioError) -> ShardFault | None:
    if isinstance(found, AudioError):
      return ShardFault(shard.name, found.reason, f'{found}; {_REMEDY}')
    if found.size != shard.bytes:
      path = storage.join(self.root, shard.name)
      return ShardFault(shard.name, 'truncated',
                        f'{path}: {found.size} bytes where dataset.json says {shard.bytes}; {_REMEDY}')
    return None

  def select(self, rows: np.ndarray | pa.Array) -> Source:
    """Forgets the faults of shards that hold none of the rows."""
    chosen = super().select(rows)
    used = set(chosen.index.table.column('path').unique().to_pylist())
    chosen.shard_faults = tuple(fault for fault in self.shard_faults if fault.shard in used)
    return chosen

  def _name(self, row: int) -> str:
    return f'{self.index.value(row, "path")}:{self.index.value(row, "position")}'

  def _read(self, row: int, name: str) -> bytes:
    shard = self.index.value(row, 'path')
    try:
      data = self._reader(shard).read([self.index.value(row, 'position')])[0]
    except (RuntimeError, ValueError, IndexError) as error:  # what array_record raises for damage
      cause = ' '.join(str(error).split())[:120]
      raise records.RecordError(f'{name}: damaged shard ({cause}); prepare it again') from error
    return records.unpack(data, name=name).audio

  def _reader(self, shard: str) -> Any:
    with self._lock:
      if shard in self._readers:
        self._readers.move_to_end(shard)
        return self._readers[shard]
    from array_record.python.array_record_module import ArrayRecordReader  # starts its thread pool on import
    path = storage.local_copy(storage.join(self.root, shard), name=shard)
    reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0,max_parallelism:0', file_reader_buffer_size=32768)
    expected = self._shards[shard].records
    if not reader.ok() or reader.num_records() != expected:
      raise records.RecordError(f'{shard}: damaged, {reader.num_records()} records where dataset.json says {expected}; '
                                f'{_REMEDY}')
    with self._lock:
      self._readers[shard] = reader
      if len(self._readers) > MAX_OPEN:
        self._readers.popitem(last=False)  # closes when its last user lets go of it
    return reader
