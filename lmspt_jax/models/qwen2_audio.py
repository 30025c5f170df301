"""The audio tower of Qwen2-Audio (arXiv 2407.10759): Whisper large-v3's encoder, trained on with a language model.

It differs from Whisper's in three ways (`Qwen2AudioEncoder` of `transformers` is the reference): neighbouring positions
are averaged in pairs, the last norm comes after that, and the positions are those of the checkpoint. Axis letters as in
`models.whisper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lmspt_jax.models.whisper import WhisperEncoder


@dataclass(frozen=True)
class Qwen2AudioDims:
  """Sizes of an audio tower; width must be a multiple of heads."""

  n_mels: int
  width: int
  heads: int
  audio_layers: int
  audio_context: int = 1500  # positions before the pooling: 30 s at 50 Hz
  positions_per_second: ClassVar[int] = 25


class Qwen2AudioEncoder(WhisperEncoder):
  """Log-mel to features at a quarter of its frame rate (25 Hz). Arguments are those of `WhisperEncoder`."""

  def __init__(self, dims: Qwen2AudioDims, *, rngs: nnx.Rngs, **options: Any):
    super().__init__(dims, rngs=rngs, **options)
    self.positions = nnx.Param(0.01 * jax.random.normal(rngs.params(), (dims.audio_context, dims.width)))

  def __call__(self, mel_BTF: Array) -> Array:
    """float32 log-mel [B, T, n_mels] at 100 Hz -> float32 [B, ceil(T / 2) // 2, width].

    A last position without a neighbour is left out, as the reference's pooling does. Crops and errors are as in
    `WhisperEncoder`. The whole Qwen2-Audio masks the padding of a 30 s window; here a crop has none, and a padded
    window attends to it as Whisper does.
    """
    x_BTD = self.hidden(mel_BTF)
    batch, positions, width = x_BTD.shape
    pairs_BTPD = x_BTD[:, : positions // 2 * 2].reshape(batch, positions // 2, 2, width)
    return self.norm(jnp.mean(pairs_BTPD, axis=2))

  def position_table(self) -> Array:
    return self.positions[...]
