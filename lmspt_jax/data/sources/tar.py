"""The members of a tar file, found by reading headers only. Nothing is ever unpacked.

Header blocks are parsed by the standard library, member by member rather than through `TarFile`, which takes a damaged
header or a missing end for the end of the archive and reads extended headers of any size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError

_MAX_EXTENDED = 1 << 20  # bytes of one extended header
_MAGIC = {b'\x1f\x8b': 'gunzip', b'BZh': 'bunzip2', b'\xfd7zXZ': 'unxz', b'\x28\xb5\x2f\xfd': 'unzstd'}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Member:
  name: str  # as it stands in the tar: may be absolute or lead out of the folder
  is_file: bool  # with bytes of its own: no link, folder, device, or file with holes
  offset: int  # of its bytes in the tar
  size: int  # bytes


def members(read: Callable[[int, int], bytes], size: int, *, name: str) -> Iterator[Member]:
  """Members in the tar's order, each wholly inside the file.

  Args:
    read: gives bytes [start, stop) of the tar.
    size: bytes of the tar.
    name: what errors call the tar.

  Raises:
    AudioError: after the last member that can be trusted, if there is more or no end: truncated (the file ends within
      a member, or before the end mark), undecodable (a damaged header; a file with holes in GNU's old format).
    LmsptError: a compressed tar.
  """
  position, extended = 0, {}
  while True:
    if position + tarfile.BLOCKSIZE > size:
      if position == 0:
        _check_compressed(read(0, size), name)
      raise _truncated(name, size)
    block = read(position, position + tarfile.BLOCKSIZE)
    if not any(block):
      return
    try:
      header = tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape')
      length = int(extended.get('size', header.size))
      if length < 0:
        raise tarfile.InvalidHeaderError('negative size')
      if header.type == tarfile.GNUTYPE_SPARSE:
        raise tarfile.InvalidHeaderError('a file with holes; make the tar without --sparse')
    except (tarfile.HeaderError, ValueError) as error:
      if position == 0:
        _check_compressed(block, name)
      raise _damaged(name, position, error) from error
    data = position + tarfile.BLOCKSIZE
    stored = 0 if header.type in _WITHOUT_DATA else length
    if data + stored > size:
      raise _truncated(name, size)
    following = data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
      if length > _MAX_EXTENDED:
        raise _damaged(name, position, f'an extended header of {length} bytes')
      try:
        body = read(data, data + length)
        extended |= {'path': _text(body.rstrip(b'\0'))} if header.type == tarfile.GNUTYPE_LONGNAME else _pax(body)
      except ValueError as error:
        raise _damaged(name, position, error) from error
    elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
      named = extended.get('path') or _text(header.name.encode('utf-8', 'surrogateescape'))
      holes = any(key.startswith('GNU.sparse.') for key in extended)
      yield Member(named, header.type in _FILES and not holes, data, length)
      extended = {}
    position = following


def _text(data: bytes) -> str:
  """UTF-8; old tars' names that are none, byte by byte."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError:
    return data.decode('latin-1')


def _pax(body: bytes) -> dict[str, str]:
  """Records 'LENGTH KEY=VALUE\\n'. Raises ValueError."""
  found, position = {}, 0
  while position < len(body):
    digits, space, _ = body[position:position + 12].partition(b' ')
    length = int(digits) if digits.isdigit() else 0
    record = body[position + len(digits) + 1:position + length]
    key, equals, value = record.partition(b'=')
    if not space or not equals or not value.endswith(b'\n') or position + length > len(body):
      raise ValueError('an extended header that does not follow the format')
    found[_text(key)] = _text(value[:-1])
    position += length
  if not found.get('size', '0').isdecimal() or len(found.get('size', '')) > 20:
    raise ValueError('an extended header with a bad size')
  return found


def _check_compressed(block: bytes, name: str) -> None:
  for magic, command in _MAGIC.items():
    if block.startswith(magic):
      raise LmsptError(f'{name}: is compressed, so its members can\'t be sought; unpack it with {command}')


def _truncated(name: str, size: int) -> AudioError:
  return AudioError(f'{name}: cut short after {size} bytes; fetch it again', 'truncated')


def _damaged(name: str, position: int, cause: object) -> AudioError:
  return AudioError(f'{name}: damaged at byte {position} ({cause}); fetch it again', 'undecodable')
