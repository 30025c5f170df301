"""A bounded folder of what was fetched from object stores, shared by all processes of a machine.

$LMSPT_CACHE/files, at most $LMSPT_CACHE_GB (50) gigabytes. An entry is a file named by a hash of its key; keys name
the content's version, so entries are never stale and never rewritten, and whoever used one last keeps it longest.
A `.used` file holds the bytes accounted for; whoever changes it holds a lock on it. Space is accounted for before
it is written, so that a write that fails leaves the count too high, which the next scan of the folder mends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lmspt_jax.data.index import cache_folder
from lmspt_jax.errors import LmsptError

DEFAULT_GB = 50
_KEPT = 0.9  # of the bound, once it was reached: a scan of the folder makes room for many entries
_STALE = 3600  # seconds without a write after which a temporary file's process is taken for dead


def limit() -> int:
  """Bytes that may be cached. Raises LmsptError if $LMSPT_CACHE_GB is no size."""
  given = os.environ.get('LMSPT_CACHE_GB') or str(DEFAULT_GB)
  try:
    gigabytes = float(given)
  except ValueError:
    gigabytes = math.nan
  if not 0 <= gigabytes < 1e9:
    raise LmsptError(f'LMSPT_CACHE_GB = {given!r}: must be a number of gigabytes, 0 or more')
  return int(gigabytes * 1e9)


def find(key: str, size: int) -> Path | None:
  """The entry, marked as just used; None if there is none or its size is not `size` bytes."""
  path = _entry(key)
  try:
    if path.stat().st_size != size:
      return None
    os.utime(path)
  except FileNotFoundError:  # also: evicted a moment ago
    return None
  except OSError as error:
    raise _unusable(error) from error
  return path


def read(key: str, size: int) -> bytes | None:
  """The entry's bytes, or None."""
  path = find(key, size)
  try:
    data = path.read_bytes() if path else b''
  except FileNotFoundError:
    return None
  except OSError as error:
    raise _unusable(error) from error
  return data if path and len(data) == size else None


def add(key: str, size: int, fill: Callable[[Path], object]) -> Path | None:
  """Makes an entry of `size` bytes of what `fill` writes to the path it is given; None if the bound has no room for it.

  The least recently used entries go if there is no room. What `fill` raises passes, and leaves no entry.

  Raises LmsptError when the cache folder can't be written.
  """
  if size > limit():
    return None
  path = _entry(key)
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.{size}.tmp')  # hosts may share the folder
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _account(size, temporary):
      return None
    try:
      fill(temporary)
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
  except OSError as error:
    raise _unusable(error) from error
  return path


@contextlib.contextmanager
def only_one(key: str) -> Iterator[None]:
  """Held by one thread of one process at a time for the same key, so that a large file is fetched once."""
  path = _entry(key)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name('.lock'), 'ab')
  except OSError as error:
    raise _unusable(error) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _folder() -> Path:
  return cache_folder() / 'files'


def _entry(key: str) -> Path:
  name = hashlib.sha256(key.encode()).hexdigest()[:40]
  return _folder() / name[:2] / name[2:]


def _unusable(error: OSError) -> LmsptError:
  return LmsptError(f'{_folder()}: the cache can\'t be used ({error.strerror or error}); set LMSPT_CACHE to a folder '
                    'with room')


def _account(size: int, temporary: Path) -> bool:
  """Adds to the bytes accounted for, if there is room. `temporary`, made meanwhile, tells a scan of it."""
  with open(_folder() / '.used', 'a+b') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    text = file.read(32)
    used = int(text) if text.isdigit() else None
    if used is None or used + size > limit():
      used = _evict(limit() - size)
    granted = used + size <= limit()
    file.truncate(0)
    file.write(str(used + size * granted).encode())
    if granted:
      temporary.touch()
    return granted


def _evict(room: int) -> int:
  """Removes the least recently used entries if there are more than `room` bytes; returns the bytes that stay."""
  entries, used = [], 0
  for folder in os.scandir(_folder()):
    if not folder.is_dir(follow_symlinks=False):
      continue
    for entry in os.scandir(folder):
      with contextlib.suppress(FileNotFoundError):  # a temporary file, renamed or removed meanwhile
        found = entry.stat(follow_symlinks=False)
        size = int(entry.name.split('.')[-2]) if entry.name.endswith('.tmp') else found.st_size
        used += size
        if not entry.name.startswith('.') or (size and found.st_mtime < time.time() - _STALE):  # `.lock` is empty
          entries.append((found.st_mtime_ns, size, entry.path))
  if used > room:
    for _, size, path in sorted(entries):
      if used <= room * _KEPT:
        break
      Path(path).unlink(missing_ok=True)
      used -= size
  return used
