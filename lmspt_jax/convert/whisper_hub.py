"""Folders in the layout of Hugging Face, local or from the hub: Whisper, and the audio tower of Qwen2-Audio.

A folder holds config.json and safetensors, in one file or in shards that an index names. Of a Qwen2-Audio only the
shards with its tower are fetched and opened, and only the tower's tensors are read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.convert import hub
from lmspt_jax.convert.safetensors_file import SafetensorsFile
from lmspt_jax.convert.whisper_files import WhisperSource, checked_sizes
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, Rules, foreign_name
from lmspt_jax.errors import LmsptError, nearest, shown
from lmspt_jax.files import read_json, sha256
from lmspt_jax.models.qwen2_audio import Qwen2AudioDims
from lmspt_jax.models.teachers import TeacherDims
from lmspt_jax.models.whisper import WhisperDims

CONFIG, WEIGHTS, INDEX, TOKENIZER = 'config.json', 'model.safetensors', 'model.safetensors.index.json', 'tokenizer.json'
ENCODER_FIELDS = {
  'n_mels': 'num_mel_bins',
  'width': 'd_model',
  'audio_layers': 'encoder_layers',
  'audio_context': 'max_source_positions',
}
DECODER_FIELDS = {'text_layers': 'decoder_layers', 'vocab_size': 'vocab_size', 'text_context': 'max_target_positions'}
# What a Qwen2-Audio's configuration leaves out where it is that.
_TOWER_DEFAULTS = {'num_mel_bins': 128, 'd_model': 1280, 'encoder_layers': 32, 'encoder_attention_heads': 20,
                   'max_source_positions': 1500}  # fmt: skip


@dataclass(frozen=True)
class _Family:
  """What a folder's config.json says of its weights."""

  dims: TeacherDims
  rules: Rules  # from a parameter's path to its tensor's name without prefix
  prefixes: tuple[str, ...]  # that may stand before every name, the first one that is found does
  part: bool  # whether the folder may hold more than the model, under other prefixes


def open_hub(name: str) -> WhisperSource:
  """org/name[@revision], through huggingface_hub and its cache. Raises LmsptError when it can't be fetched."""
  way_out = 'use a local copy with hf:DIR'
  folder = hub.fetch(f'hf://{name}', [CONFIG, TOKENIZER, INDEX], way_out)
  files = _weight_files(folder, _read_family(folder))
  # The folder's name is the commit: what is fetched next belongs to what was read.
  return open_folder(hub.fetch(f'hf://{name.partition("@")[0]}@{folder.name}', files, way_out))


def open_folder(folder: Path) -> WhisperSource:
  """Raises LmsptError for files that are missing or damaged, and for another model's."""
  family = _read_family(folder)
  paths = [folder / file for file in _weight_files(folder, family)]
  files: dict[str, SafetensorsFile] = {}
  for file in map(SafetensorsFile, paths):
    files.update(dict.fromkeys(file.shapes, file))
  prefix = _prefix(files, family, paths[0])
  rules = (*family.rules, (r'^', prefix))

  def tensor(name: str) -> np.ndarray:
    if name not in files:
      raise LmsptError(f'{paths[0]}: no tensor {name!r}; {nearest(name, files)}')
    return files[name].read(name)

  def read(path: str) -> np.ndarray:
    return tensor(foreign_name(path, rules)).astype(np.float32, copy=False)

  def tower_sha256() -> str:
    digest = hashlib.sha256()
    for name in sorted(name for name in files if name.startswith(prefix)):
      digest.update(name.removeprefix(prefix).encode())
      digest.update(np.ascontiguousarray(tensor(name)).view(np.uint8))
    return digest.hexdigest()

  tokenizer = folder / TOKENIZER
  digest = tower_sha256 if family.part else functools.partial(sha256, *paths)
  size = sum(path.stat().st_size for path in paths)
  return WhisperSource(str(paths[0]), family.dims, files.keys(), rules, read, size, digest,
                       tokenizer if tokenizer.is_file() else None)


def _read_family(folder: Path) -> _Family:
  path = folder / CONFIG
  config = _read_object(path)
  kind = config.get('model_type')
  if kind == 'whisper':
    heads = [config.get('encoder_attention_heads'), config.get('decoder_attention_heads')]
    fields = ENCODER_FIELDS | DECODER_FIELDS
    sizes = checked_sizes(str(path), {ours: config.get(theirs) for ours, theirs in fields.items()}, heads)
    # A WhisperForConditionalGeneration prefixes what a WhisperModel holds.
    family = _Family(WhisperDims(**sizes), HUGGING_FACE_NAMES, ('model.', ''), part=False)
  elif kind in ('qwen2_audio', 'qwen2_audio_encoder'):
    config = config.get('audio_config') if kind == 'qwen2_audio' else config
    if not isinstance(config, dict):
      raise LmsptError(f'{path}: has no audio_config: the sizes of the audio tower are needed')
    config = _TOWER_DEFAULTS | config
    sizes = checked_sizes(str(path), {ours: config[theirs] for ours, theirs in ENCODER_FIELDS.items()},
                          [config['encoder_attention_heads']])
    prefixes = ('audio_tower.', 'model.audio_tower.', '')
    family = _Family(Qwen2AudioDims(**sizes), (*HUGGING_FACE_NAMES, (r'^encoder\.', '')), prefixes, part=True)
  else:
    raise LmsptError(f'{path}: model_type = {shown(kind)}: a Whisper model is needed, or a Qwen2-Audio')
  activation = config.get('activation_function', 'gelu')
  if activation != 'gelu':
    raise LmsptError(f"{path}: activation_function = {shown(activation)}: these encoders are built with 'gelu'")
  return family


def _weight_files(folder: Path, family: _Family) -> list[str]:
  """Names of the folder's files with the model's tensors; those of shards from the index alone."""
  index_path = folder / INDEX
  if (folder / WEIGHTS).is_file() or not index_path.is_file():
    return [WEIGHTS]
  weight_map = _read_object(index_path).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise LmsptError(f'{index_path}: has no weight_map')
  for file in weight_map.values():
    if not isinstance(file, str) or Path(file).name != file or file in ('', '..') or '\0' in file:
      raise LmsptError(f'{index_path}: weight_map names {shown(file)}, which is not a file of this folder')
  prefix = _prefix(weight_map, family, index_path) if family.part else ''
  return sorted({file for name, file in weight_map.items() if name.startswith(prefix)})


def _prefix(names: Iterable[str], family: _Family, path: Path) -> str:
  known, first = set(names), foreign_name('encoder/conv1/kernel', family.rules)
  for prefix in family.prefixes:
    if prefix + first in known:
      return prefix
  wanted = family.prefixes[0] + first
  raise LmsptError(f'{path}: no tensor {wanted!r}; {nearest(wanted, known)}')


def _read_object(path: Path) -> dict[str, Any]:
  value = read_json(path)
  if not isinstance(value, dict):
    raise LmsptError(f'{path}: a JSON object was expected')
  return value
