"""What OpenAI, Hugging Face and CTranslate2 call the parameters of `models.whisper`, and how they lay them out."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

# Parameter paths like decoder/blocks/3/cross_attention/query/kernel are rewritten by every rule in turn.
OPENAI_NAMES = (
  (r'cross_attention', 'cross_attn'),
  (r'attention', 'attn'),
  (r'_norm/', '_ln/'),
  (r'^encoder/norm', 'encoder/ln_post'),
  (r'^decoder/norm', 'decoder/ln'),
  (r'mlp/up', 'mlp/0'),
  (r'mlp/down', 'mlp/2'),
  (r'positions$', 'positional_embedding'),
  (r'embedding/embedding$', 'token_embedding/weight'),
  (r'(kernel|scale)$', 'weight'),
  (r'/', '.'),
)
HUGGING_FACE_NAMES = (
  (r'blocks', 'layers'),
  (r'/attention', '/self_attn'),
  (r'cross_attention', 'encoder_attn'),
  (r'attn_norm', 'attn_layer_norm'),
  (r'mlp_norm', 'final_layer_norm'),
  (r'/norm', '/layer_norm'),
  (r'(query|key|value|out)/', lambda m: {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'out'}[m[1]] + '_proj/'),
  (r'mlp/up', 'fc1'),
  (r'mlp/down', 'fc2'),
  (r'positions$', 'embed_positions/weight'),
  (r'embedding/embedding$', 'embed_tokens/weight'),
  (r'(kernel|scale)$', 'weight'),
  (r'/', '.'),
)
CTRANSLATE2_NAMES = (
  (r'blocks/', 'layer_'),
  (r'/attention', '/self_attention'),
  (r'cross_attention', 'attention'),
  (r'mlp', 'ffn'),
  (r'(attention|ffn)_norm', r'\1/layer_norm'),
  (r'/norm', '/layer_norm'),
  (r'layer_norm/bias', 'layer_norm/beta'),
  (r'layer_norm/scale', 'layer_norm/gamma'),
  (r'self_attention/(query|key|value)', 'self_attention/linear_0'),  # fused by rows
  (r'self_attention/out', 'self_attention/linear_1'),
  (r'/attention/query', '/attention/linear_0'),
  (r'/attention/(key|value)', '/attention/linear_1'),
  (r'/attention/out', '/attention/linear_2'),
  (r'ffn/up', 'ffn/linear_0'),
  (r'ffn/down', 'ffn/linear_1'),
  (r'positions$', 'position_encodings/encodings'),
  (r'embedding/embedding$', 'embeddings/weight'),
  (r'kernel$', 'weight'),
)


def foreign_name(path: str, rules: Rules) -> str:
  """The name a format gives to the parameter at `path`."""
  for pattern, replacement in rules:
    path = re.sub(pattern, replacement, path)
  return path


def foreign_layout(path: str, value: np.ndarray) -> np.ndarray:
  """Linear and convolution kernels are stored [..., in, out] here, [out, in, ...] elsewhere; its own inverse."""
  return value.transpose() if path.endswith('kernel') else value


def foreign_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that `foreign_layout` gives to an array."""
  return shape[::-1] if path.endswith('kernel') else shape
