"""The codes of one recording, in memory and as an npz file."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmspt_jax.errors import LmsptError
from lmspt_jax.files import PlainZip

# What a codes file holds: name -> (rank, kinds of dtype).
FIELDS = {'ids': (2, 'iu'), 'num_samples': (0, 'iu'), 'sample_rate': (0, 'iu'), 'frame_rate': (0, 'f'),
          'model_hash': (0, 'U')}
WAY_OUT = 'make it again with lmspt encode'
_MAX_BYTES = 64 << 20  # of a file: 46 hours of eight codebooks at 12.5 Hz, in int32
_MAGIC = b'\x93NUMPY\1\0'
_HEADER = re.compile(rb"\{'descr': '([<|>](?:[iu][1248]|f[248]|U\d{1,4}))', 'fortran_order': (True|False), "
                     rb"'shape': \(((?:\d{1,18},? ?){0,2})\), \} *\n")


@dataclass(frozen=True)
class Codes:
  """What `Tokenizer.encode` returns and `Tokenizer.decode` takes.

  Attributes:
    ids: int32 [K, T], codebook 0 is semantic.
    num_samples: length of the recording at `sample_rate`, before padding to whole frames.
    sample_rate: Hz, the model's.
    frame_rate: frames per second.
    model_hash: of the model that made them; '' lets any model decode them.
  """

  ids: np.ndarray
  num_samples: int
  sample_rate: int
  frame_rate: float
  model_hash: str = ''


def ids_dtype(largest_codebook: int) -> np.dtype:
  """Of ids in a file or a stream, little-endian: uint16 where they fit, else int32."""
  return np.dtype('<u2' if largest_codebook <= 2**16 else '<i4')


def write_codes(path: str | os.PathLike, codes: Codes, largest_codebook: int) -> None:
  """One npz without pickled objects; the file appears whole or not at all.

  Args:
    largest_codebook: decides the ids' dtype (`ids_dtype`).

  Raises:
    LmsptError: the file can't be written.
  """
  path = Path(path)
  ids = codes.ids.astype(ids_dtype(largest_codebook))
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      np.savez(file, ids=ids, num_samples=np.int64(codes.num_samples), sample_rate=np.int64(codes.sample_rate),
               frame_rate=np.float64(codes.frame_rate), model_hash=np.str_(codes.model_hash))
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise LmsptError(f"{path}: can't be written ({error.strerror}); check that the folder exists") from error


def read_codes(path: str | os.PathLike) -> Codes:
  """Reads what `write_codes` wrote; checks names, types and shapes (the tokenizer checks the values).

  Raises:
    LmsptError: names the file and what is wrong with it.
  """
  with PlainZip(path, _MAX_BYTES, 'a codes file') as archive:
    missing = [name for name in FIELDS if f'{name}.npy' not in archive.names]
    if missing:
      raise LmsptError(f'{path}: has no {", ".join(missing)}, so it is not a codes file; {WAY_OUT}')
    values = {name: _array(archive.read(f'{name}.npy', _MAX_BYTES), f'{path}: {name}') for name in FIELDS}
  for name, (rank, kinds) in FIELDS.items():
    value = values[name]
    if value.ndim != rank or value.dtype.kind not in kinds:
      raise LmsptError(f'{path}: {name} is {value.dtype} of shape {value.shape}; {WAY_OUT}')
  ids = values['ids']
  if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
    raise LmsptError(f'{path}: ids from {ids.min()} to {ids.max()}, which no codebook has; {WAY_OUT}')
  try:
    model_hash = str(values['model_hash'])
  except ValueError as error:  # numbers that are no characters
    raise LmsptError(f'{path}: model_hash is no text; {WAY_OUT}') from error
  return Codes(ids=ids.astype(np.int32), num_samples=int(values['num_samples']),
               sample_rate=int(values['sample_rate']), frame_rate=float(values['frame_rate']), model_hash=model_hash)


def _array(data: bytes, what: str) -> np.ndarray:
  """An npy file's array, numbers or text. Its header is Python's text of a dictionary, which nothing evaluates here."""
  length = int.from_bytes(data[8:10], 'little')
  header = _HEADER.fullmatch(data[10:10 + length])
  if data[:8] != _MAGIC or not header:
    raise LmsptError(f'{what} is not a plain array of numbers or text; {WAY_OUT}')
  dtype, shape = np.dtype(header[1].decode()), tuple(map(int, header[3].replace(b',', b' ').split()))
  if math.prod(shape) * dtype.itemsize != len(data) - 10 - length or not dtype.itemsize:
    raise LmsptError(f'{what} is {dtype} of shape {shape}, but has {len(data) - 10 - length} bytes; {WAY_OUT}')
  values = np.frombuffer(data, dtype, offset=10 + length)
  return values.reshape(shape, order='F' if header[2] == b'True' else 'C')
