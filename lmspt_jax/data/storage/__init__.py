"""Bytes of files, local or in an object store (gs://, s3://, http(s)://), with a bounded cache of what was fetched.

Files in a store are taken not to change while a process runs: their size and version are looked up once.
"""

from __future__ import annotations

import glob
import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.storage import file_cache, remote
from lmspt_jax.data.storage.range_file import RangeFile
from lmspt_jax.errors import LmsptError

MAX_FILES = 200_000  # that one pattern may stand for
SMALL = 1 << 20  # bytes; a range up to this long is fetched at once
BLOCK = 256 << 10  # bytes; the unit that a longer one in a store is fetched in
_BLOCKS_HELD = 4  # per open file
_THREADS = 32  # requests at a time when many files are looked up
_MAX_VERSIONS = 1 << 17  # files a process remembers the version of
_BRACES = re.compile(r'\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}')
_GLOB = re.compile(r'[*?[]')


@dataclass(frozen=True)
class Stat:
  size: int  # bytes
  version: str  # changes when the file's content does: size and time of change, or the store's etag


_versions: OrderedDict[str, Stat] = OrderedDict()
_lock = threading.Lock()


# ---------------------------------------------------------------- names


def is_url(path: str | os.PathLike) -> bool:
  """Whether `path` names a store (SCHEME://...) rather than a local file."""
  return '://' in str(path)


def join(root: str, name: str) -> str:
  """The path or URL of a file under a folder; `name` as it stands in a URL."""
  return f'{root.rstrip("/")}/{name}' if is_url(root) else str(Path(root) / name)


def is_http(path: str) -> bool:
  return is_url(path) and remote.scheme_of(path) in ('http', 'https')


def expand(pattern: str) -> list[str]:
  """The files a pattern stands for, sorted, each once: brace ranges ({000..099}, {a,b}) and globs, local or in a store.

  A name without a glob is in the list whether or not there is such a file.

  Raises:
    LmsptError: over MAX_FILES names; a glob over http, which has no listings; an unknown scheme.
    AudioError: unreachable.
  """
  names = _expand_braces(pattern)
  found: set[str] = set()
  for name in names:
    if is_url(name):
      found.update(_expand_url(name) if _GLOB.search(name) else [name])
    else:
      name = os.path.expanduser(name)
      found.update(glob.glob(name, recursive=True) if _GLOB.search(name) and not os.path.exists(name) else [name])
  return sorted(found)


def files_of(pattern: str) -> tuple[list[str], str]:
  """(the files a pattern stands for, local ones as absolute paths; the deepest folder that holds them all).

  Both empty where there are none, or where the pattern is a folder.

  Raises:
    LmsptError: files in different stores, and what `expand` raises.
  """
  paths = [path if is_url(path) else os.path.abspath(path) for path in expand(pattern)]
  if not paths or os.path.isdir(paths[0]):
    return [], ''
  root = paths[0].rpartition('/')[0]
  while root and not all(path.startswith(f'{root}/') for path in paths):
    root = root.rpartition('/')[0]
  if not root and any(map(is_url, paths)):
    raise LmsptError(f'{pattern}: names files in different stores; give each of them as a corpus of its own')
  return paths, root


def _expand_braces(pattern: str) -> list[str]:
  names, done = [pattern], []
  while names:
    name = names.pop()
    match = _BRACES.search(name)
    if not match:
      done.append(name)
      continue
    low, high, listed = match.groups()
    if listed is None:
      first, last = sorted((int(low), int(high)))
      width = len(low) if low.startswith('0') or high.startswith('0') else 0
      count, choices = last - first + 1, (str(number).zfill(width) for number in range(first, last + 1))
    else:
      choices = listed.split(',')
      count = len(choices)
    if count + len(names) + len(done) > MAX_FILES:
      raise LmsptError(f'{pattern}: stands for more than {MAX_FILES} files; use fewer, larger ones')
    names.extend(name[:match.start()] + choice + name[match.end():] for choice in choices)
  return done


