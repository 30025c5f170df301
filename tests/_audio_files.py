"""Audio files for tests, made from the bundled speech."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from lmspt_jax.data.sources.folder import ASSETS

SPEECH = ASSETS / 'speech_sample' / 'audio' / 'asterisk-agent-incorrect.flac'
VARIABLE = {'bitrate_mode': 'VARIABLE', 'compression_level': 0.99}  # of mp3
CONSTANT = {'bitrate_mode': 'CONSTANT', 'compression_level': 0.8}


def speech(seconds: float = 60) -> np.ndarray:
  """Of several recordings, at 16 kHz: float32 [N]."""
  paths = sorted(SPEECH.parent.glob('*.flac'))[10:30]
  return np.concatenate([soundfile.read(path, dtype='float32')[0] for path in paths])[:round(seconds * 16_000)]


def encode(audio, rate, kind, subtype=None, **options) -> bytes:
  buffer = io.BytesIO()
  audio = audio[:, None] if audio.ndim == 1 else audio
  with soundfile.SoundFile(buffer, 'w', rate, audio.shape[1], subtype, format=kind, **options) as file:
    for start in range(0, len(audio), 4096):  # libsndfile's Vorbis overflows its stack with more at a time
      file.write(audio[start:start + 4096])
  return buffer.getvalue()
