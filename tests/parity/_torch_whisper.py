"""openai-whisper's model with weights that this project's readers have read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import whisper as openai_whisper

from lmspt_jax.convert import whisper as convert
from lmspt_jax.convert.whisper_names import OPENAI_NAMES, Rules, foreign_layout, foreign_name
from lmspt_jax.models import whisper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _whisper_arrays import named_arrays  # isort: skip


def state_dict(checkpoint: convert.WhisperCheckpoint, rules: Rules) -> dict[str, np.ndarray]:
  """The parameters under foreign names (`rules`, of `convert.whisper_names`) and in the foreign layout."""
  out = {}
  for path, value in named_arrays(checkpoint.params):
    out[foreign_name(path, rules)] = np.ascontiguousarray(foreign_layout(path, value))
  positions = whisper.sinusoids(checkpoint.dims.audio_context, checkpoint.dims.width)
  out[foreign_name('encoder/positions', rules)] = positions.copy()
  return out


def openai_model(checkpoint: convert.WhisperCheckpoint) -> torch.nn.Module:
  """Both parts, loaded strictly: every name must be its own."""
  d = checkpoint.dims
  dims = openai_whisper.model.ModelDimensions(
      n_mels=d.n_mels, n_audio_ctx=d.audio_context, n_audio_state=d.width, n_audio_head=d.heads,
      n_audio_layer=d.audio_layers, n_vocab=d.vocab_size, n_text_ctx=d.text_context, n_text_state=d.width,
      n_text_head=d.heads, n_text_layer=d.text_layers)
  model = openai_whisper.model.Whisper(dims)
  tensors = {name: torch.from_numpy(value) for name, value in state_dict(checkpoint, OPENAI_NAMES).items()}
  model.load_state_dict(tensors, strict=True)
  return model.eval()
