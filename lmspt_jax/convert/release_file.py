"""Safetensors files in the layout of the authors' release, read and written strictly.

The format holds no code. What a release file does not say (its config) is told from the shapes; files written here say
it in their metadata.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.config import ModelConfig, QuantizerConfig, from_dict, to_dict
from lmspt_jax.config.model import MAX_BLOCKS, MAX_CODEBOOKS
from lmspt_jax.convert.release import USAGE, release_from_tokenizer, tokenizer_from_release
from lmspt_jax.convert.safetensors_file import SafetensorsFile, write_safetensors
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import parse_json

# JSON: the model's config and the licence. One entry, as safetensors writes several in any order, and equal models are
# to be equal files.
METADATA = 'lmspt_jax'
RESYNTHESIS_RATE = 16_000  # Hz: the auxiliary decoder speaks to Whisper
_DTYPES = ('F32', 'F16')


@dataclass(frozen=True)
class ReleaseCheckpoint:
  """A tokenizer from a release file.

  Attributes:
    config: the file's own, or told from its shapes, or the one that was asked for.
    params, codebooks: as `models.tokenizer.split_tokenizer` parts them, numpy.
    usage: 'semantic_quantizer' and 'acoustic_quantizer' -> float32 [codebooks, size], where the file has them: a
      moving average of how often each code is drawn, as the release counts it.
    license: of the weights, where the file names one.
  """

  config: ModelConfig
  params: dict[str, Any]
  codebooks: dict[str, Any]
  usage: dict[str, np.ndarray]
  license: str


def read_release(path: str | Path, config: ModelConfig | None = None) -> ReleaseCheckpoint:
  """Reads a file.

  Args:
    path: a .safetensors file in the release's layout, float32 or float16.
    config: what it has to be; None takes the file's own.

  Raises:
    LmsptError: it can't be read, or keys are missing, unexpected or misshaped; in one line that names them.
  """
  tensors = _Tensors(Path(path))
  stored, license = _stored(tensors)
  if config is None:
    config = stored or infer_config(tensors.shapes, str(path))
  try:
    params, codebooks = tokenizer_from_release(tensors, config)
  except LmsptError as error:
    raise LmsptError(f'{path}: {error}') from error
  usage = {part: tensors[key] for part, key in USAGE.items() if key in tensors.shapes}
  return ReleaseCheckpoint(config, params, codebooks, usage, license)


def write_release(path: str | Path, checkpoint: ReleaseCheckpoint) -> None:
  """Writes a file that the PyTorch model loads strictly, with safetensors' `load_model`; whole or not at all.

  Usage buffers that `checkpoint.usage` lacks are zero, as in a model that was never trained.
  """
  path, config = Path(path), checkpoint.config
  made = release_from_tokenizer(checkpoint.params, checkpoint.codebooks, config)
  for part, key in USAGE.items():
    quantizer = config.semantic if part == 'semantic_quantizer' else config.acoustic
    empty = np.zeros((quantizer.num_codebooks, quantizer.size), np.float32)
    made[key] = empty.shape, functools.partial(checkpoint.usage.get, part, empty)
  metadata = {METADATA: json.dumps({'model': to_dict(config), 'license': checkpoint.license}, sort_keys=True)}
  beside = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    shapes = {key: made[key][0] for key in sorted(made)}
    write_safetensors(beside, shapes, 'F32', lambda key: made[key][1](), metadata)
    beside.replace(path)
  except OSError as error:
    raise LmsptError(f"{path}: can't be written ({error.strerror or error}); give a folder that exists and has "
                     'room') from error
  finally:
    beside.unlink(missing_ok=True)


def infer_config(shapes: Mapping[str, tuple[int, ...]], path: str) -> ModelConfig:
  """The config of a release-layout file from its shapes; `path` is for messages.

  What shapes don't say is taken as the release has it: dilations 1, 3, 9 and the subtraction of z_semantic. The sample
  rate follows from an auxiliary decoder that speaks at 16 kHz.

  Raises:
    LmsptError: a key that decides is missing or has another rank, or the semantic quantizer is an FSQ, whose levels
      can't be told.
  """
  causal = any(key.endswith('_encoder.block.0.conv.weight_v') for key in shapes)
  conv = '.conv.weight_v' if causal else '.weight_v'

  def size(key: str, axis: int, rank: int = 3) -> int:
    shape = shapes.get(key)
    if shape is None:
      raise LmsptError(f"{path}: no tensor {key!r}: not in the layout of LM-SPT's release")
    if len(shape) != rank or 0 in shape:
      raise LmsptError(f"{path}: {key} has shape {list(shape)}: not in the layout of LM-SPT's release")
    return shape[axis]

  def rates(root: str, member: int) -> tuple[int, ...]:
    count = next((i for i in range(MAX_BLOCKS + 1) if f'{root}.{i + 1}.block.{member}{conv}' not in shapes),
                 MAX_BLOCKS + 1)
    if not 1 <= count <= MAX_BLOCKS:
      raise LmsptError(f"{path}: {root} has {count} blocks: not in the layout of LM-SPT's release")
    return tuple(size(f'{root}.{i + 1}.block.{member}{conv}', 2) // 2 for i in range(count))

  encoders = [part for part in ('semantic_encoder', 'acoustic_encoder')
              if any(key.startswith(f'{part}.') for key in shapes)]
  if not encoders:
    raise LmsptError(f"{path}: no tensor of an encoder: not in the layout of LM-SPT's release")
  encoder = encoders[0]
  strides = rates(f'{encoder}.block', 4)
  resynthesis_rates = rates('aux_decoder.model', 1)
  if 'quantizer.rvq_first.in_proj.weight_v' in shapes:
    raise LmsptError(f"{path}: its semantic quantizer is an FSQ, whose levels can't be told from shapes; give the "
                     'config (e.g. configs/lmspt_12_5hz_fsq.py)')
  tables = [f'quantizer.rvq_rest.quantizers.{i}.codebook.weight' for i in range(MAX_CODEBOOKS + 1)]
  semantic, count = 'quantizer.rvq_first.quantizers.0.codebook.weight', sum(key in shapes for key in tables)
  if not 1 <= count <= MAX_CODEBOOKS:
    raise LmsptError(f"{path}: {count} acoustic codebooks: not in the layout of LM-SPT's release")
  hop, resynthesis_hop = math.prod(strides), math.prod(resynthesis_rates)
  if not hop or not resynthesis_hop or hop * RESYNTHESIS_RATE % resynthesis_hop:
    raise LmsptError(f'{path}: strides {strides} and {resynthesis_rates} of the auxiliary decoder: no sample rate at '
                     'which it speaks at 16 kHz; give the config')
  defaults = ModelConfig()
  config = ModelConfig(
      sample_rate=hop * RESYNTHESIS_RATE // resynthesis_hop, encoder_strides=strides, causal=causal,
      encoder_channels=size(f'{encoder}.block.0{conv}', 0), shared_encoder=len(encoders) == 1,
      latent_dim=size(f'{encoder}.block.{len(strides) + 2}{conv}', 0),
      decoder_channels=size(f'decoder.model.0{conv}', 0), decoder_rates=rates('decoder.model', 1),
      resynthesis_sample_rate=RESYNTHESIS_RATE, resynthesis_channels=size(f'aux_decoder.model.0{conv}', 0),
      resynthesis_rates=resynthesis_rates,
      semantic=QuantizerConfig(codebook_size=size(semantic, 0, 2), code_dim=size(semantic, 1, 2)),
      acoustic=QuantizerConfig(num_codebooks=count, codebook_size=size(tables[0], 0, 2),
                               code_dim=size(tables[0], 1, 2), dropout=defaults.acoustic.dropout))
  return checked_config(config, len(shapes), path)


def _stored(tensors: _Tensors) -> tuple[ModelConfig | None, str]:
  """(config, licence) that `write_release` wrote; None and '' in files of others."""
  text = tensors.metadata.get(METADATA)
  if text is None:
    return None, ''
  values = parse_json(text, f'{tensors.path}: metadata {METADATA}')
  fields = values if isinstance(values, dict) else {}
  model, license = fields.get('model'), fields.get('license')
  if not isinstance(model, dict) or not isinstance(license, str):
    raise LmsptError(f"{tensors.path}: metadata {METADATA} has no 'model' and 'license': the file is damaged")
  try:
    config = from_dict(ModelConfig, model)
  except LmsptError as error:
    raise LmsptError(f'{tensors.path}: metadata {METADATA}: {error}') from error
  return checked_config(config, len(tensors), str(tensors.path)), license


def checked_config(config: ModelConfig, num_tensors: int, path: str) -> ModelConfig:
  """The config, if building it costs no more than a file of so many tensors could hold."""
  try:
    config.check()
  except LmsptError as error:
    raise LmsptError(f'{path}: {error}') from error
  if config.num_residual_units * 8 > num_tensors:
    raise LmsptError(f'{path}: {num_tensors} tensors, too few for the {config.num_residual_units} residual units of '
                     'its config')
  return config


class _Tensors(Mapping[str, np.ndarray]):
  """A file's tensors, read when asked for; `shapes` and `metadata` are read at once."""

  def __init__(self, path: Path):
    self.path, self._file = path, SafetensorsFile(path)
    self.metadata, self.shapes = self._file.metadata, self._file.shapes
    wrong = next((key for key, dtype in self._file.dtypes.items() if dtype not in _DTYPES), None)
    if wrong is not None:
      raise LmsptError(f'{path}: {wrong} is {self._file.dtypes[wrong]}: release weights are {" or ".join(_DTYPES)}')

  def __getitem__(self, key: str) -> np.ndarray:
    if key not in self.shapes:
      raise KeyError(key)
    value = np.asarray(self._file.read(key), np.float32)
    if not np.isfinite(value).all():
      raise LmsptError(f'{key} holds values that are not finite: the file is damaged')
    return value

  def __contains__(self, key: object) -> bool:
    return key in self.shapes

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)