def _expand_url(pattern: str) -> list[str]:
  if is_http(pattern):
    if '*' in pattern:
      raise LmsptError(f'{pattern}: http has no listings to find "*" in; write a range such as {{000..099}}')
    return [pattern]  # ? begins a query
  return remote.call(pattern, lambda fs, path: [fs.unstrip_protocol(found) for found in fs.glob(path)], name=pattern)


def find(root: str) -> list[str]:
  """Every file under a URL that can be listed, relative to it. Raises AudioError: unreachable."""

  def listed(fs, path: str) -> list[str]:
    return [found.removeprefix(f'{path}/') for found in fs.find(path) if found.startswith(f'{path}/')]

  return remote.call(root.rstrip('/'), listed, name=root)


# ---------------------------------------------------------------- size and version


def stat(path: str, *, name: str = '') -> Stat:
  """Raises AudioError: missing, unreachable."""
  if is_url(path):
    return _stat_url(path, name or path)
  try:
    found = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
    raise _local_error(error, name or path) from error
  if not S_ISREG(found.st_mode):  # reading a pipe or a device may never end
    raise AudioError(f'{name or path}: not a plain file; check the path', 'undecodable')
  return Stat(found.st_size, f'{found.st_size}:{found.st_mtime_ns}')


def stats(paths: Sequence[str]) -> list[Stat | AudioError]:
  """`stat` of many files at a time; where it raises an AudioError, that."""

  def one(path: str) -> Stat | AudioError:
    try:
      return stat(path)
    except AudioError as error:
      return error

  if not any(map(is_url, paths)):
    return list(map(one, paths))
  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(one, paths))


def _stat_url(url: str, name: str) -> Stat:
  with _lock:
    if url in _versions:
      _versions.move_to_end(url)
      return _versions[url]
  info = remote.call(url, lambda fs, path: fs.info(path), name=name)
  if info.get('type') == 'directory':
    raise AudioError(f'{name}: is a folder, not a file; give the files in it', 'missing')
  if not isinstance(info.get('size'), int):
    raise AudioError(f'{name}: the server does not tell its size; use another server', 'unreachable')
  fields = ('ETag', 'etag', 'generation', 'mtime', 'LastModified', 'Last-Modified', 'updated', 'created')
  found = Stat(info['size'], f'{info["size"]}:{next((str(info[field]) for field in fields if info.get(field)), "")}')
  with _lock:
    _versions[url] = found
    if len(_versions) > _MAX_VERSIONS:
      _versions.popitem(last=False)
  return found


def _local_error(error: OSError | ValueError, name: str) -> AudioError:
  reason = 'missing' if isinstance(error, FileNotFoundError | NotADirectoryError) else 'undecodable'
  return AudioError(f'{name}: can\'t be read ({getattr(error, "strerror", error)}); check the path', reason)


# ---------------------------------------------------------------- whole files


def local_copy(path: str, *, name: str) -> Path:
  """The file itself if it is local; else a whole copy in the cache folder.

  Raises:
    AudioError: missing, unreachable, truncated.
    LmsptError: the cache folder can't be written or is too small for the file.
  """
  found = stat(path, name=name)
  if not is_url(path):
    return Path(path)
  key = f'{path}\0{found.version}'

  def fill(copy: Path) -> None:
    remote.call(path, lambda fs, inside: fs.get_file(inside, str(copy)), name=name)
    if copy.stat().st_size != found.size:
      raise _short(name, copy.stat().st_size, found.size)

  with file_cache.only_one(key):
    copy = file_cache.find(key, found.size) or file_cache.add(key, found.size, fill)
  if copy is None:
    raise LmsptError(f'{name}: {found.size} bytes, more than there is room for in the cache of {file_cache.limit()}; '
                     'raise LMSPT_CACHE_GB')
  return copy


def _short(name: str, got: int, wanted: int) -> AudioError:
  return AudioError(f'{name}: cut short, {got} of {wanted} bytes; fetch it again', 'truncated')


# ---------------------------------------------------------------- parts of files


