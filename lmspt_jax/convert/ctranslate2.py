"""Reads CTranslate2's `model.bin`, version 6: named tensors, little endian.

    u32 version, string spec, u32 revision, u32 number of variables       (string: u16 length with a final NUL, bytes)
    each: string name, u8 rank, rank x u32 dims, u8 dtype, u32 data bytes, data (row-major)
    u32 number of aliases; each: string alias, string variable

Opening a file reads its table and checks every size against the file before anything is allocated; tensors are read
one at a time when asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from lmspt_jax.errors import LmsptError, nearest
from lmspt_jax.files import open_plain, size_of

VERSION = 6
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
_MAX_RANK = 8


@dataclass(frozen=True)
class Variable:
  """Where a tensor lies: its bytes are [offset, offset + size) of the file's parts put end to end."""

  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int
  size: int


class _Parts:
  """Reads a file that may be split in several, by absolute offset."""

  def __init__(self, paths: Sequence[Path]):
    self.paths = tuple(paths)
    self.name = str(self.paths[0])
    self.sizes = []
    for path in self.paths:
      with open_plain(path) as file:
        self.sizes.append(size_of(file))
    self.total = sum(self.sizes)

  def read(self, offset: int, size: int, what: str) -> bytes:
    if size > self.total - offset:
      raise LmsptError(
        f'{self.name}: {what} needs {size} bytes at byte {offset}, but the file ends at {self.total}: '
        'it is cut short or damaged, fetch it again'
      )
    chunks, start = [], 0
    for path, length in zip(self.paths, self.sizes, strict=True):
      low, high = max(offset, start), min(offset + size, start + length)
      if low < high:
        with open_plain(path) as f:
          f.seek(low - start)
          chunks.append(f.read(high - low))
      start += length
    return b''.join(chunks)


class _Cursor:
  """Reads the table front to back through a small window, skipping the tensors' data."""

  _WINDOW = 1 << 12

  def __init__(self, parts: _Parts):
    self.parts, self.offset = parts, 0
    self._window, self._window_start = b'', 0

  def take(self, size: int, what: str) -> bytes:
    start = self.offset - self._window_start
    if not 0 <= start <= len(self._window) - size:
      wanted = max(size, min(self._WINDOW, self.parts.total - self.offset))
      self._window, self._window_start, start = self.parts.read(self.offset, wanted, what), self.offset, 0
    self.offset += size
    return self._window[start : start + size]

  def number(self, code: str, what: str) -> int:
    return struct.unpack('<' + code, self.take(struct.calcsize(code), what))[0]

  def text(self, what: str) -> str:
    raw = self.take(self.number('H', what), what)
    if not raw.endswith(b'\0') or not raw[:-1].isascii():
      raise LmsptError(f'{self.parts.name}: {what} at byte {self.offset - len(raw)} is not text: the file is damaged')
    return raw[:-1].decode('ascii')

  def skip(self, size: int, what: str) -> None:
    if size > self.parts.total - self.offset:
      raise LmsptError(
        f'{self.parts.name}: {what} says {size} bytes at byte {self.offset}, but the file ends at '
        f'{self.parts.total}: it is cut short or damaged, fetch it again'
      )
    self.offset += size


