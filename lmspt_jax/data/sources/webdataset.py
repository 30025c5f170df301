"""webdataset:PATTERN, tars of audio with metadata beside it: KEY.flac with KEY.json or KEY.txt.

Members belong together by webdataset's rule: the key is the path up to the first dot of the file's name. `.json` holds
metadata (see `metadata.row_from`), `.txt` and `.lab` the transcript. A tar is indexed once, by its headers and texts;
audio is never read for it, and nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import AUDIO_SUFFIXES
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import FORMAT, Index, assemble, cache_folder, cached_index, cached_table, table_from_rows
from lmspt_jax.data.metadata import row_from
from lmspt_jax.data.sources import tar
from lmspt_jax.data.sources.base import ShardFault, Source
from lmspt_jax.data.storage import FileRange, Stat
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import parse_json

TEXT_SUFFIXES = ('.txt', '.normalized.txt', '.lab')  # the first one that a key has is its transcript
MAX_TEXT = 1 << 20  # bytes of a json or txt member
_WINDOW = 16 << 10  # bytes fetched at a time: a header, the text after it and the next header are usually one request
_THREADS, _THREADS_REMOTE = 4, 32
_FAULTS = b'faults'


class WebDatasetSource(Source):
  """Tars, local or in a store. Those that are missing or broken are in `shard_faults`; members before a break are used.

  Raises LmsptError: no tars, all of them missing or broken, a compressed one; AudioError: a store can't be reached.
  """

  def __init__(self, uri: str, pattern: str):
    self.uri = uri
    paths, self.root = storage.files_of(pattern)
    if not paths:
      raise LmsptError(f'data {uri!r}: no tars; write a pattern such as DIR/{{000..099}}.tar or DIR/*.tar')
    found = storage.stats(paths)
    for stat in found:
      if isinstance(stat, AudioError) and stat.reason == 'unreachable':
        raise stat  # no fault of a tar: what is trained on must not depend on whether the network is up
    versions = [[path, stat.version if isinstance(stat, Stat) else stat.reason]
                for path, stat in zip(paths, found, strict=True)]
    self.index = cached_index(f'webdataset:{json.dumps(versions)}', lambda: _index(uri, paths, found))
    faults = json.loads(self.index.table.schema.metadata[_FAULTS])
    self.shard_faults = tuple(ShardFault(**fault) for fault in faults)

  def _read(self, row: int, name: str) -> FileRange:
    size = self.index.value(row, 'size')
    if not size:
      raise AudioError(f'{name}: the file is empty; give it audio or remove it', 'empty')
    return FileRange(self.index.value(row, 'path'), self.index.value(row, 'position'), size)


def _index(uri: str, paths: Sequence[str], found: Sequence[Stat | AudioError]) -> Index:
  """Rows of all tars; the shard faults are in the table's metadata."""
  faults, tables, broken = [], [], 0
  for path, (table, fault) in zip(paths, _tables(paths, found), strict=True):
    if fault:
      faults.append({'shard': path, **fault})
      broken += fault['reason'] != 'corrupt record'
    if table is not None:
      tables.append(table)
  if faults and (broken == len(paths) or not any(table.num_rows for table in tables)):
    raise LmsptError(f'data {uri!r}: none of its {len(paths)} tars can be used, the first one: {faults[0]["message"]}')
  index = assemble(tables, name=f'data {uri!r}')
  return Index(index.table.replace_schema_metadata({_FAULTS: json.dumps(faults)}))


def _tables(paths: Sequence[str], found: Sequence[Stat | AudioError]
            ) -> Iterator[tuple[pa.Table | None, dict[str, str] | None]]:
  """(rows, fault) of each tar in the order given; several are indexed at a time."""
  remote = any(map(storage.is_url, paths))
  bar = tqdm(total=len(paths), desc='indexing tars', unit='tar', delay=3, dynamic_ncols=True)
  with bar, ThreadPoolExecutor(_THREADS_REMOTE if remote else _THREADS) as pool:
    try:
      for result in pool.map(_tar_table, paths, found):
        bar.update()
        yield result
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)  # the first error is enough: the tars not yet begun are left
      raise


def _tar_table(path: str, found: Stat | AudioError) -> tuple[pa.Table | None, dict[str, str] | None]:
  if isinstance(found, AudioError):
    return None, {'reason': found.reason, 'message': str(found)}
  digest = hashlib.sha256(f'{FORMAT}:{path}:{found.version}'.encode()).hexdigest()[:32]
  table = cached_table(cache_folder() / 'index' / f'tar-{digest}.arrow', lambda: _read_tar(path, found.size))
  fault = json.loads(table.schema.metadata[_FAULTS])
  copy = table.replace_schema_metadata(None).take(np.arange(table.num_rows))  # a process may map some 65,000 files
  first = pa.array(np.zeros(table.num_rows, np.int32))
  paths = pa.DictionaryArray.from_arrays(first, pa.array([path], pa.large_string()))
  return copy.set_column(copy.schema.get_field_index('path'), 'path', paths), fault


