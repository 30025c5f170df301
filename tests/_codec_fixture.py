"""Real speech, weights, and what tests/parity/make_codec_fixtures.py computed of them with the PyTorch reference."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np
import soundfile

from lmspt_jax.config import ModelConfig, QuantizerConfig

# Small enough to compile in seconds; one stride is odd, as in the release. The live comparison has the release's own.
SMALL = ModelConfig(
    encoder_channels=4, encoder_strides=(6, 5, 8), latent_dim=32, decoder_channels=32, decoder_rates=(8, 5, 6),
    resynthesis_channels=16, resynthesis_rates=(8, 5, 4), semantic=QuantizerConfig(codebook_size=64),
    acoustic=QuantizerConfig(num_codebooks=3, codebook_size=64))
FRAMES = 40
# Of the decoded waveforms every seventh sample is kept: prime to all rates, so every phase of every stride is seen.
KEPT = 7
SEED = 0  # with it all codebooks are in use and no frame is near a tie (the script measures both)
_TESTS = Path(__file__).resolve().parent


def speech() -> np.ndarray:
  """Real recordings [3, FRAMES * hop], float32; 16 kHz taken as 24 so that no resampler's rounding is involved."""
  folder = _TESTS.parent / 'lmspt_jax' / 'assets' / 'speech_sample' / 'audio'
  length = FRAMES * SMALL.hop
  return np.stack([soundfile.read(folder / f'{name}.flac', dtype='float32')[0][8000 : 8000 + length]
                   for name in ('librivox-austen-0870', 'librivox-austen-0890', 'asterisk-vm-intro')])


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A parameter of the reference, from its name: as a fixture the weights would be 1 MB.

  NumPy has promised that RandomState's streams never change. Snakes, biases and gains are away from their starting
  values, so that a swap would show.
  """
  uniform = np.random.RandomState(zlib.crc32(f'{SEED}/{name}'.encode())).random_sample(shape)
  low, high = {'alpha': (0.5, 2), 'bias': (-0.05, 0.05), 'weight_g': (0.5, 0.8)}.get(name.rpartition('.')[2], (-1, 1))
  return (low + (high - low) * uniform).astype(np.float32)


def summary(value: np.ndarray) -> list[float]:
  """Two numbers that tell arrays apart: the root mean square, and the mean weighted by a ramp, which sees an order."""
  value = np.asarray(value, np.float64)
  return [np.sqrt(np.mean(value**2)), np.mean(value.ravel() * np.linspace(-1, 1, value.size))]


@functools.cache
def load_fixture() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
  """(speech [B, N], weights under PyTorch's names and in its layout, the reference's arrays)."""
  with np.load(_TESTS / 'fixtures' / 'codec.npz') as archive:
    arrays = dict(archive)
  weights = {name: weight(name, tuple(shape[shape > 0])) for name, shape in zip(
      arrays['names'].tolist(), arrays['shapes'], strict=True)}
  return speech(), weights, arrays
