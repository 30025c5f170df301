"""What the headers of audio files promise, where libsndfile takes it on trust or has to guess.

A WAV or AIFF that ends before its data chunk does is read by libsndfile as a shorter one, and an mp3 without a Xing
tag is taken to have its first frame's bitrate throughout.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

_STREAMED = 0x7FFFF000  # sizes from here on mean "not known when the header was written"
_MAX_CHUNKS = 1000
_MAX_JUNK = 64 << 10  # bytes after the last mp3 frame
_TAGS = (b'TAG', b'APETAGEX', b'LYRICSBEGIN', b'ID3', b'3DI')
_BITRATES = {  # kbit/s of layer III by the header's four bits; 0 (free format) and 15 are not walked
  3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),  # MPEG-1
  2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),  # MPEG-2 and 2.5
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


@dataclass(frozen=True)
class Container:
  """What is wrong with a file."""

  missing: int = 0  # bytes that the header promises past the end of the file
  broken: bool = False  # an mp3 whose frames don't follow on one another
  content: bytes | None = None  # to be decoded in its place


def inspect(file: BinaryIO) -> Container:
  """Reads the header of a seekable file. Raises what the file raises; leaves it at its beginning."""
  head = file.read(12)
  found = Container()
  if head[:4] in (b'RIFF', b'RIFX', b'RF64', b'FORM') and head[8:] in (b'WAVE', b'AIFF', b'AIFC'):
    found = _chunks(file, head)
  elif head[:3] == b'ID3' or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # MPEG layer III
    found = _mp3(file, head)
  file.seek(0)
  return found


# ---------------------------------------------------------------- RIFF and AIFF


def _chunks(file: BinaryIO, head: bytes) -> Container:
  order = '>' if head[:4] in (b'RIFX', b'FORM') else '<'
  total = struct.unpack(order + 'I', head[4:8])[0]
  end, position, long_size = file.seek(0, io.SEEK_END), 12, 0
  for _ in range(_MAX_CHUNKS):
    file.seek(position)
    chunk = file.read(8)
    if len(chunk) < 8:
      break
    name, size = chunk[:4], struct.unpack(order + 'I', chunk[4:])[0]
    position += 8
    if name == b'ds64':
      long_size = struct.unpack('<QQ', file.read(16).ljust(16, b'\0'))[1]
    if name in (b'data', b'SSND'):
      size = long_size if head[:4] == b'RF64' and size == 0xFFFFFFFF else size
      if name == b'data' and size == 0 and not 0 < total < _STREAMED and position < end:
        return Container(content=_with_size(file, position - 4, end - position, order))
      streamed = size >= _STREAMED and head[:4] != b'RF64'
      return Container(missing=0 if streamed else max(0, position + size - end))
    position += size + size % 2
  return Container()


def _with_size(file: BinaryIO, position: int, size: int, order: str) -> bytes:
  file.seek(0)
  content = bytearray(file.read())
  content[position:position + 4] = struct.pack(order + 'I', min(size, 0xFFFFFFFF))
  return bytes(content)


# ---------------------------------------------------------------- mp3


def _mp3(file: BinaryIO, head: bytes) -> Container:
  """An mp3 whose length is in no tag, behind a frame that holds such a tag."""
  start = 0
  while head[:3] == b'ID3' and len(head) >= 10:
    start += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 16 else 0)
    file.seek(start)
    head = file.read(12)
  first = head[:4]
  length = _frame_length(first)
  if not length:
    return Container()
  file.seek(start)
  if b'Xing' in (frame := file.read(length)) or b'Info' in frame:
    return Container()
  file.seek(start)
  data = file.read()
  count, position = _walk(data)
  if len(data) - position > min(_MAX_JUNK, position) and not data[position:].startswith(_TAGS):
    return Container(broken=True)
  tag = _tag_frame(first, count)
  return Container(content=tag + data[:position]) if tag else Container()


def _frame_length(header: bytes) -> int:
  """Bytes of a layer III frame, 0 where the four bytes are no header of one."""
  if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
    return 0
  version, rate = header[1] >> 3 & 3, header[2] >> 2 & 3
  bitrate = _BITRATES[3 if version == 3 else 2][header[2] >> 4]
  if version == 1 or rate == 3 or not bitrate:
    return 0
  return (144_000 if version == 3 else 72_000) * bitrate // _RATES[version][rate] + (header[2] >> 1 & 1)


def _walk(data: bytes) -> tuple[int, int]:
  """(whole frames that follow on one another from the beginning, where they end)."""
  lengths = [_frame_length(bytes((data[0], data[1], byte, 0))) for byte in range(256)]
  fixed, same_rate = data[1] & 0xFE, data[2] & 0x0C
  count, position, end = 0, 0, len(data) - 4
  while position <= end and data[position] == 0xFF and data[position + 1] & 0xFE == fixed:
    byte = data[position + 2]
    length = lengths[byte]
    if not length or byte & 0x0C != same_rate or position + length > len(data):
      break
    count, position = count + 1, position + length
  return count, position


def _tag_frame(first: bytes, count: int) -> bytes | None:
  """A Xing tag with the number of frames, in a frame like `first` that is long enough for it."""
  mono, mpeg1 = first[3] >> 6 == 3, first[1] >> 3 & 3 == 3
  side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
  tag = bytes(side) + b'Xing' + struct.pack('>II', 1, count)
  for bitrate in range(1, 15):
    header = bytes((0xFF, first[1] | 1, bitrate << 4 | first[2] & 0x0C, first[3]))  # | 1: no checksum follows
    if _frame_length(header) >= 4 + len(tag):
      return header + tag + bytes(_frame_length(header) - 4 - len(tag))
  return None
