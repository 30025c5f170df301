"""A small audio tower of Qwen2-Audio with random weights, and folders as the hub has them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from _whisper_arrays import named_arrays

from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, foreign_layout, foreign_name
from lmspt_jax.models.qwen2_audio import Qwen2AudioDims, Qwen2AudioEncoder
from lmspt_jax.models.whisper import abstract_params

TOWER = Qwen2AudioDims(n_mels=128, width=32, heads=2, audio_layers=2)


@functools.cache
def tower_params() -> dict[str, Any]:
  """Noise everywhere: fresh biases and scales are all equal and would hide a mix-up."""
  rng = np.random.default_rng(0)
  draw = lambda path, spec: rng.standard_normal(spec.shape).astype(np.float32) * (
      np.prod(spec.shape[-3:-1]) ** -0.5 if path[-1].key == 'kernel' else 0.1) + (path[-1].key == 'scale')
  return jax.tree.map_with_path(lambda path, spec: draw(path, spec).astype(np.float32),
                                abstract_params(Qwen2AudioEncoder, TOWER))


def tower_tensors() -> dict[str, np.ndarray]:
  """Under their names in an audio tower alone."""
  named = {}
  for path, value in named_arrays({'encoder': tower_params()}):
    name = foreign_name(path, HUGGING_FACE_NAMES).removeprefix('encoder.')
    named[name] = np.ascontiguousarray(foreign_layout(path, value))
  return named


def write_tower(folder: Path, *, alone: bool = False, prefix: str = 'audio_tower.', shards: int = 1,
                tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
  """A folder of a Qwen2-Audio, or of its tower `alone`; of several shards the last holds the language model alone.

  `changes` are to the tower's configuration.
  """
  folder.mkdir()
  audio = {'model_type': 'qwen2_audio_encoder', 'num_mel_bins': 128, 'd_model': 32, 'encoder_layers': 2,
           'encoder_attention_heads': 2, 'encoder_ffn_dim': 128, 'max_source_positions': 1500, **changes}
  whole = {'model_type': 'qwen2_audio', 'audio_config': audio, 'text_config': {'model_type': 'qwen2'}}
  (folder / 'config.json').write_text(json.dumps(audio if alone else whole))
  tower = {prefix + name: value for name, value in (tower_tensors() if tensors is None else tensors).items()}
  language = {} if alone else {'language_model.model.norm.weight': np.ones(8, np.float32),
                               'multi_modal_projector.linear.weight': np.ones((8, 32), np.float32)}
  if shards == 1:
    safetensors.numpy.save_file(tower | language, folder / 'model.safetensors')
    return folder
  names = sorted(tower)
  parts = [{name: tower[name] for name in names[i :: shards - 1]} for i in range(shards - 1)] + [language]
  weight_map = {}
  for number, part in enumerate(parts, start=1):
    file = f'model-{number:05}-of-{shards:05}.safetensors'
    safetensors.numpy.save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  return folder
