"""Qwen2-Audio's audio tower against `transformers`, live: small towers with random weights, on real speech."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import (
  Qwen2AudioConfig,
  Qwen2AudioEncoder,
  Qwen2AudioEncoderConfig,
  Qwen2AudioForConditionalGeneration,
  Qwen2Config,
)

from lmspt_jax.audio.mel import log_mel_spectrogram
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.models import whisper
from lmspt_jax.models.qwen2_audio import Qwen2AudioEncoder as OurEncoder
from lmspt_jax.training.teacher import FrozenTeacher


def tower_config(positions: int) -> Qwen2AudioEncoderConfig:
  return Qwen2AudioEncoderConfig(d_model=96, encoder_layers=3, encoder_attention_heads=3, encoder_ffn_dim=384,
                                 max_source_positions=positions)


def stirred(model: torch.nn.Module) -> torch.nn.Module:
  """Fresh norms and biases are all equal and would hide a mix-up; fresh weights hardly move their input."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
      parameter.copy_(torch.randn_like(parameter) * scale + (parameter if 'norm.weight' in name else 0))
  return model.eval()


# The reference takes its own number of positions only: a crop is a smaller reference. 29 has an odd one.
@pytest.mark.parametrize('positions', [1500, 100, 29])
def test_tower(padded_speech, tmp_path, positions):
  reference = stirred(Qwen2AudioEncoder(tower_config(positions)))
  reference.save_pretrained(tmp_path)
  ours = load_whisper(f'hf:{tmp_path}')
  mel_BTF = np.asarray(log_mel_spectrogram(padded_speech[:, : positions * 320], 128))
  found = jax.jit(lambda p, x: whisper.bind(OurEncoder, ours.dims, p)(x))(ours.params['encoder'], mel_BTF)
  with torch.no_grad():
    expected = reference(torch.from_numpy(mel_BTF.swapaxes(1, 2).copy())).last_hidden_state.numpy()
  assert found.shape == expected.shape == (2, positions // 2, 96)
  error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
  print(f'{positions} positions: max error {error:.1e} of the largest value; rms {np.sqrt((expected**2).mean()):.2f}')
  assert error <= 1e-5


def test_tower_inside_a_whole_model_as_a_teacher(padded_speech, tmp_path):
  """What `teacher.checkpoint=hf:DIR` gives for a folder that `save_pretrained` wrote in shards."""
  text = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=100)
  audio = tower_config(1500)
  model = stirred(Qwen2AudioForConditionalGeneration(
      Qwen2AudioConfig(audio_config=audio.to_dict(), text_config=text.to_dict(), audio_token_index=99)))
  model.save_pretrained(tmp_path, max_shard_size='400KB')
  assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
  ours = load_whisper(f'hf:{tmp_path}')
  teacher = FrozenTeacher(ours.dims, 16_000, 'full')
  crop = padded_speech[:, :50_000]
  found = np.asarray(jax.jit(teacher.targets)(ours.params['encoder'], crop))
  mel_BTF = np.asarray(log_mel_spectrogram(np.pad(crop, ((0, 0), (0, 430_000))), 128))
  with torch.no_grad():
    expected = model.model.audio_tower(torch.from_numpy(mel_BTF.swapaxes(1, 2).copy())).last_hidden_state.numpy()
  assert np.abs(found - expected).max() / np.abs(expected).max() <= 1e-5
