"""The codes of one recording, in memory and as an npz file."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmspt_jax.errors import LmsptError

# What a codes file holds: name -> (rank, kinds of dtype).
FIELDS = {'ids': (2, 'iu'), 'num_samples': (0, 'iu'), 'sample_rate': (0, 'iu'), 'frame_rate': (0, 'f'),
          'model_hash': (0, 'U')}
WAY_OUT = 'make it again with lmspt encode'


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


def write_codes(path: str | os.PathLike, codes: Codes, largest_codebook: int) -> None:
  """One npz without pickled objects; the file appears whole or not at all.

  Args:
    largest_codebook: ids are uint16 if this is at most 65536, else int32.

  Raises:
    LmsptError: the file can't be written.
  """
  path = Path(path)
  ids = codes.ids.astype(np.uint16 if largest_codebook <= 2**16 else np.int32)
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
  try:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
      raise LmsptError(f'{path}: a single array, not a codes file; {WAY_OUT}')
    with archive:
      missing = [name for name in FIELDS if name not in archive]
      if missing:
        raise LmsptError(f'{path}: has no {", ".join(missing)}, so it is not a codes file; {WAY_OUT}')
      values = {name: archive[name] for name in FIELDS}
  except FileNotFoundError as error:
    raise LmsptError(f'{path}: no such file; check the path') from error
  except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise LmsptError(f'{path}: not a codes file, or damaged ({type(error).__name__}); {WAY_OUT}') from error
  for name, (rank, kinds) in FIELDS.items():
    value = values[name]
    if value.ndim != rank or value.dtype.kind not in kinds:
      raise LmsptError(f'{path}: {name} is {value.dtype} of shape {value.shape}; {WAY_OUT}')
  ids = values['ids']
  if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
    raise LmsptError(f'{path}: ids from {ids.min()} to {ids.max()}, which no codebook has; {WAY_OUT}')
  return Codes(ids=ids.astype(np.int32), num_samples=int(values['num_samples']),
               sample_rate=int(values['sample_rate']), frame_rate=float(values['frame_rate']),
               model_hash=str(values['model_hash']))