@contextmanager
def reader(path: str, *, name: str) -> Iterator[Callable[[int, int], bytes]]:
  """A function that gives bytes [start, stop) of a file, nothing cached. Both raise what `FileRange.read` raises."""
  if is_url(path):
    yield lambda start, stop: _request(path, start, stop, name)
    return
  descriptor = _open_local(path, name)
  try:
    yield lambda start, stop: _pread(descriptor, start, stop, name)
  finally:
    os.close(descriptor)


def _open_local(path: str, name: str) -> int:
  try:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except OSError as error:
    raise _local_error(error, name) from error


def _pread(descriptor: int, start: int, stop: int, name: str) -> bytes:
  parts, position = [], start
  while position < stop:
    try:
      part = os.pread(descriptor, min(stop - position, 1 << 30), position)
    except OSError as error:
      raise _local_error(error, name) from error
    if not part:
      raise _short(name, position - start, stop - start)
    parts.append(part)
    position += len(part)
  return parts[0] if len(parts) == 1 else b''.join(parts)


def _request(url: str, start: int, stop: int, name: str) -> bytes:
  size = _stat_url(url, name).size
  if stop > size:
    raise _short(name, max(0, size - start), stop - start)
  if stop <= start:
    return b''
  data = remote.call(url, lambda fs, path: fs.cat_file(path, start=start, end=stop), name=name)
  if len(data) > stop - start:
    raise LmsptError(f'{url}: the server does not serve ranges of bytes; use one that does, or download the files')
  if len(data) < stop - start:
    raise _short(name, len(data), stop - start)
  return data


def _cached_request(url: str, start: int, stop: int, name: str) -> bytes:
  key = f'{url}\0{_stat_url(url, name).version}\0{start}-{stop}'
  data = file_cache.read(key, stop - start)
  if data is None:
    data = _request(url, start, stop, name)
    file_cache.add(key, stop - start, lambda path: path.write_bytes(data))
  return data


@dataclass(frozen=True)
class FileRange:
  """Bytes [start, start + size) of a file or URL; size None: to its end."""

  path: str
  start: int
  size: int | None

  def open(self, *, name: str) -> BinaryIO:
    """A seekable file of the range that fetches what is read. Close it.

    This, and reading it, raises AudioError: missing, truncated, unreachable. See `RangeFile` before giving it to
    libsndfile.
    """
    size = self._size(name)
    if is_url(self.path):
      return io.BytesIO(self.read(name=name)) if size <= SMALL else RangeFile(
        size, _Blocks(self.path, self.start, size, name))
    file, base = _open_local(self.path, name), self.start
    return RangeFile(size, lambda start, stop: _pread(file, base + start, base + stop, name), lambda: os.close(file))

  def read(self, *, name: str) -> bytes:
    """All of the range. Raises AudioError: missing, truncated, unreachable."""
    stop = self.start + self._size(name)
    if is_url(self.path):
      return _cached_request(self.path, self.start, stop, name)
    with reader(self.path, name=name) as read:
      return read(self.start, stop)

  def _size(self, name: str) -> int:
    return stat(self.path, name=name).size - self.start if self.size is None else self.size


class _Blocks:
  """Bytes of a range in a store, fetched in blocks: the last few stay in memory, all of them in the cache."""

  def __init__(self, url: str, start: int, size: int, name: str):
    self._url, self._start, self._size, self._name = url, start, size, name
    self._held: OrderedDict[int, bytes] = OrderedDict()
    stat(url, name=name)  # a missing file is told of now rather than when it is read

  def __call__(self, start: int, stop: int) -> bytes:
    """At least one byte from `start` on, none past `stop`."""
    number, offset = divmod(start, BLOCK)
    if number not in self._held:
      first = self._start + number * BLOCK
      self._held[number] = _cached_request(self._url, first, min(first + BLOCK, self._start + self._size), self._name)
      if len(self._held) > _BLOCKS_HELD:
        self._held.popitem(last=False)
    self._held.move_to_end(number)
    return self._held[number][offset:offset + stop - start]
