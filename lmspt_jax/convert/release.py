"""The key layout of the authors' release (`kakao/lmspt`): which tensor is which parameter, and how it is turned.

Their two encoders, quantizers and decoders; causal models (a convolution's arrays under `.conv.`), a shared encoder
(stored once, under either name) and an FSQ in place of the semantic codebook included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lmspt_jax.config import ModelConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.tokenizer import abstract_tokenizer

USAGE = {'semantic_quantizer': 'quantizer.semantic_vocab_usage', 'acoustic_quantizer': 'quantizer.acoustic_vocab_usage'}
# What training keeps beside a codebook and neither encoding nor decoding reads.
STATISTICS = ('counts', 'sums', 'mass')
_UNIT = {'snake_in': 0, 'conv_in': 1, 'snake_out': 2, 'conv_out': 3}


def release_name(path: str, config: ModelConfig) -> str:
  """The release's key of one of our parameters, e.g. 'decoder/conv_in/bias' -> 'decoder.model.0.bias'."""
  part, rest = path.split('/', 1)
  if part.endswith('_quantizer'):
    stack = 'rvq_first' if part.startswith('semantic') else 'rvq_rest'
    if stack == 'rvq_first' and config.semantic.kind == 'fsq':
      rest = rest.removeprefix('quantizers/0/')
    name = f'quantizer.{stack}.{rest.replace("/", ".")}'
    return f'{name}.weight' if name.endswith('codebook') else name
  encoder = part.endswith('_encoder')
  root = f'{part}.block' if encoder else f'{part.replace("resynthesis", "aux")}.model'
  blocks = len({'decoder': config.decoder_rates, 'resynthesis_decoder': config.resynthesis_rates}.get(
      part, config.encoder_strides))
  units = len(config.dilations)

  def block(match: re.Match) -> str:
    index, inner = int(match[1]), match[2]
    if unit := re.fullmatch(r'units/(\d+)/(\w+)/(\w+)', inner):
      layer = f'{int(unit[1]) + (0 if encoder else 2)}.block.{_UNIT[unit[2]]}.{unit[3]}'
    else:
      member, parameter = inner.split('/')
      layer = f'{({"snake": units, "conv": units + 1} if encoder else {"snake": 0, "upsample": 1})[member]}.{parameter}'
    return f'{index + 1}.block.{layer}'

  rest = re.sub(r'^blocks/(\d+)/(.+)$', block, rest)
  rest = re.sub(r'^conv_in/', '0.', rest)
  rest = re.sub(r'^snake_out/', f'{blocks + 1}.', rest)
  rest = re.sub(r'^conv_out/', f'{blocks + 2}.', rest)
  layer, _, parameter = rest.rpartition('.')
  return f'{root}.{layer}.conv.{parameter}' if config.causal and parameter != 'alpha' else f'{root}.{rest}'


def from_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
  """PyTorch's axes to ours: convolutions [O, I, K] and transposed ones [I, O, K] -> [K, I, O]; the rest flattened."""
  if path.endswith('weight_v'):
    return value.transpose(2, 0, 1) if '/upsample/' in path else value.transpose(2, 1, 0)
  return value if path.endswith('codebook') else value.reshape(-1)


def to_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
  """The inverse of `from_torch_layout`: gains get axes of 1 behind, snakes' alphas around."""
  if path.endswith('weight_v'):
    return value.transpose(1, 2, 0) if '/upsample/' in path else value.transpose(2, 1, 0)
  return value.reshape({'weight_g': (-1, 1, 1), 'alpha': (1, -1, 1)}.get(path.rpartition('/')[2], value.shape))


def tokenizer_from_release(state_dict: Mapping[str, np.ndarray],
                           config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """(params, codebooks) of `SpeechTokenizer(config)` from arrays under the release's names.

  Usage buffers are passed over: what training counts of codes starts anew.

  Raises:
    LmsptError: naming all keys that are missing, unexpected or of another shape than the config's.
  """
  _, params, codebooks = abstract_tokenizer(config)
  used, missing, misshaped = set(), {}, {}  # ordered, each key once
  alias = _shared_encoder_alias(state_dict) if config.shared_encoder else lambda key: key

  def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
    name = '/'.join(str(p.key) for p in path)
    key = alias(release_name(name, config))
    used.add(key)
    if key not in state_dict:
      missing[key] = None
      return leaf
    stored = np.asarray(state_dict[key], np.float32)
    if stored.shape != _torch_shape(name, leaf.shape):
      misshaped[f'{key} {stored.shape}'] = None
      return leaf
    return from_torch_layout(name, stored)

  def start(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
    """Of a moving average: the code itself with the mass 1. A fair share of use for all."""
    kind = path[-1].key
    if kind in ('codebook', 'sums'):
      return read((*path[:-1], jax.tree_util.DictKey('codebook')), leaf)
    return np.ones(leaf.shape, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(read, params)
  codebooks = jax.tree_util.tree_map_with_path(start, codebooks)
  unexpected = [key for key in state_dict if key not in used and key not in USAGE.values()]
  problems = [f'{label}: {", ".join(keys[:5])}{f" and {len(keys) - 5} more" if len(keys) > 5 else ""}'
              for label, keys in (('missing', [*missing]), ('unexpected', unexpected), ('misshaped', [*misshaped]))
              if keys]
  if problems:
    raise LmsptError(f'release weights don\'t fit the config: {"; ".join(problems)}')
  return params, codebooks


def release_from_tokenizer(params: dict[str, Any], codebooks: dict[str, Any],
                           config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
  """The inverse: each float32 array's shape, and what makes it, under the release's names; usage buffers are left out.

  Not the arrays, which would be a second copy of the model.
  """
  made = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, codebooks)):
    name = '/'.join(str(p.key) for p in path[1:])
    if name.rpartition('/')[2] not in STATISTICS:
      made[release_name(name, config)] = _torch_shape(name, leaf.shape), functools.partial(_released, name, leaf)
  return made


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return to_torch_layout(name, np.broadcast_to(np.float32(0), shape)).shape


def _released(name: str, leaf: Any) -> np.ndarray:
  return to_torch_layout(name, np.asarray(leaf, np.float32))


def _shared_encoder_alias(state_dict: Mapping[str, np.ndarray]) -> Callable[[str], str]:
  """PyTorch's file holds a shared encoder under the name that sorts first, or whichever its writer kept."""
  if any(key.startswith('semantic_encoder.') for key in state_dict):
    return lambda key: key
  return lambda key: key.replace('semantic_encoder.', 'acoustic_encoder.', 1)
