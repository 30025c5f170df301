"""A seekable binary file over a function that gives ranges of bytes."""

from __future__ import annotations

import io
from collections.abc import Callable

from lmspt_jax.errors import LmsptError

_BUFFER = 64 << 10  # bytes read at a time: libsndfile asks for a few kilobytes


class RangeFile(io.BufferedReader):
  """Bytes [0, size) as `read(start, stop)` gives them; `close` is called once, when the file is closed.

  An LmsptError of `read` is raised from here and kept in `fault`. libsndfile takes no exceptions from a file: whoever
  hands it this one sets `raises` to False, upon which the file ends where the fault is, and looks at `fault` when
  decoding fails or comes out short.
  """

  def __init__(self, size: int, read: Callable[[int, int], bytes], close: Callable[[], None] | None = None):
    super().__init__(_Raw(size, read, close), _BUFFER)

  @property
  def fault(self) -> LmsptError | None:
    return self.raw.fault

  @property
  def raises(self) -> bool:
    return self.raw.raises

  @raises.setter
  def raises(self, value: bool) -> None:
    self.raw.raises = value


class _Raw(io.RawIOBase):

  def __init__(self, size: int, read: Callable[[int, int], bytes], close: Callable[[], None] | None):
    super().__init__()
    self.fault: LmsptError | None = None
    self.raises = True
    self._size, self._read, self._close, self._position = size, read, close, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    position = offset + (0, self._position, self._size)[whence]
    if position < 0:
      raise ValueError(f'seek to {position}')
    self._position = position
    return position

  def readinto(self, buffer: bytearray | memoryview) -> int:
    stop = min(self._position + len(buffer), self._size)
    if self._position >= stop or (self.fault and not self.raises):
      return 0
    try:
      data = self._read(self._position, stop)
    except LmsptError as error:
      self.fault = error
      if self.raises:
        raise
      return 0
    buffer[:len(data)] = data
    self._position += len(data)
    return len(data)

  def close(self) -> None:
    close, self._close = self._close, None
    super().close()
    if close:
      close()
