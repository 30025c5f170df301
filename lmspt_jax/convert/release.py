"""The key layout of the authors' release (`kakao/lmspt`): which tensor is which parameter, and how it is turned.

Only the non-causal layout; reading and writing files of it is not built yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lmspt_jax.config import ModelConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.tokenizer import abstract_tokenizer

_UNIT = {'snake_in': 0, 'conv_in': 1, 'snake_out': 2, 'conv_out': 3}


def release_name(path: str, config: ModelConfig) -> str:
  """The release's key of one of our parameters, e.g. 'decoder/conv_in/bias' -> 'decoder.model.0.bias'."""
  part, rest = path.split('/', 1)
  if part.endswith('_quantizer'):
    stack = 'rvq_first' if part.startswith('semantic') else 'rvq_rest'
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
  return f'{root}.{rest}'


def from_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
  """PyTorch's axes to ours: convolutions [O, I, K] and transposed ones [I, O, K] -> [K, I, O]; the rest flattened."""
  if path.endswith('weight_v'):
    return value.transpose(2, 0, 1) if '/upsample/' in path else value.transpose(2, 1, 0)
  return value if path.endswith('codebook') else value.reshape(-1)


def tokenizer_params_from_release(state_dict: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Parameters of `SpeechTokenizer(config)` from a state dict of numpy arrays under the release's names.

  The usage buffers are passed over.

  Raises:
    LmsptError: naming all keys that are missing, unexpected or of another shape than the config's.
  """
  if config.causal or config.shared_encoder:
    raise LmsptError('release weights: the causal and shared-encoder layouts can\'t be read yet')
  _, wanted, _ = abstract_tokenizer(config)
  used, missing, misshaped = set(), [], []

  def read(path, leaf):
    name = '/'.join(str(p.key) for p in path)
    key = release_name(name, config)
    used.add(key)
    if key not in state_dict:
      missing.append(key)
      return leaf
    value = from_torch_layout(name, np.asarray(state_dict[key], np.float32))
    if value.shape != leaf.shape:
      misshaped.append(f'{key} {tuple(state_dict[key].shape)}')
    return value

  params = jax.tree_util.tree_map_with_path(read, wanted)
  unexpected = [k for k in state_dict if k not in used and not k.endswith('_vocab_usage')]
  problems = [f'{label}: {", ".join(keys[:5])}{f" and {len(keys) - 5} more" if len(keys) > 5 else ""}'
              for label, keys in (('missing', missing), ('unexpected', unexpected), ('misshaped', misshaped)) if keys]
  if problems:
    raise LmsptError(f'release weights don\'t fit the config: {"; ".join(problems)}')
  return params
