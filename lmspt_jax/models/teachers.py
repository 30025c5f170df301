"""The families of speech encoders that can teach. The sizes say the family."""

from __future__ import annotations

from lmspt_jax.models.qwen2_audio import Qwen2AudioDims, Qwen2AudioEncoder
from lmspt_jax.models.whisper import WHISPER_SIZES, WhisperDims, WhisperEncoder

TeacherDims = WhisperDims | Qwen2AudioDims

# By the names of their repositories on the hub, Whisper's without 'whisper-'.
TEACHER_SIZES: dict[str, TeacherDims] = WHISPER_SIZES | dict.fromkeys(
    ('Qwen2-Audio-7B', 'Qwen2-Audio-7B-Instruct'), Qwen2AudioDims(n_mels=128, width=1280, heads=20, audio_layers=32))


def encoder_of(dims: TeacherDims) -> type[WhisperEncoder]:
  """The module for `models.whisper.bind`; it takes log-mels and gives `dims.positions_per_second` features a second."""
  return Qwen2AudioEncoder if isinstance(dims, Qwen2AudioDims) else WhisperEncoder
