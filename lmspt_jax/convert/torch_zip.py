"""Reads tensors out of a `torch.save` file without torch and without Python's unpickler.

The file is a zip: NAME/data.pkl describes nested containers, NAME/data/KEY holds a storage's bytes. The description is
a pickle, of which only the operations that build containers, texts and numbers are known here. Names it may mention are
those of a tensor's parts; they are texts here and stand for nothing that could be called. Storages are read when a
tensor is asked for.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import PlainZip

_KIND = 'a torch.save file of PyTorch 1.6 or later'
_MAX_FILE = 64 << 30  # bytes
_MAX_DESCRIPTION = 16 << 20  # bytes of data.pkl; that of Whisper's large-v3 has 200 kB
_MAX_OPERATIONS = 400_000  # of it; large-v3's has 60,000
_MAX_RANK = 32
_DTYPES = {
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'DoubleStorage': np.float64,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'BoolStorage': np.bool_,
  'ByteStorage': np.uint8,
}
_DICT, _REBUILD = 'collections.OrderedDict', 'torch._utils._rebuild_tensor_v2'
_NAMES = {_DICT, _REBUILD, *(f'torch.{name}' for name in _DTYPES)}


class _Refused(Exception):
  """What a description holds and these files don't."""


@dataclass(frozen=True)
class _Name:
  """Of a function or class. Nothing is looked up under it."""

  text: str


@dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  count: int


