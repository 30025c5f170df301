"""Files that strangers may have written: opened only if they are plain files, and not believed about their sizes.

Symbolic links are followed, as model hubs' caches are made of them. Pipes, devices and folders in a file's place are
refused, as reading them may never end. What a format's header says is held against the file before anything of that
size is allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from lmspt_jax.errors import LmsptError

MAX_JSON = 4 << 20  # bytes; parsed, they can take twenty times as much
# What zipfile raises for archives that are damaged, or meant to be.
_ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, OverflowError,
               struct.error)


def open_plain(path: str | os.PathLike) -> BinaryIO:
  """Opens a file for reading. Raises LmsptError: there is none, it can't be read, or it is a pipe, device or folder."""
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which waits for no one to fill a pipe
  except FileNotFoundError as error:
    raise LmsptError(f'{path}: no such file; check the path') from error
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
    raise LmsptError(f'{path}: can\'t be read ({getattr(error, "strerror", error)}); check the path') from error
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise LmsptError(f'{path}: not a plain file; check the path')
  return os.fdopen(descriptor, 'rb')


def size_of(file: BinaryIO) -> int:
  """Bytes of an open file."""
  return os.fstat(file.fileno()).st_size


def sha256(*paths: str | os.PathLike) -> str:
  """Of files put end to end, in hexadecimal. Raises LmsptError as `open_plain` does."""
  digest = hashlib.sha256()
  for path in paths:
    with open_plain(path) as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


def read_plain(path: str | os.PathLike, limit: int) -> bytes:
  """The bytes of a file. Raises LmsptError: what `open_plain` raises, or more than `limit` bytes."""
  with open_plain(path) as file:
    data = file.read(limit + 1)
  if len(data) > limit:
    raise LmsptError(f'{path}: more than {limit} bytes, more than such a file has; check the path')
  return data


def read_json(path: str | os.PathLike, limit: int = MAX_JSON) -> Any:
  """The value in a file of JSON. Raises LmsptError: what `read_plain` and `parse_json` raise."""
  return parse_json(read_plain(path, limit), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
  """The value of a text of JSON in UTF-8. Raises LmsptError naming `where`: it is none, or nested too deeply."""
  try:
    return json.loads(text.decode('utf-8') if isinstance(text, bytes) else text)
  except (ValueError, RecursionError) as error:
    raise LmsptError(f'{where}: not JSON ({error}): damaged or cut short, get it again') from error


def writable_folder(out: str | os.PathLike) -> Path:
  """The folder of --out, made if it is not there. Raises LmsptError: it can't be made or written."""
  try:
    Path(out).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise LmsptError(f"--out={out}: this folder can't be made ({error.strerror}); choose another") from error
  if not os.access(out, os.W_OK | os.X_OK):
    raise LmsptError(f"--out={out}: this folder can't be written; choose another or change its permissions")
  return Path(out)


class PlainZip:
  """A zip whose members are stored as they are, read by name. Nothing is ever unpacked to a file.

  Attributes:
    names: of the members, each once.
    size: bytes of the file.
  """

  def __init__(self, path: str | Path, limit: int, kind: str):
    """`limit` is of the file's bytes; `kind` says in messages what it should be.

    Raises LmsptError: what `open_plain` raises, no zip, too large, or two members of the same name.
    """
    self._path, self._kind = path, kind
    self._file = open_plain(path)
    self.size = size_of(self._file)
    try:
      if self.size > limit:
        raise LmsptError(f'{path}: {self.size} bytes, more than {kind} has; check the path')
      self._zip = zipfile.ZipFile(self._file)
      self.names = self._zip.namelist()
      if len(set(self.names)) != len(self.names):
        raise LmsptError(f'{path}: holds two members of one name: not {kind}, get it again')
    except _ZIP_FAULTS as error:
      self._file.close()
      raise LmsptError(f'{path}: not {kind}, or damaged ({error}); get it again') from error
    except LmsptError:
      self._file.close()
      raise

  def read(self, name: str, limit: int) -> bytes:
    """A member, at most `limit` bytes. Raises LmsptError: missing, compressed, encrypted, too large or damaged."""
    try:
      info = self._zip.getinfo(name)
      # A compressed member could unpack to any size, and a size that is no more than said is allocated all the same.
      if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise LmsptError(f'{self._path}: member {name} is compressed, which {self._kind} never is')
      if info.file_size > min(limit, self.size - info.header_offset):
        raise LmsptError(f'{self._path}: member {name} says {info.file_size} bytes, which it can\'t have: damaged, get '
                         'it again')
      return self._zip.read(info)
    except KeyError as error:
      raise LmsptError(f'{self._path}: has no member {name}, so it is not {self._kind}') from error
    except _ZIP_FAULTS as error:
      raise LmsptError(f'{self._path}: member {name} can\'t be read ({error}): damaged, get it again') from error

  def close(self) -> None:
    self._zip.close()
    self._file.close()

  def __enter__(self) -> PlainZip:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
