"""Short-time Fourier transform in jnp: differentiable, static shapes, no gather.

Axis letters: B batch, N samples, T frames, F = fft_size // 2 + 1 bins.

Frames are cut by laying shifted blocks of `hop` samples side by side, so the backward pass is slices and adds
(a gather's would be a scatter, slow on every backend).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PADDINGS = ('center', 'match_stride', 'none')


def hann_window(size: int) -> np.ndarray:
  """Periodic Hann window, float32 [size] (torch.hann_window, scipy.signal.get_window('hann'))."""
  return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def num_frames(num_samples: int, fft_size: int, hop: int, padding: str = 'center') -> int:
  """Frames that `stft` returns for a signal of `num_samples`."""
  left, right = _pad_widths(num_samples, fft_size, hop, padding)
  return 1 + (num_samples + left + right - fft_size) // hop


def frame(x_BN: Array, size: int, hop: int) -> Array:
  """Overlapping frames: [B, N] -> [B, 1 + (N - size) // hop, size]."""
  batch, length = x_BN.shape
  count = 1 + (length - size) // hop
  shifts = -(-size // hop)
  needed = (count + shifts - 1) * hop
  x_BN = jnp.pad(x_BN, ((0, 0), (0, max(0, needed - length))))[:, :needed]
  blocks = x_BN.reshape(batch, count + shifts - 1, hop)
  return jnp.concatenate([blocks[:, i : i + count] for i in range(shifts)], axis=-1)[..., :size]


def stft(x_BN: Array, fft_size: int, hop: int, padding: str = 'center') -> Array:
  """Hann-windowed STFT, float32 [B, N] -> complex64 [B, T, F].

  padding 'center': reflects fft_size // 2 samples on both sides, T = 1 + N // hop (torch.stft's and audiotools'
  default). 'match_stride': N is reflected up to whole hops, then (fft_size - hop) // 2 on both sides, T = ceil(N / hop)
  (audiotools' match_stride, which centres and then drops the two outer frames on each side: the same frames when
  hop = fft_size // 4). 'none': only whole frames inside the signal.

  Raises ValueError for an unknown padding, 'match_stride' with a hop other than a quarter, and a signal too short to
  be reflected.
  """
  if padding == 'match_stride' and hop != fft_size // 4:
    raise ValueError(f"padding 'match_stride' wants hop = fft_size // 4, got hop {hop} with fft_size {fft_size}")
  widths = _pad_widths(x_BN.shape[1], fft_size, hop, padding)
  if max(widths) >= x_BN.shape[1]:
    raise ValueError(f'a signal of {x_BN.shape[1]} samples is too short to be reflected by {max(widths)}')
  x_BN = jnp.asarray(x_BN, jnp.float32)
  if any(widths):
    x_BN = jnp.pad(x_BN, ((0, 0), widths), mode='reflect')
  if x_BN.shape[1] < fft_size:
    raise ValueError(f'a signal of {x_BN.shape[1]} samples has no frame of {fft_size}')
  frames_BTN = frame(x_BN, fft_size, hop) * hann_window(fft_size)
  return jax.lax.platform_dependent(
      frames_BTN, tpu=dft_by_product, cuda=dft_by_product, rocm=dft_by_product, default=jnp.fft.rfft)


def dft_by_product(x_BTN: Array) -> Array:
  """jnp.fft.rfft as a matrix product, float32 [B, T, N] -> complex64 [B, T, N // 2 + 1].

  The form for accelerators: XLA does not split a Fourier transform over a mesh, it gathers the whole batch on every
  device; and its TPU compiler takes longer over the transforms of a mel loss (docs/scaling.md).
  """
  size = x_BTN.shape[-1]
  time_N1, bin_F = jnp.arange(size)[:, None], jnp.arange(size // 2 + 1)
  # Whole turns are taken off while the angle is an integer. Made anew in each step: as constants, the matrices of all
  # sizes would be most of the program.
  angles_NF = (time_N1 * bin_F % size).astype(jnp.float32) * (2 * np.pi / size)
  matrix_NG = jnp.concatenate([jnp.cos(angles_NF), -jnp.sin(angles_NF)], axis=1)
  both_BTG = jnp.matmul(x_BTN, matrix_NG, precision=jax.lax.Precision.HIGHEST)
  real_BTF, imaginary_BTF = jnp.split(both_BTG, 2, axis=-1)
  return jax.lax.complex(real_BTF, imaginary_BTF)


def _pad_widths(length: int, fft_size: int, hop: int, padding: str) -> tuple[int, int]:
  if padding == 'center':
    return fft_size // 2, fft_size // 2
  if padding == 'match_stride':
    side = (fft_size - hop) // 2
    return side, side + -length % hop
  if padding == 'none':
    return 0, 0
  raise ValueError(f'unknown padding {padding!r}: use one of {PADDINGS}')
