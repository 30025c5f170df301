"""Keeps the mp3 decoder's remarks off the standard error stream: it has no switch that libsndfile would set."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_REMARK = re.compile(rb'.*libmpg123.*|Note: .*|Warning: .*|\s*')
_lock = threading.RLock()


@cache
def _sink(process: int) -> int:
  """A file without a name, one a process."""
  with tempfile.TemporaryFile() as file:
    return os.dup(file.fileno())


@contextmanager
def quiet_decoder() -> Iterator[None]:
  """Swallows lines of libmpg123's on descriptor 2; what anyone else writes meanwhile is written out afterwards."""
  with _lock:
    sink = _sink(os.getpid())
    try:
      kept = os.dup(2)
    except OSError:  # closed, as a daemon's may be
      kept = None
    if kept is None:
      yield
      return
    os.dup2(sink, 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      _pass_on(sink)


def _pass_on(sink: int) -> None:
  size = os.lseek(sink, 0, os.SEEK_END)
  if size:
    lines = os.pread(sink, size, 0).splitlines(keepends=True)
    os.ftruncate(sink, 0)
    os.lseek(sink, 0, os.SEEK_SET)
    others = b''.join(line for line in lines if not _REMARK.fullmatch(line.rstrip(b'\n')))
    if others:
      os.write(2, others)