class CTranslate2File:
  """A `model.bin`: `spec` names the architecture, `variables` says what is where (aliases included); `size`: bytes."""

  def __init__(self, *paths: str | Path):
    """One path, or the consecutive parts of a split file. Raises LmsptError for anything that does not add up."""
    self._parts = _Parts([Path(p) for p in paths])
    self.name, self.size = self._parts.name, self._parts.total
    cursor = _Cursor(self._parts)
    version = cursor.number('I', 'the version')
    if version != VERSION:
      raise LmsptError(f'{self.name}: CTranslate2 version {version}: only {VERSION} is read, or this is another format')
    self.spec = cursor.text('the model spec')
    self.revision = cursor.number('I', 'the spec revision')
    self.variables = dict(self._read_variables(cursor))
    for _ in range(cursor.number('I', 'the number of aliases')):
      alias, target = cursor.text('an alias'), cursor.text("an alias's variable")
      if target not in self.variables or alias in self.variables:
        raise LmsptError(f'{self.name}: alias {alias!r} of {target!r}: the file is damaged, fetch it again')
      self.variables[alias] = self.variables[target]
    if cursor.offset != self._parts.total:
      raise LmsptError(f'{self.name}: {self._parts.total - cursor.offset} bytes follow its end, at {cursor.offset}')

  def _read_variables(self, cursor: _Cursor) -> Iterator[tuple[str, Variable]]:
    seen = set()
    for i in range(cursor.number('I', 'the number of variables')):
      name = cursor.text(f'the name of variable {i}')
      rank = cursor.number('B', f'variable {name!r}')
      if rank > _MAX_RANK or name in seen:
        why = 'appears twice' if name in seen else f'has {rank} dimensions'
        raise LmsptError(f'{self.name}: variable {name!r} {why}: the file is damaged, fetch it again')
      seen.add(name)
      shape = tuple(cursor.number('I', f'variable {name!r}') for _ in range(rank))
      code = cursor.number('B', f'variable {name!r}')
      if code >= len(_DTYPES):
        raise LmsptError(
          f'{self.name}: variable {name!r} has unknown data type {code} (known: 0 to {len(_DTYPES) - 1})'
        )
      dtype = np.dtype(_DTYPES[code])
      size = cursor.number('I', f'variable {name!r}')
      if size != math.prod(shape) * dtype.itemsize:  # Python integers: no overflow
        raise LmsptError(
          f'{self.name}: variable {name!r} {list(shape)} of {dtype} has {size} bytes instead of '
          f'{math.prod(shape) * dtype.itemsize}: the file is damaged, fetch it again'
        )
      yield name, Variable(shape, dtype, cursor.offset, size)
      cursor.skip(size, f'variable {name!r}')

  def find(self, name: str) -> Variable:
    """Raises LmsptError when there is no such variable."""
    if name not in self.variables:
      raise LmsptError(f'{self.name} ({self.spec}): no variable {name!r}; {nearest(name, self.variables)}')
    return self.variables[name]

  def raw(self, name: str) -> np.ndarray:
    """The tensor as stored."""
    variable = self.find(name)
    data = self._parts.read(variable.offset, variable.size, f'variable {name!r}')
    return np.frombuffer(data, variable.dtype).reshape(variable.shape)

  def scalar(self, name: str) -> int:
    """An integer of rank 0."""
    values = self.raw(name)
    if values.size != 1 or values.dtype.kind != 'i':
      raise LmsptError(
        f'{self.name}: variable {name!r} is {values.dtype} {list(values.shape)}: an integer was expected'
      )
    return int(values.reshape(()))

  def tensor(self, name: str) -> np.ndarray:
    """float32 values; an int8 tensor is divided by its `weight_scale`, one per row (or one for all)."""
    values = self.raw(name)
    if values.dtype.kind != 'i':
      return values.astype(np.float32)
    scale_name = f'{name}_scale'
    scale = self.raw(scale_name).astype(np.float32).reshape(-1)
    if values.dtype != np.int8 or scale.size not in (1, values.shape[0] if values.ndim else 1):
      raise LmsptError(
        f'{self.name}: {name!r} is {values.dtype} {list(values.shape)} with {scale.size} scales: '
        'read are float32, float16, bfloat16 and int8 with one scale a row'
      )
    if not (np.isfinite(scale).all() and (scale != 0).all()):
      raise LmsptError(f'{self.name}: {scale_name!r} has a zero or a non-finite scale: the file is damaged')
    return values.astype(np.float32) / scale.reshape(-1, *(1,) * (values.ndim - 1))
