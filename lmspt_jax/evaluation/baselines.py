"""What a tokenizer is compared with: the original at half the sample rate, Opus, Codec 2. float [N] at 16 kHz.

Opus is what libsndfile encodes (package `soundfile`); it begins at 6 kbit/s, several times what these tokenizers use.
Codec 2 (package `pycodec2`, which carries libcodec2) is a vocoder for 8 kHz speech at their own bitrates; it keeps no
waveform, so that SI-SDR says nothing of it.
"""

from __future__ import annotations

import io
import multiprocessing
import struct
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import soundfile

from lmspt_jax.data.audio_io import to_mono_at
from lmspt_jax.measures.measure import RATE

NARROW = 8_000  # Hz
OPUS = (6_000, 12_000)  # bits per second asked for
# Bits per second of a mode, and samples at 8 kHz that it is late by: where the mel spectrograms of original and decoded
# speech agree best.
CODEC2 = {700: 224, 1200: 144}
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


def codec2(audio_N: np.ndarray, bitrate: int) -> tuple[np.ndarray, int]:
  """Through Codec 2, in step: the decoded recording and the bits of its frames.

  In a process just forked: the decoder draws the phases of voiceless sounds from one generator a process, which nothing
  sets back. So a recording gives the same whatever came before.
  """
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__])
  with ProcessPoolExecutor(1, mp_context=context) as fresh:
    return fresh.submit(_codec2_here, np.asarray(audio_N, np.float32), bitrate).result()


def _codec2_here(audio_N: np.ndarray, bitrate: int) -> tuple[np.ndarray, int]:
  import pycodec2  # an extra: run.py says so where it is missing

  codec, late = pycodec2.Codec2(bitrate), CODEC2[bitrate]
  size = codec.samples_per_frame()
  narrow_N = to_mono_at(audio_N, RATE, NARROW)
  frames_FN = np.pad(narrow_N, (0, late + -(len(narrow_N) + late) % size)).reshape(-1, size)
  samples_FN = np.round(np.clip(frames_FN, -1, 1) * np.iinfo(np.int16).max).astype(np.int16)
  decoded_N = np.concatenate([codec.decode(codec.encode(samples_N)) for samples_N in samples_FN])
  decoded_N = decoded_N[late:late + len(narrow_N)].astype(np.float32) / np.iinfo(np.int16).max
  decoded_N = to_mono_at(decoded_N, NARROW, RATE)[:len(audio_N)]
  return np.pad(decoded_N, (0, len(audio_N) - len(decoded_N))), len(samples_FN) * codec.bits_per_frame()


def _packet_bytes(ogg: bytes) -> int:
  """Of an Ogg stream (RFC 3533) but for its two packets of headers, each of which has pages of its own (RFC 7845)."""
  position, total = 0, 0
  while position < len(ogg):
    granule, count = struct.unpack_from('<6xq12xB', ogg, position)
    size = sum(ogg[position + 27:position + 27 + count])
    total += size if granule else 0  # pages of headers end at sample 0
    position += 27 + count + size
  return total
