"""What a tokenizer is compared with: the original at half the sample rate, and Opus. float [N] at 16 kHz both ways.

Opus is what libsndfile encodes (package `soundfile`); it begins at 6 kbit/s, several times what these tokenizers use.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile

from lmspt_jax.data.audio_io import to_mono_at

RATE = 16_000  # Hz
NARROW = 8_000  # Hz
OPUS = (6_000, 12_000)  # bits per second asked for
# libsndfile takes a bitrate as the compression level: 0 is 256 kbit/s and 1 is 6, in between on a line.
_LEAST, _MOST = 6_000, 256_000


def narrowed(audio_N: np.ndarray) -> np.ndarray:
  """To 8 kHz and back."""
  return to_mono_at(to_mono_at(audio_N, RATE, NARROW), NARROW, RATE)[:len(audio_N)]


def opus(audio_N: np.ndarray, bitrate: int) -> tuple[np.ndarray, int]:
  """Through Opus: the decoded recording and the bits of its packets, without the container."""
  buffer = io.BytesIO()
  soundfile.write(buffer, np.asarray(audio_N, np.float32), RATE, format='OGG', subtype='OPUS',
                  compression_level=(_MOST - bitrate) / (_MOST - _LEAST))
  decoded_N, rate = soundfile.read(io.BytesIO(buffer.getvalue()), dtype='float32')
  decoded_N = to_mono_at(decoded_N, rate, RATE)[:len(audio_N)]
  return np.pad(decoded_N, (0, len(audio_N) - len(decoded_N))), 8 * _packet_bytes(buffer.getvalue())


def _packet_bytes(ogg: bytes) -> int:
  """Of an Ogg stream (RFC 3533) but for its two packets of headers, each of which has pages of its own (RFC 7845)."""
  position, total = 0, 0
  while position < len(ogg):
    granule, count = struct.unpack_from('<6xq12xB', ogg, position)
    size = sum(ogg[position + 27:position + 27 + count])
    total += size if granule else 0  # pages of headers end at sample 0
    position += 27 + count + size
  return total
