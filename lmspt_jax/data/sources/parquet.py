"""parquet:PATTERN, parquet files with a column of encoded audio, as Hugging Face's `datasets` and its hub write them.

The audio is a struct with a field `bytes` (and `path`): the column `audio`, or the only one of that shape; or else a
binary column `audio` or `bytes`. Other columns of text and numbers go through `metadata.row_from`. An utterance's id is
that of its id column, else the stem of its audio's path, else FILE:ROW: the first of these that tells all rows of
the file apart. Where there is no split column, files named SPLIT-00000-of-00004.parquet and SPLIT/0000.parquet say it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmspt_jax.data import storage
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import Index, assemble, cached_index, table_from_rows
from lmspt_jax.data.metadata import row_from
from lmspt_jax.data.records import MAX_AUDIO_BYTES
from lmspt_jax.data.sources.base import ShardFault, Source
from lmspt_jax.data.storage import FileRange
from lmspt_jax.data.storage.range_file import RangeFile
from lmspt_jax.errors import LmsptError

MAX_OPEN = 64  # files; each holds a descriptor and its footer
MAX_GROUP = 64 << 20  # bytes of audio; larger row groups are read page by page up to the row, not kept
MAX_DECODED = 128 << 20  # bytes of the row groups that are kept
_NO_ROOM = 1 << 10  # bytes a row
_BATCH = 8  # rows at a time in larger row groups
_READ_AHEAD = 8 << 20  # bytes of a column that are asked for at a time
_INDEX_THREADS = 8
_NO_BYTES = ('holds only the path of its audio, not the bytes; write the files again with the audio embedded, or use '
             'folder:DIR')
_SPLIT_NAMES = (re.compile(r'(?:.*/)?([A-Za-z0-9_.+]+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet'),
                re.compile(r'(?:.*/)?([A-Za-z0-9_.+]+)/\d{4,}\.parquet'))


class ParquetSource(Source):
  """Rows of parquet files. The columns beside the audio are read once, for the index, which is cached by file."""

  def __init__(self, uri: str, pattern: str):
    self.uri = uri
    paths, self.root = storage.files_of(pattern)
    if not paths:
      raise LmsptError(f'data {uri!r}: no parquet files; write a pattern such as DIR/*.parquet')
    self._reader = _Reader(self.root)
    files = [path if storage.is_url(path) else path[len(self.root) + 1:] for path in paths]
    with ThreadPoolExecutor(_INDEX_THREADS) as executor:
      found = list(executor.map(self._index_of, files))
    self.shard_faults = tuple(fault for fault in found if isinstance(fault, ShardFault))
    if len(self.shard_faults) == len(files):
      raise AudioError(self.shard_faults[0].message, self.shard_faults[0].reason)
    self.index = assemble([table for table in found if isinstance(table, pa.Table)], name=f'data {uri!r}')

  def _name(self, row: int) -> str:
    return f'{self.index.value(row, "path")}:{self.index.value(row, "position")}'

  def _read(self, row: int, name: str) -> bytes:
    return self._reader.read(self.index.value(row, 'path'), self.index.value(row, 'position'), name)

  def _index_of(self, file: str) -> pa.Table | ShardFault:
    path = _place(self.root, file)
    try:
      key = f'parquet:{path}:{file}:{storage.stat(path, name=path).version}'
      return cached_index(key, lambda: Index(_read_rows(path, file))).table
    except AudioError as error:
      if error.reason == 'unreachable':  # no fault of the file: what is trained on must not depend on the network
        raise
      return ShardFault(file, error.reason, str(error))


def _place(root: str, file: str) -> str:
  return file if storage.is_url(file) else storage.join(root, file)


class _Reader:
  """Audio by (file, row), with a bounded number of open files and bytes of row groups. Thread-safe, pickles empty."""

  def __init__(self, root: str):
    self._root, self._lock = root, threading.Lock()
    self._files: OrderedDict[str, _File] = OrderedDict()
    self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

  def __getstate__(self) -> dict[str, Any]:
    return {'root': self._root}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(state['root'])

  def read(self, path: str, row: int, name: str) -> bytes:
    """Raises AudioError: missing, truncated, corrupt record, too large, unreachable."""
    file = self._file(path)
    if row >= file.starts[-1]:
      raise AudioError(f'{name}: the file has {file.starts[-1]} rows; it changed while it was read', 'corrupt record')
    group = int(np.searchsorted(file.starts, row, 'right')) - 1
    offset = row - int(file.starts[group])
    try:
      if file.sizes[group] > MAX_GROUP:
        value = file.page_by_page(group, offset)
      else:
        value = self._group(path, file, group)[offset]
    except (OSError, IndexError, pa.ArrowException) as error:  # IndexError: fewer rows than the footer says
      raise _damage(f'{name}: damaged row group', error) from error
    if not value.is_valid:
      raise AudioError(f'{name}: {_NO_BYTES}', 'missing')
    data = value.as_buffer()
    if data.size > MAX_AUDIO_BYTES:
      raise AudioError(f'{name}: {data.size} bytes; at most {MAX_AUDIO_BYTES}, so cut it up', 'too large')
    return data.to_pybytes()

  def _file(self, path: str) -> _File:
    with self._lock:
      if path in self._files:
        self._files.move_to_end(path)
        return self._files[path]
    file = _File(_place(self._root, path), path)
    with self._lock:
      file = self._files.setdefault(path, file)  # another thread may have been faster
      if len(self._files) > MAX_OPEN:
        self._files.popitem(last=False)  # closes when its last user lets go of it
    return file

  def _group(self, path: str, file: _File, group: int) -> pa.ChunkedArray:
    key = (path, group)
    with file.lock:  # one thread decodes a group, the others wait for it
      with self._lock:
        if key in self._groups:
          self._groups.move_to_end(key)
          return self._groups[key]
      values = file.whole(group)
      with self._lock:
        self._groups[key] = values
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > MAX_DECODED:
          self._groups.popitem(last=False)
    return values


class _File:
  """An open parquet file: where its row groups start, and its audio. Raises AudioError, LmsptError (no audio)."""

  def __init__(self, path: str, name: str):
    source: str | RangeFile = path
    if storage.is_url(path):
      source = RangeFile(storage.stat(path, name=name).size,
                         lambda start, stop: FileRange(path, start, stop - start).read(name=name))
    try:
      self.parquet = pq.ParquetFile(source, buffer_size=_READ_AHEAD, pre_buffer=False,
                                    page_checksum_verification=True)
      self.schema = self.parquet.schema_arrow
      if len(set(self.schema.names)) != len(self.schema.names):
        raise AudioError(f'{name}: two of its columns have one name; write the file again', 'corrupt record')
      self.audio = _audio_column(self.schema, name)
    except FileNotFoundError as error:
      raise AudioError(f'{name}: no such file; check the path', 'missing') from error
    except pa.ArrowInvalid as error:
      raise _damage(f'{name}: not a whole parquet file', error, 'truncated') from error
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
      raise _damage(f'{name}: can\'t be read as parquet', error) from error
    self.lock = threading.Lock()  # a ParquetFile is for one thread at a time
    kind = self.schema.field(self.audio).type
    self._in_struct = pa.types.is_struct(kind)
    self.has_path = self._in_struct and kind.get_field_index('path') >= 0
    self._leaf = f'{self.audio}.bytes' if self._in_struct else self.audio
    groups = [self.parquet.metadata.row_group(i) for i in range(self.parquet.num_row_groups)]
    self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
    # Of all columns, as audio is most of it: asked about one column of a damaged footer, pyarrow 26 aborts the process.
    self.sizes = [group.total_byte_size for group in groups]

  def without_audio(self) -> bool:
    """Whether no row has audio. It is looked at only where there would be no room for any."""
    rows = int(self.starts[-1])
    return 0 < rows and sum(self.sizes) < _NO_ROOM * rows and all(
      values.null_count == len(values) for values in map(self.whole, range(len(self.sizes))))

  def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows with these columns, by row group: their columns lie together, so that a store is asked for them once."""
    for group in range(self.parquet.num_row_groups):
      for batch in self.parquet.iter_batches(row_groups=[group], columns=columns, use_threads=False):
        yield from batch.to_pylist()

  def whole(self, group: int) -> pa.ChunkedArray:
    """The audio of a row group, binary [rows]."""
    return self._bytes(self.parquet.read_row_group(group, columns=[self._leaf], use_threads=False))

  def page_by_page(self, group: int, offset: int) -> pa.Scalar:
    """The audio of one row, decoding the pages before it but holding few of them."""
    with self.lock:
      for batch in self.parquet.iter_batches(_BATCH, row_groups=[group], columns=[self._leaf], use_threads=False):
        if offset < len(batch):
          return self._bytes(batch)[offset]
        offset -= len(batch)
    raise OSError('the row group ends early')

  def _bytes(self, table: pa.Table | pa.RecordBatch) -> Any:
    column = table.column(0)
    return pc.struct_field(column, 'bytes') if self._in_struct else column


