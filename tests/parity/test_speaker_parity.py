"""The speaker encoder against the package whose weights it reads."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import soundfile

import lmspt_jax
from lmspt_jax.measures.speaker import speaker_embedding

# The package cuts silences with it before it embeds, which is not done here; it needs an old setuptools.
sys.modules.setdefault('webrtcvad', types.ModuleType('webrtcvad'))
import resemblyzer  # noqa: E402, isort: skip
from resemblyzer.audio import normalize_volume  # noqa: E402, isort: skip

SAMPLE = Path(lmspt_jax.__file__).parent / 'assets' / 'speech_sample'


def test_embeddings_of_resemblyzer():
  encoder = resemblyzer.VoiceEncoder('cpu', verbose=False)
  for name in ('asterisk-agent-incorrect', 'librivox-austen-0890', 'asterisk-vm-reachoper', 'asterisk-dir-instr'):
    audio = soundfile.read(SAMPLE / f'audio/{name}.flac', dtype='float32')[0]
    for given in (audio, 0.01 * audio, audio[:8000]):
      expected = encoder.embed_utterance(normalize_volume(given, -30, increase_only=True))
      np.testing.assert_allclose(speaker_embedding(given), expected, atol=2e-5)
