"""Rows of a token corpus, as tables in memory, and as they lie in parquet files and ArrayRecord files.

A row is an utterance: id, text, language, speaker, num_samples (of the recording at the model's rate, before padding)
and ids [K, T], codebook 0 semantic. In parquet ids is a list of K lists; in ArrayRecord the row is a msgpack map and
ids are little-endian bytes, frame after frame within a codebook.

Axes: K codebooks, T frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa

from lmspt_jax.data.records import MAX_TEXT_BYTES
from lmspt_jax.errors import LmsptError

LABELS = ('id', 'text', 'language', 'speaker')
_MAX_IDS = 1 << 30  # bytes of an utterance's ids
_DTYPES = {'uint16': pa.uint16(), 'int32': pa.int32()}


@dataclass(frozen=True)
class TokenRow:
  """One utterance: ids uint16 (int32 where a codebook has more than 65536 codes) [K, T]."""

  id: str
  text: str
  language: str
  speaker: str
  num_samples: int
  ids: np.ndarray


def to_table(rows: Sequence[TokenRow], dtype: str) -> pa.Table:
  """Columns id, text, language, speaker (string), num_samples (int64), ids (list of lists)."""
  columns: dict[str, Any] = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in LABELS}
  columns['num_samples'] = pa.array([row.num_samples for row in rows], pa.int64())
  values = np.concatenate([np.zeros(0, dtype), *(row.ids.astype(dtype).reshape(-1) for row in rows)])
  frames = np.concatenate([[0], *([row.ids.shape[1]] * row.ids.shape[0] for row in rows)]).astype(np.int32)
  codebooks = np.array([0, *(row.ids.shape[0] for row in rows)], np.int32)
  inner = pa.ListArray.from_arrays(pa.array(np.cumsum(frames, dtype=np.int32)), pa.array(values, _DTYPES[dtype]))
  columns['ids'] = pa.ListArray.from_arrays(pa.array(np.cumsum(codebooks, dtype=np.int32)), inner)
  return pa.table(columns)


def from_table(table: pa.Table) -> Iterator[TokenRow]:
  """The rows of a table as `to_table` makes it, or as parquet gives it back."""
  for batch in table.to_batches():
    labels = [batch.column(name).to_pylist() for name in (*LABELS, 'num_samples')]
    for *values, ids in zip(*labels, batch.column('ids'), strict=True):
      inner = ids.values
      ids_KT = inner.flatten().to_numpy().reshape(len(inner), -1)
      yield TokenRow(*values, ids_KT)


def pack_row(row: TokenRow) -> bytes:
  """One ArrayRecord record: the same row gives the same bytes."""
  ids_KT = np.ascontiguousarray(row.ids)
  return msgpack.packb({**{name: getattr(row, name) for name in LABELS}, 'num_samples': row.num_samples,
                        'shape': list(ids_KT.shape), 'dtype': ids_KT.dtype.name,
                        'ids': ids_KT.astype(ids_KT.dtype.newbyteorder('<')).tobytes()}, use_bin_type=True)


def unpack_row(record: bytes) -> TokenRow:
  """The row of a record; for Grain, `ArrayRecordDataSource(...)` and then `.map(unpack_row)`.

  Raises LmsptError: not a record that `pack_row` writes.
  """
  try:
    found = msgpack.unpackb(record, raw=False, max_bin_len=_MAX_IDS, max_str_len=MAX_TEXT_BYTES, max_map_len=16,
                            max_array_len=2, max_ext_len=0)
    shape, dtype = tuple(found['shape']), found['dtype']
    if dtype not in _DTYPES or len(shape) != 2 or not all(type(size) is int and size >= 1 for size in shape):
      raise ValueError('shape or dtype')
    values = np.frombuffer(found['ids'], np.dtype(dtype).newbyteorder('<'))
    row = TokenRow(*(found[name] for name in LABELS), found['num_samples'], values.reshape(shape).astype(dtype))
    if not all(type(getattr(row, name)) is str for name in LABELS) or type(row.num_samples) is not int:
      raise ValueError('a label')
    return row
  except (msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
    raise LmsptError(f'a record of {len(record)} bytes: not a row of tokens ({type(error).__name__}: {error}); get the '
                     'shard again') from error