@dataclass(frozen=True)
class LazyTensor:
  """A tensor's description; `TorchFile.read` fetches it."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in elements


# ---------------------------------------------------------------- the description

_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'}
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_GET, _PUT = {'BINGET', 'LONG_BINGET'}, {'BINPUT', 'LONG_BINPUT'}
_MARK = object()


def _describe(data: bytes) -> Any:
  """The containers of a description. Raises _Refused, and ValueError for bytes that are no operations."""
  stack: list[Any] = []
  kept: dict[int, Any] = {}
  for count, (operation, argument, _) in enumerate(_operations(data)):
    name = operation.name
    if count == _MAX_OPERATIONS:
      raise _Refused(f'more than {_MAX_OPERATIONS} operations')
    if name in _LITERALS:
      if type(argument) is int and not -(2**63) <= argument < 2**63:
        raise _Refused('a number of more than 64 bits')
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name == 'MARK':
      stack.append(_MARK)
    elif name in _TUPLES:
      stack.append(tuple(_pop(stack, _TUPLES[name])))
    elif name == 'TUPLE':
      stack.append(tuple(_pop_to_mark(stack)))
    elif name == 'APPEND':
      _extend(stack, _pop(stack, 1))
    elif name == 'APPENDS':
      _extend(stack, _pop_to_mark(stack))
    elif name == 'SETITEM':
      _update(stack, _pop(stack, 2))
    elif name == 'SETITEMS':
      _update(stack, _pop_to_mark(stack))
    elif name in _PUT:
      kept[argument] = _top(stack)
    elif name == 'MEMOIZE':
      kept[len(kept)] = _top(stack)
    elif name in _GET:
      if argument not in kept:
        raise _Refused('a value that it did not keep')
      stack.append(kept[argument])
    elif name == 'GLOBAL':
      stack.append(_named(argument.replace(' ', '.', 1)))
    elif name == 'STACK_GLOBAL':
      module, attribute = _pop(stack, 2)
      stack.append(_named(f'{module}.{attribute}' if isinstance(module, str) and isinstance(attribute, str) else '?'))
    elif name == 'BINPERSID':
      stack.append(_storage(*_pop(stack, 1)))
    elif name == 'REDUCE':
      stack.append(_built(*_pop(stack, 2)))
    elif name == 'BUILD':  # a state dict's `_metadata`, dropped
      _pop(stack, 1)
      if not isinstance(_top(stack), dict):
        raise _Refused('state set on what is no dictionary')
    elif name == 'STOP':
      return _top(stack)
    elif name not in ('PROTO', 'FRAME'):
      raise _Refused(f'the operation {name}')
  raise _Refused('no end')


def _operations(data: bytes) -> Iterator[tuple[Any, Any, int]]:
  try:
    yield from pickletools.genops(data)
  except (ValueError, LookupError) as error:
    raise _Refused(str(error)) from error


def _pop(stack: list[Any], count: int) -> list[Any]:
  values = stack[-count:]
  if len(values) < count or any(value is _MARK for value in values):
    raise _Refused('an operation on too few values')
  del stack[-count:]
  return values


def _pop_to_mark(stack: list[Any]) -> list[Any]:
  for place in range(len(stack) - 1, -1, -1):
    if stack[place] is _MARK:
      values = stack[place + 1:]
      del stack[place:]
      return values
  raise _Refused('an operation on too few values')


def _top(stack: list[Any]) -> Any:
  if not stack or stack[-1] is _MARK:
    raise _Refused('an operation on too few values')
  return stack[-1]


def _extend(stack: list[Any], values: list[Any]) -> None:
  if not isinstance(_top(stack), list):
    raise _Refused('values appended to what is no list')
  stack[-1].extend(values)


def _update(stack: list[Any], pairs: list[Any]) -> None:
  keys, values = pairs[::2], pairs[1::2]
  # Other keys could be nested so deeply that hashing them ends the process.
  if not isinstance(_top(stack), dict) or len(keys) != len(values) or not all(type(key) in (str, int) for key in keys):
    raise _Refused('entries of what is no dictionary of texts')
  stack[-1].update(zip(keys, values, strict=True))


def _named(name: str) -> _Name:
  if name not in _NAMES:
    raise _Refused(f'it names {name}')
  return _Name(name)


def _built(name: Any, arguments: Any) -> Any:
  """What calling a name would give."""
  if name == _Name(_DICT) and arguments == ():
    return {}
  if name == _Name(_REBUILD) and isinstance(arguments, tuple) and len(arguments) >= 4:
    return _tensor(*arguments[:4])
  raise _Refused(f'a call of {shown(name)}')


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
  if not isinstance(storage, _Storage):
    raise _Refused('a tensor without a storage')
  if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not len(shape) == len(strides) <= _MAX_RANK:
    raise _Refused('a tensor with an impossible shape')
  if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
    raise _Refused('a tensor with an impossible shape')
  return LazyTensor(storage, offset, shape, strides)


def _storage(description: Any) -> _Storage:
  if not isinstance(description, tuple) or len(description) != 5:
    raise _Refused('an unknown kind of storage')
  kind, dtype, key, _, count = description
  name = dtype.text.removeprefix('torch.') if isinstance(dtype, _Name) else ''
  if kind != 'storage' or name not in _DTYPES or not isinstance(key, str):
    raise _Refused('an unknown kind of storage')
  if type(count) is not int or count < 0:
    raise _Refused('a storage with an impossible size')
  return _Storage(key, np.dtype(_DTYPES[name]), count)


# ---------------------------------------------------------------- the file


class TorchFile:
  """A `torch.save` file: `content` is its nested containers with `LazyTensor` leaves, `size` its bytes."""

  def __init__(self, path: str | Path):
    """Raises LmsptError for a missing file, another format, or a pickle with anything but plain tensors."""
    self.path = Path(path)
    self._zip = PlainZip(self.path, _MAX_FILE, _KIND)
    self.size = self._zip.size
    descriptions = [name for name in self._zip.names if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(descriptions) != 1:
      raise LmsptError(f'{self.path}: a zip without one NAME/data.pkl: not a torch.save file')
    self._root = descriptions[0].removesuffix('data.pkl')
    if f'{self._root}byteorder' in self._zip.names and self._zip.read(f'{self._root}byteorder', 16) != b'little':
      raise LmsptError(f'{self.path}: saved on a big-endian machine; save it again on a little-endian one')
    try:
      self.content = _describe(self._zip.read(descriptions[0], _MAX_DESCRIPTION))
    except _Refused as e:
      raise LmsptError(
        f'{self.path}: its pickle holds more than plain tensors and containers ({e}); nothing of it was run; '
        'save a plain state dict'
      ) from e

  def read(self, tensor: LazyTensor) -> np.ndarray:
    """The tensor's values, read-only, as stored. Raises LmsptError when it reaches outside its storage."""
    storage = tensor.storage
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    size = storage.count * storage.dtype.itemsize
    data = self._zip.read(f'{self._root}data/{storage.key}', size)
    fits = all(0 <= n <= storage.count for n in tensor.shape) and (
        count == 0 or (count <= storage.count and last < storage.count))
    if len(data) != size or not fits:
      raise LmsptError(f'{self.path}: a tensor of shape {list(tensor.shape)} does not fit its storage: damaged file')
    if count == 0:
      return np.zeros(tensor.shape, storage.dtype)
    flat = np.frombuffer(data, storage.dtype)[tensor.offset :]
    strides = tuple(s * storage.dtype.itemsize for s in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
