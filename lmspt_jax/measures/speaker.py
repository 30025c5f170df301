"""Speaker similarity: the cosine of two recordings' embeddings by a speaker encoder trained on thousands of speakers.

The network is that of generalised end-to-end loss (arXiv 1710.10467): three LSTM layers over mel spectrograms, a
projection, a rectifier, unit length; a recording's embedding is the mean over windows of 1.6 s. Its weights are those
that the package `resemblyzer` 0.1.4 carries (Apache-2.0, 17 MB). The package itself runs on PyTorch, so only its file
is read and the network is here; tests/parity holds it against the package.

Axes: N samples, T mel frames, F mel bands, W windows, D width.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from jax import Array

from lmspt_jax.errors import LmsptError
from lmspt_jax.files import read_plain, sha256
from lmspt_jax.measures.measure import RATE
from lmspt_jax.measures.undefined import Undefined

SHA256 = '39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e'
WAY_OUT = 'pip install --no-deps resemblyzer==0.1.4'
_LAYERS, _WIDTH, _BANDS = 3, 256, 40
_HOP, _FFT = 160, 400  # samples
_WINDOW, _STEP = 160, 77  # frames
_ROWS = 8  # windows of one call
_COVERAGE = 0.75  # of the last window that must be audio, if it is not the only one
_LEVEL = -30  # dB of full scale, to which quieter recordings are raised
_MAX_FILE = 32 << 20  # bytes
# The file is a torch.save of before the zip format, and pinned by its hash: where its float32 arrays lie is known.
_ARRAYS = {
  'weight_ih_l0': (269883, (1024, 40)), 'weight_hh_l0': (433723, (1024, 256)), 'bias_ih_l0': (5676603, (1024,)),
  'bias_hh_l0': (5680699, (1024,)), 'weight_ih_l1': (1482299, (1024, 256)), 'weight_hh_l1': (2530875, (1024, 256)),
  'bias_ih_l1': (5684795, (1024,)), 'bias_hh_l1': (5688891, (1024,)), 'weight_ih_l2': (3579451, (1024, 256)),
  'weight_hh_l2': (4628027, (1024, 256)), 'bias_ih_l2': (5692987, (1024,)), 'bias_hh_l2': (5697083, (1024,)),
  'linear_weight': (7731, (256, 256)), 'linear_bias': (6699, (256,))}  # fmt: skip


def weights_file() -> Path:
  """In the installed package, none of whose code is run. Raises LmsptError: not installed, or another version."""
  spec = importlib.util.find_spec('resemblyzer')
  if spec is None or not spec.submodule_search_locations:
    raise LmsptError(f'evaluation needs the speaker encoder that resemblyzer carries: {WAY_OUT}')
  path = Path(spec.submodule_search_locations[0]) / 'pretrained.pt'
  if (found := sha256(path)) != SHA256:
    raise LmsptError(f'{path}: sha256 is {found}, not {SHA256}: another version or damaged; {WAY_OUT}')
  return path


@functools.cache
def _weights() -> dict[str, Array]:
  data = read_plain(weights_file(), _MAX_FILE)
  return {name: jnp.asarray(np.frombuffer(data, '<f4', int(np.prod(shape)), offset).reshape(shape))
          for name, (offset, shape) in _ARRAYS.items()}


def speaker_embedding(audio_N: np.ndarray) -> np.ndarray:
  """float [N] at 16 kHz -> float32 [256] of unit length. Raises Undefined for silence."""
  audio_N = np.asarray(audio_N, np.float32)
  power = np.mean(np.square(audio_N, dtype=np.float64)) if len(audio_N) else 0.0
  if not power:
    raise Undefined('speaker encoder: silent')
  gain = _LEVEL - 10 * np.log10(power)
  if gain > 0:
    audio_N = audio_N * np.float32(10 ** (gain / 20))
  frames = -(-(len(audio_N) + 1) // _HOP)
  starts = list(range(0, max(1, frames - _WINDOW + _STEP + 1), _STEP))
  if len(starts) > 1 and len(audio_N) - starts[-1] * _HOP < _COVERAGE * _WINDOW * _HOP:
    starts.pop()
  audio_N = np.pad(audio_N, (0, max(0, (starts[-1] + _WINDOW) * _HOP - len(audio_N))))
  mel_TF = librosa.feature.melspectrogram(y=audio_N, sr=RATE, n_fft=_FFT, hop_length=_HOP, n_mels=_BANDS).T
  mel_WTF = np.stack([mel_TF[start:start + _WINDOW] for start in starts])
  blocks = [mel_WTF[first:first + _ROWS] for first in range(0, len(mel_WTF), _ROWS)]
  padded = [np.pad(block, ((0, _ROWS - len(block)), (0, 0), (0, 0))) for block in blocks]
  embedding_WD = np.concatenate([_network(_weights(), block) for block in padded])[:len(mel_WTF)]
  if not embedding_WD.any():
    raise Undefined('speaker encoder: hears nothing')
  mean_D = np.mean(embedding_WD, axis=0)
  return mean_D / np.linalg.norm(mean_D)


@jax.jit
def _network(weights: dict[str, Array], x_WTD: Array) -> Array:
  """Mels [W, T, F] -> embeddings [W, 256] of unit length (zero where the rectifier leaves nothing)."""
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  nothing_WD = jnp.zeros((x_WTD.shape[0], _WIDTH))
  for layer in range(_LAYERS):
    given_WTG = product(x_WTD, weights[f'weight_ih_l{layer}'].T) + weights[f'bias_ih_l{layer}']
    recurrent_DG, bias_G = weights[f'weight_hh_l{layer}'].T, weights[f'bias_hh_l{layer}']

    def step(carry: tuple[Array, Array], given_WG: Array, recurrent_DG=recurrent_DG, bias_G=bias_G):
      hidden_WD, cell_WD = carry
      gates_WG = given_WG + product(hidden_WD, recurrent_DG) + bias_G
      take_WD, keep_WD, new_WD, show_WD = jnp.split(gates_WG, 4, axis=1)
      cell_WD = jax.nn.sigmoid(keep_WD) * cell_WD + jax.nn.sigmoid(take_WD) * jnp.tanh(new_WD)
      hidden_WD = jax.nn.sigmoid(show_WD) * jnp.tanh(cell_WD)
      return (hidden_WD, cell_WD), hidden_WD

    x_WTD = jax.lax.scan(step, (nothing_WD, nothing_WD), given_WTG.swapaxes(0, 1))[1].swapaxes(0, 1)
  raw_WD = jax.nn.relu(product(x_WTD[:, -1], weights['linear_weight'].T) + weights['linear_bias'])
  return raw_WD / jnp.maximum(jnp.linalg.norm(raw_WD, axis=1, keepdims=True), 1e-12)
