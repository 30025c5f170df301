"""Writes a Whisper of any format as a Hugging Face folder, which `transformers` loads.

Parameters go from the source to the file one by one, so that memory holds one of them and not the model: for a
large-v3 in float32 a 265 MB embedding instead of 6 GB.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmspt_jax.convert.safetensors_file import write_safetensors
from lmspt_jax.convert.whisper import (
  PARTS,
  abstract_part,
  check_part,
  open_whisper,
  parameters,
  read_parameter,
  require_decoder,
)
from lmspt_jax.convert.whisper_files import WhisperSource
from lmspt_jax.convert.whisper_hub import CONFIG, DECODER_FIELDS, ENCODER_FIELDS, TOKENIZER, WEIGHTS
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, foreign_layout, foreign_name, foreign_shape
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.whisper import WhisperDims, sinusoids

# Names in safetensors' header beside what they are in memory.
DTYPES = {'float32': ('F32', np.float32), 'float16': ('F16', np.float16), 'bfloat16': ('BF16', ml_dtypes.bfloat16)}
POSITIONS = 'encoder/positions'  # which this project computes and a file stores
ENGLISH_VOCABULARY = 51864  # tokens; the multilingual ones are larger
END_ENGLISH, END_MULTILINGUAL = 50256, 50257  # <|endoftext|>; <|startoftranscript|> follows it
SPACE = 220


def write_whisper_folder(uri: str, folder: str | Path, dtype: str = 'float32') -> None:
  """Writes config.json, model.safetensors and the tokenizer.json where the source has one; all of it or nothing.

  Args:
    uri: a Whisper as `convert.whisper.load_whisper` takes it.
    folder: a new or empty one.
    dtype: of the weights, one of DTYPES.

  Raises:
    LmsptError: the source can't be read or is no Whisper, the folder can't be written, or float16 can't hold a value.
  """
  folder = Path(folder).absolute()
  if dtype not in DTYPES:
    raise LmsptError(f'dtype {dtype!r}: use {", ".join(DTYPES)}')
  source = open_whisper(uri)
  require_decoder(uri, source)
  if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
    raise LmsptError(f'{folder}: is there already and not an empty folder; give a new one')
  for part in PARTS:
    check_part(source, part)
  beside = folder.with_name(f'.{folder.name}.{os.getpid()}')
  try:
    beside.mkdir(parents=True)
    _write_weights(beside / WEIGHTS, source, dtype)
    (beside / CONFIG).write_text(json.dumps(_config(source.dims, dtype), indent=2) + '\n', 'utf-8')
    if source.tokenizer_path is not None:
      shutil.copyfile(source.tokenizer_path, beside / TOKENIZER)
    beside.replace(folder)
  except OSError as error:
    raise LmsptError(f"{folder}: can't be written ({error.strerror or error}); give a place that exists "
                     'and has room') from error
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def _write_weights(path: Path, source: WhisperSource, dtype: str) -> None:
  code, numpy_dtype = DTYPES[dtype]
  named = {_name(name): (name, shape) for name, shape in _shapes(source.dims)}

  def read(tensor: str) -> np.ndarray:
    name, shape = named[tensor]
    # Sources of a narrow dtype hold what it left of the sinusoids.
    value = sinusoids(*shape) if name == POSITIONS else foreign_layout(name, read_parameter(source, name, shape))
    with np.errstate(over='ignore'):
      value = np.ascontiguousarray(value).astype(numpy_dtype, copy=False)
    if not np.isfinite(value).all():
      raise LmsptError(f'{source.path}: {tensor} has values that {dtype} cannot hold; use bfloat16 or float32')
    return value

  shapes = {tensor: foreign_shape(name, shape) for tensor, (name, shape) in named.items()}
  write_safetensors(path, shapes, code, read, {'format': 'pt'})


def _name(path: str) -> str:
  return 'model.' + foreign_name(path, HUGGING_FACE_NAMES)


def _shapes(dims: WhisperDims) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Every parameter's path and shape in this project's layout."""
  yield POSITIONS, (dims.audio_context, dims.width)
  for part in PARTS:
    for path, spec, layer in parameters(part, dims, abstract_part(part, dims)):
      yield path, spec.shape if layer is None else spec.shape[1:]


def _config(dims: WhisperDims, dtype: str) -> dict[str, Any]:
  config = {
    'architectures': ['WhisperForConditionalGeneration'],
    'model_type': 'whisper',
    'torch_dtype': dtype,
    **{theirs: getattr(dims, ours) for ours, theirs in (ENCODER_FIELDS | DECODER_FIELDS).items()},
    'encoder_attention_heads': dims.heads,
    'decoder_attention_heads': dims.heads,
    'encoder_ffn_dim': 4 * dims.width,
    'decoder_ffn_dim': 4 * dims.width,
    'activation_function': 'gelu',
    'scale_embedding': False,
    'is_encoder_decoder': True,
  }
  # Tokens of Whisper's vocabularies, as decoding needs them; of another one they are not known.
  if dims.vocab_size < ENGLISH_VOCABULARY:
    return config | dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id', 'begin_suppress_tokens'))
  end = END_MULTILINGUAL if dims.multilingual else END_ENGLISH
  return config | {
    'bos_token_id': end,
    'eos_token_id': end,
    'pad_token_id': end,
    'decoder_start_token_id': end + 1,
    'begin_suppress_tokens': [SPACE, end],
  }
