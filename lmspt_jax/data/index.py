"""The table of a source's utterances: everything known without decoding, in the one order all sources share.

An `Index` is an Arrow table with a row per utterance, sorted by (split, id), so that the same corpus kept as a folder,
as tars or as shards has the same row numbers, and with them the same training batches. It lives in memory while it is
small; a larger one is written once to the cache folder and mapped from there, so that worker processes share it.

Columns: id, split, text, language, speaker, license (strings); path (the file that holds it, relative to the source's
root, or a URL; dictionary-encoded); position and size (int64: what they count is the source's affair, e.g. bytes in a
tar); seconds (float64, NaN where unknown); and any further number the metadata has (dnsmos, say) as float64.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather

from lmspt_jax.data.metadata import LABELS, MAX_SCORES, auto_split
from lmspt_jax.errors import LmsptError

FORMAT = 1  # of the cached tables; raise it when rows of the same data come out differently
MAX_IN_MEMORY = 16 << 20  # bytes; larger tables are mapped from the cache folder
_STRING = pa.large_string()
_PATH = pa.dictionary(pa.int32(), _STRING)
_TYPES = {**dict.fromkeys(LABELS, _STRING), 'path': _PATH, 'position': pa.int64(), 'size': pa.int64(),
          'seconds': pa.float64()}


def cache_folder() -> Path:
  """$LMSPT_CACHE, or lmspt_jax in the user's cache folder."""
  given = os.environ.get('LMSPT_CACHE')
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return Path(given).expanduser() if given else Path(home).expanduser() / 'lmspt_jax'


class Index:
  """Rows of one source, random access. Pickles as a file name once it has been cached."""

  def __init__(self, table: pa.Table, path: Path | None = None):
    self.table = table.combine_chunks() if path is None else table
    self._path = path

  def __len__(self) -> int:
    return self.table.num_rows

  def __getstate__(self) -> dict[str, Any]:
    return {'path': self._path} if self._path else {'table': self.table}

  def __setstate__(self, state: dict[str, Any]) -> None:
    path = state.get('path')
    self.__init__(state['table'] if path is None else _map(path), path)

  def value(self, row: int, column: str) -> Any:
    return self.table.column(column)[row].as_py()

  def labels(self, row: int) -> dict[str, str]:
    """id, text, language, speaker, split, license of a row."""
    return {name: self.value(row, name) for name in LABELS}

  def numbers(self, column: str) -> np.ndarray:
    """A column of numbers: float64, or int64 for position and size."""
    return self.table.column(column).to_numpy()

  @property
  def number_columns(self) -> list[str]:
    """Columns that a filter can compare with a number: seconds and the scores."""
    return [field.name for field in self.table.schema if pa.types.is_floating(field.type)]

  def take(self, rows: np.ndarray | pa.Array) -> Index:
    """The rows at the given positions, in the order given."""
    return Index(self.table.take(pa.array(rows)))

  def counts(self, column: str) -> dict[str, int]:
    """How many rows each value of a string column has, by value."""
    found = pc.value_counts(self.table.column(column)).to_pylist()
    return dict(sorted((entry['values'], entry['counts']) for entry in found))

  def fingerprint(self) -> str:
    """Hex digest of ids and splits in order: which utterances, whatever file format or place holds them."""
    digest = hashlib.sha256()
    for column in ('id', 'split'):
      array = self.table.column(column)
      for start in range(0, len(array), 1 << 16):  # by slices: a mapped table is not copied as a whole
        digest.update('\0'.join(array.slice(start, 1 << 16).to_pylist()).encode())
        digest.update(b'\1')
    return digest.hexdigest()

  def shared(self) -> Index:
    """This index, or the same mapped from the cache folder if it is too large to be copied to worker processes."""
    if self._path or self.table.nbytes <= MAX_IN_MEMORY:
      return self
    return cached_index(f'table:{self.fingerprint()}:{self.table.nbytes}', lambda: self)


def table_from_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
  """Rows as `metadata.row_from` makes them, plus path, position and size, to a table of the module's columns."""
  scores = _common(Counter(name for row in rows for name in row.get('scores', {})))
  columns: dict[str, pa.Array] = {}
  for name, kind in _TYPES.items():
    if name == 'path':
      columns[name] = pa.array([row['path'] for row in rows], _STRING).dictionary_encode()
    else:
      missing = float('nan') if name == 'seconds' else 0 if kind == pa.int64() else ''
      columns[name] = pa.array([row.get(name, missing) for row in rows], kind)
  for name in scores:
    columns[name] = pa.array([row.get('scores', {}).get(name, float('nan')) for row in rows], pa.float64())
  return pa.table(columns)


def _common(names: Counter) -> list[str]:
  """The names of most rows or tables: what strangers' metadata may add to a table is bounded."""
  return sorted(sorted(names, key=lambda name: (-names[name], name))[:MAX_SCORES])


