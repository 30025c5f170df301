"""Reads tensors out of a `torch.save` file without torch and without running its pickle's code.

The file is a zip: NAME/data.pkl describes nested containers, NAME/data/KEY holds a storage's bytes. The description
is unpickled with an allow-list of three kinds of names, all replaced by inert stand-ins of this module, so the worst
a file can do is to be refused. Storages are read when a tensor is asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmspt_jax.errors import LmsptError

_MAX_DESCRIPTION = 1 << 26  # bytes of data.pkl: 64 MiB, hundreds of thousands of tensors
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


class _Inert:
  """Base of the stand-ins: holds nothing that a pickle could set."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    raise pickle.UnpicklingError('state set on a stand-in')


class _StorageType(_Inert):
  __slots__ = ('name',)

  def __init__(self, name: str):
    self.name = name


class _Rebuild(_Inert):
  """Stands for torch._utils._rebuild_tensor_v2: calling it only notes its arguments."""

  __slots__ = ()

  def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> LazyTensor:
    if not isinstance(storage, _Storage):
      raise pickle.UnpicklingError('a tensor without a storage')
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
      raise pickle.UnpicklingError('a tensor with an impossible shape')
    return LazyTensor(storage, offset, tuple(shape), tuple(strides))


class _Dict(dict):
  """Stands for collections.OrderedDict. A state dict's `_metadata` comes as its state and is dropped."""

  def __setstate__(self, state: Any) -> None:
    pass


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


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return _Dict
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return _Rebuild()
    if module == 'torch' and name in _DTYPES:
      return _StorageType(name)
    raise pickle.UnpicklingError(f'it names {module}.{name}')

  def persistent_load(self, pid: Any) -> _Storage:
    kind, storage_type, key, _, count = pid
    if kind != 'storage' or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
      raise pickle.UnpicklingError('an unknown kind of storage')
    if type(count) is not int or count < 0:
      raise pickle.UnpicklingError('a storage with an impossible size')
    return _Storage(key, np.dtype(_DTYPES[storage_type.name]), count)


class TorchFile:
  """A `torch.save` file: `content` is its nested containers with `LazyTensor` leaves."""

  def __init__(self, path: str | Path):
    """Raises LmsptError for a missing file, another format, or a pickle with anything but plain tensors."""
    self.path = Path(path)
    if not self.path.is_file():
      raise LmsptError(f'{self.path}: no such file')
    try:
      self._zip = zipfile.ZipFile(self.path)
    except zipfile.BadZipFile as e:
      raise LmsptError(f'{self.path}: not a torch.save file of PyTorch 1.6 or later, or cut short ({e})') from e
    descriptions = [name for name in self._zip.namelist() if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(descriptions) != 1:
      raise LmsptError(f'{self.path}: a zip without one NAME/data.pkl: not a torch.save file')
    self._root = descriptions[0].removesuffix('data.pkl')
    if f'{self._root}byteorder' in self._zip.namelist() and self._member('byteorder', 16) != b'little':
      raise LmsptError(f'{self.path}: saved on a big-endian machine; save it again on a little-endian one')
    try:
      self.content = _Unpickler(io.BytesIO(self._member('data.pkl', _MAX_DESCRIPTION))).load()
    except (pickle.UnpicklingError, TypeError, ValueError, AttributeError, LookupError, EOFError, OverflowError) as e:
      raise LmsptError(
        f'{self.path}: its pickle holds more than plain tensors and containers ({e}); nothing of it was run; '
        'save a plain state dict'
      ) from e

  def _member(self, name: str, limit: int) -> bytes:
    try:
      info = self._zip.getinfo(self._root + name)
      # torch.save never compresses, and a compressed member could unpack to any size.
      if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit or info.file_size > info.compress_size:
        raise LmsptError(f'{self.path}: member {info.filename} is compressed or too large ({info.file_size} bytes)')
      return self._zip.read(info)
    except (KeyError, zipfile.BadZipFile, EOFError) as e:
      raise LmsptError(f'{self.path}: member {self._root + name} cannot be read: damaged, fetch it again ({e})') from e

  def read(self, tensor: LazyTensor) -> np.ndarray:
    """The tensor's values, read-only, as stored. Raises LmsptError when it reaches outside its storage."""
    storage = tensor.storage
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    size = storage.count * storage.dtype.itemsize
    data = self._member(f'data/{storage.key}', size)
    if len(data) != size or count > storage.count or (count and last >= storage.count):
      raise LmsptError(f'{self.path}: a tensor of shape {list(tensor.shape)} does not fit its storage: damaged file')
    flat = np.frombuffer(data, storage.dtype)[tensor.offset :]
    strides = tuple(s * storage.dtype.itemsize for s in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
