"""What the tests of speech encoders share."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

SAMPLE = Path(__file__).resolve().parents[2] / 'lmspt_jax' / 'assets' / 'speech_sample'


@pytest.fixture(scope='session')
def padded_speech():
  """Two utterances at 16 kHz, cut or zero-padded to 30 s: float32 [2, 480000]."""
  out = np.zeros((2, 480_000), np.float32)
  for row, name in zip(out, ('asterisk-agent-incorrect', 'asterisk-vm-instructions'), strict=True):
    audio = soundfile.read(SAMPLE / f'audio/{name}.flac', dtype='float32')[0]
    row[: len(audio)] = audio
  return out