def check_columns(table: pa.Table, name: str) -> pa.Table:
  """The columns of a table that was read from a file, in this module's types. Raises LmsptError naming a column."""
  columns: dict[str, Any] = {}
  for column, kind in _TYPES.items():
    if column not in table.column_names:
      raise LmsptError(f'{name}: has no column {column!r}; prepare the data again')
    try:
      found = table.column(column).combine_chunks().cast(_STRING if column == 'path' else kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
      raise LmsptError(f'{name}: column {column!r} is {table.column(column).type}, must be {kind}; prepare the data '
                       'again') from error
    if found.null_count:
      raise LmsptError(f'{name}: column {column!r} has empty cells; prepare the data again')
    columns[column] = found.dictionary_encode() if column == 'path' else found
  for column in table.column_names:
    if column not in columns and pa.types.is_floating(table.column(column).type):
      columns[column] = pc.fill_null(table.column(column).cast(pa.float64()), float('nan'))
  return pa.table(columns)


def assemble(tables: Iterable[pa.Table], *, name: str) -> Index:
  """One sorted index of the tables of a source's files. `name` is what errors call the source.

  Ids that are used in more than one file are told apart by a prefix, the file's name or its path. Where no row has a
  split, `auto_split` of the transcript (of the id where there is none) gives one.

  Raises:
    LmsptError: an id used twice in one file; a split on some rows only.
  """
  tables = [table for table in tables if table.num_rows]
  if not tables:
    return Index(table_from_rows([]))
  scores = _common(Counter(name for table in tables for name in table.column_names if name not in _TYPES))
  tables = [table.select([name for name in table.column_names if name in _TYPES or name in scores]) for table in tables]
  table = pa.concat_tables(tables, promote_options='default').unify_dictionaries().combine_chunks()
  for position, field in enumerate(table.schema):
    if field.name not in _TYPES and table.column(position).null_count:
      table = table.set_column(position, field, pc.fill_null(table.column(position), float('nan')))
  table = _with_splits(_with_different_ids(table, name), name)
  return Index(table.take(pc.sort_indices(table, [('split', 'ascending'), ('id', 'ascending')])))


def _with_different_ids(table: pa.Table, name: str) -> pa.Table:
  ids = table.column('id')
  if pc.count_distinct(ids).as_py() == len(ids):
    return table
  paths = pc.replace_substring_regex(table.column('path').cast(_STRING), r'\.[A-Za-z0-9]+$', '')
  for prefix in (pc.replace_substring_regex(paths, r'^.*/', ''), paths):
    longer = pc.binary_join_element_wise(prefix, ids, pa.scalar('/', _STRING))
    if pc.count_distinct(longer).as_py() == len(ids):
      return table.set_column(table.schema.get_field_index('id'), 'id', longer)
  first = max(pc.value_counts(longer).to_pylist(), key=lambda entry: entry['counts'])
  raise LmsptError(f'{name}: id {first["values"]!r} is used {first["counts"]} times; ids must differ')


def _with_splits(table: pa.Table, name: str) -> pa.Table:
  empty = pc.equal(table.column('split'), '')
  without = pc.sum(empty).as_py()
  if without == 0:
    return table
  if without < len(empty):
    row = table.slice(pc.index(empty, True).as_py(), 1).to_pylist()[0]
    raise LmsptError(f'{name}: {row["id"]!r} has no split, where others have one; give every utterance a split or none')
  pairs = zip(table.column('text').to_pylist(), table.column('id').to_pylist(), strict=True)
  splits = pa.array([auto_split(text or key) for text, key in pairs], _STRING)
  return table.set_column(table.schema.get_field_index('split'), 'split', splits)


# ---------------------------------------------------------------- the cache folder


def cached_index(key: str, build: Callable[[], Index]) -> Index:
  """The index that was cached under `key`, or `build()`, which is then cached.

  Raises LmsptError when the cache folder can't be written.
  """
  path = cache_folder() / 'index' / f'{hashlib.sha256(f"{FORMAT}:{key}".encode()).hexdigest()[:32]}.arrow'
  table = cached_table(path, lambda: build().table)
  return Index(table, path)


def cached_table(path: Path, build: Callable[[], pa.Table]) -> pa.Table:
  """The table in `path`, mapped; made by `build` and written by way of a temporary file where there is none."""
  try:
    return _map(path)
  except (OSError, pa.ArrowInvalid):  # none, or one that a full disk cut short: made anew
    table = build().combine_chunks()
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(table, str(temporary), compression='uncompressed', chunksize=max(1, table.num_rows))
    os.replace(temporary, path)
    return _map(path)
  except OSError as error:
    raise LmsptError(f'{path.parent}: the index can\'t be cached there ({error.strerror or error}); set LMSPT_CACHE to '
                     'a folder with room') from error


def _map(path: Path) -> pa.Table:
  return feather.read_table(str(path), memory_map=True)
