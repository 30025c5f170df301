"""Real speech and what tests/parity/make_discriminator_fixtures.py computed on it with the PyTorch reference."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import soundfile

from lmspt_jax.config import DiscriminatorConfig

# Every kind of sub-discriminator, small enough for its weights to be a fixture.
SMALL = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 8, 8, 8, 8), rates=(2,),
                            scale_channels=(4, 8, 8, 8, 8, 8), fft_sizes=(128,), stft_channels=4)
SAMPLES = 2_560
_TESTS = Path(__file__).resolve().parent


def speech(batch: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
  """Real speech [batch, samples] of the bundled sample and the same smoothed, a stand-in for a decoder's.

  Not quantised: at equal peaks the gradient of normalisation is ambiguous (PyTorch takes one, jax shares it out).
  """
  folder = _TESTS.parent / 'lmspt_jax' / 'assets' / 'speech_sample' / 'audio'
  names = ('librivox-austen-0870', 'librivox-austen-0880', 'librivox-austen-0890', 'librivox-austen-0920')
  real = np.stack([soundfile.read(folder / f'{n}.flac', dtype='float32')[0][8000 : 8000 + samples]
                   for n in names[:batch]])
  return real, real - np.float32(0.37) * np.roll(real, 1, axis=1) + np.float32(0.21) * np.roll(real, 2, axis=1)


@functools.cache
def load_fixture() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """(real [2, N], fake [2, N], the reference's arrays)."""
  with np.load(_TESTS / 'fixtures' / 'discriminator.npz') as arrays:
    return *speech(2, SAMPLES), dict(arrays)