def _audio_column(schema: pa.Schema, name: str) -> str:
  structs = [field.name for field in schema if pa.types.is_struct(field.type)
             and field.type.get_field_index('bytes') >= 0 and _is_binary(field.type.field('bytes').type)]
  if 'audio' in structs or len(structs) == 1:
    return 'audio' if 'audio' in structs else structs[0]
  plain = [column for column in ('audio', 'bytes') if column in schema.names and _is_binary(schema.field(column).type)]
  if not structs and plain:
    return plain[0]
  shown = ', '.join(f'{field.name} ({str(field.type)[:40]})' for field in schema)[:300]
  raise LmsptError(f'{name}: no column of audio, a struct of bytes and path called "audio"; it has {shown}')


def _read_rows(path: str, name: str) -> pa.Table:
  """A row for every row of a file. Raises AudioError: missing, truncated, corrupt record; LmsptError: bad metadata."""
  file = _File(path, name)
  plain = [field.name for field in file.schema if field.name != file.audio and _is_label(field.type)]
  columns = [*plain, f'{file.audio}.path'] if file.has_path else plain
  classes = _class_names(file.schema)
  matched = next(filter(None, (pattern.fullmatch(name) for pattern in _SPLIT_NAMES)), None)
  rows, paths = [], []
  try:
    if file.without_audio():
      raise LmsptError(f'{name}: {_NO_BYTES}')
    for position, values in enumerate(file.rows(columns)):
      place = values.pop(file.audio, None) if file.has_path else None
      for column, names in classes.items():
        if isinstance(values.get(column), int):
          values[column] = names[values[column]] if 0 <= values[column] < len(names) else None
      row = row_from(values, f'{name}:{position}')
      paths.append((place or {}).get('path') or '')
      rows.append({**row, 'split': row['split'] or (matched[1] if matched else ''), 'path': name, 'position': position})
  except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
    raise _damage(f'{name}: damaged columns', error) from error
  stems = [PurePosixPath(place).stem for place in paths]
  for ids in ([row['id'] for row in rows], stems, [f'{name}:{position}' for position in range(len(rows))]):
    if all(ids) and len(set(ids)) == len(ids):
      break
  return table_from_rows([{**row, 'id': key} for row, key in zip(rows, ids, strict=True)])


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
  """Columns of numbers that stand for names, by what `datasets` notes in the schema."""
  try:
    features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))['info']['features']
    return {name: list(kind['names']) for name, kind in features.items()
            if isinstance(kind, dict) and kind.get('_type') == 'ClassLabel' and isinstance(kind.get('names'), list)}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return {}


def _is_binary(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_label(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
          or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _damage(what: str, error: Exception, reason: str = 'corrupt record') -> AudioError:
  return AudioError(f'{what} ({" ".join(str(error).split())[:120]}); copy the file again', reason)