def _read_tar(path: str, size: int) -> pa.Table:
  samples = _Samples(path)
  fault = None
  with storage.reader(path, name=path) as read:
    window = _Window(read, size)
    try:
      for member in tar.members(window, size, name=path):
        samples.add(member, window)
    except AudioError as error:
      if error.reason not in ('truncated', 'undecodable'):
        raise
      fault = {'reason': error.reason, 'message': str(error)}
      samples.drop_incomplete()
  rows = samples.rows()
  if samples.refused and not fault:
    more = f' and {len(samples.refused) - 1} more' if len(samples.refused) > 1 else ''
    fault = {'reason': 'corrupt record', 'message': f'{samples.refused[0]}{more}: left out'}
  return table_from_rows(rows).replace_schema_metadata({_FAULTS: json.dumps(fault)})


class _Window:
  """`read` with a little read-ahead."""

  def __init__(self, read: Callable[[int, int], bytes], size: int):
    self._read, self._size, self._start, self._held = read, size, 0, b''

  def __call__(self, start: int, stop: int) -> bytes:
    if start < self._start or stop > self._start + len(self._held):
      self._start, self._held = start, self._read(start, min(self._size, max(stop, start + _WINDOW)))
    return self._held[start - self._start:stop - self._start]


class _Samples:
  """Members gathered by key. `refused` says what was left out and why."""

  def __init__(self, path: str):
    self._path = path
    self._audio: dict[str, tar.Member] = {}
    self._labels: dict[str, dict[str, Any]] = {}
    self._texts: dict[str, dict[str, str]] = {}
    self._bad: set[str] = set()
    self.refused: list[str] = []

  def add(self, member: tar.Member, read: Callable[[int, int], bytes]) -> None:
    name = member.name.removeprefix('./')
    folder, slash, base = name.rpartition('/')
    stem, dot, suffix = base.partition('.')
    suffix = dot + suffix.lower()
    is_audio = suffix.endswith(AUDIO_SUFFIXES)
    if not stem or not (is_audio or suffix == '.json' or suffix in TEXT_SUFFIXES):
      return
    key, where = folder + slash + stem, f'{self._path}:{name}'
    if not member.is_file or name.startswith('/') or '..' in name.split('/') or '\\' in name or '\0' in name:
      problem = 'a name that leads out of the tar' if member.is_file else 'no plain file'
      self.refused.append(f'{self._path}: {name!r} is {problem}')
    elif is_audio:
      if key in self._audio:
        self.refused.append(f'{where}: a second recording of {key!r}')
      self._audio.setdefault(key, member)
    else:
      try:
        text = _text(member, read, where)
        if suffix == '.json':
          self._labels.setdefault(key, _labels(text, where))
        else:
          self._texts.setdefault(key, {}).setdefault(suffix, text.strip())
      except LmsptError as error:
        if isinstance(error, AudioError):
          raise
        self._bad.add(key)
        self.refused.append(str(error))

  def drop_incomplete(self) -> None:
    """Leaves out audio whose text is likely to lie behind the point where the tar breaks off."""
    for texts in (self._labels, self._texts):
      if texts:
        self._audio = {key: member for key, member in self._audio.items() if key in texts}

  def rows(self) -> list[dict[str, Any]]:
    """Index rows of all keys that have audio, in the tar's order."""
    rows, seen = [], set()
    for key, member in self._audio.items():
      if key in self._bad:
        continue
      row = self._labels.get(key) or row_from({}, key)
      texts = self._texts.get(key, {})
      row['text'] = row['text'] or next((texts[suffix] for suffix in TEXT_SUFFIXES if suffix in texts), '')
      row['id'] = row['id'] or key
      if row['id'] in seen:
        self.refused.append(f'{self._path}:{member.name}: id {row["id"]!r} was used before')
        continue
      seen.add(row['id'])
      rows.append({**row, 'path': self._path, 'position': member.offset, 'size': member.size})
    return rows


def _text(member: tar.Member, read: Callable[[int, int], bytes], where: str) -> str:
  if member.size > MAX_TEXT:
    raise LmsptError(f'{where}: {member.size} bytes of text; at most {MAX_TEXT}')
  try:
    return read(member.offset, member.offset + member.size).decode('utf-8')
  except UnicodeDecodeError as error:
    raise LmsptError(f'{where}: not UTF-8 text') from error


def _labels(text: str, where: str) -> dict[str, Any]:
  values = parse_json(text, where)
  if not isinstance(values, dict):
    raise LmsptError(f'{where}: must be one JSON object')
  return row_from(values, where)
