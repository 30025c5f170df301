"""Safetensors files: read as strangers may have written them, and written tensor by tensor.

The format holds no code: a header of JSON and bytes. The header's size is held against the file here; its offsets,
shapes and types against each other and the file by `safetensors`, before anything is allocated. `safetensors` itself
writes from a dictionary of all tensors, which it copies: up to two models more in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from tqdm import tqdm

from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import open_plain, size_of

MAX_HEADER = 16 << 20  # bytes; Whisper's large-v3, with 1,259 tensors, has 150 kB
_MAX_RANK = 8
_NUMPY_DTYPES = ('F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'I16', 'I8', 'U64', 'U32', 'U16', 'U8', 'BOOL')


class SafetensorsFile:
  """An open file.

  Attributes:
    size: bytes of the file.
    shapes, dtypes: of the tensors, by name; types as the format calls them, e.g. 'BF16'.
    metadata: texts by name.
  """

  def __init__(self, path: str | Path):
    """Raises LmsptError: missing, no plain file, or anything in it that does not add up."""
    self.path = path
    with open_plain(path) as file:
      self.size, header = size_of(file), int.from_bytes(file.read(8), 'little')
    if not 2 <= header <= min(MAX_HEADER, self.size - 8):
      raise LmsptError(f'{path}: cannot be read as safetensors (a header of {header} bytes in a file of {self.size}): '
                       'cut short, damaged or another format')
    try:
      with safetensors.safe_open(path, framework='numpy') as opened:
        self.metadata: dict[str, str] = opened.metadata() or {}
        slices = {name: opened.get_slice(name) for name in opened.keys()}
      self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
      self.dtypes: dict[str, str] = {name: part.get_dtype() for name, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
      raise LmsptError(f'{path}: cannot be read as safetensors ({error}): cut short, damaged or another format'
                       ) from error

  def read(self, name: str) -> np.ndarray:
    """A tensor as stored. Raises LmsptError for a type or shape that numpy has not."""
    if len(self.shapes[name]) > _MAX_RANK or 0 in self.shapes[name]:
      raise LmsptError(f'{self.path}: tensor {name!r} has shape {shown(self.shapes[name])}: damaged, get it again')
    if self.dtypes[name] not in _NUMPY_DTYPES:
      raise LmsptError(f'{self.path}: tensor {name!r} is {self.dtypes[name]}; save it as float32, float16 or bfloat16')
    try:
      # Opened for each tensor: of a file that stays open all that was read stays mapped, a second copy of the model.
      with safetensors.safe_open(self.path, framework='numpy') as opened:
        return np.asarray(opened.get_tensor(name))
    except (OSError, safetensors.SafetensorError) as error:
      raise LmsptError(f'{self.path}: tensor {name!r} cannot be read ({error}): damaged, get it again') from error


# What the format calls the types that are written.
_WRITTEN_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str,
                      read: Callable[[str], np.ndarray], metadata: dict[str, str]) -> None:
  """Writes a file; memory holds one tensor at a time. Shows a bar on a terminal if it takes seconds.

  Args:
    path: of the file; half of it is there if this fails.
    shapes: of the tensors by name, in the file's order.
    dtype: of all of them, as the format calls it: 'F32', 'F16' or 'BF16'.
    read: gives a tensor of that type and its shape.
    metadata: texts by name.

  Raises OSError.
  """
  numpy_dtype = np.dtype(_WRITTEN_DTYPES[dtype])
  header: dict[str, Any] = {'__metadata__': metadata} if metadata else {}
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + math.prod(shape) * numpy_dtype.itemsize
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
  # A moment's work shows no bar; in a log (None) it would be one endless line.
  bar = tqdm(total=end, desc=f'writing {path.name}', unit='B', unit_scale=True, delay=3, dynamic_ncols=True,
             disable=None)
  with path.open('wb') as file, bar:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, shape in shapes.items():
      value = np.ascontiguousarray(read(name))
      if value.dtype != numpy_dtype or value.shape != tuple(shape):
        raise ValueError(f'{name}: {value.dtype} {value.shape}, not {numpy_dtype} {shape}')
      file.write(value.reshape(-1).view(np.uint8))
      bar.update(value.nbytes)
