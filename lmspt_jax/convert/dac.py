"""Weights of `descript-audio-codec` modules, which the LM-SPT release's are built of, in this package's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from lmspt_jax.config import DiscriminatorConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.discriminators import Discriminators


def discriminator_params_from_torch(state_dict: Mapping[str, np.ndarray],
                                    config: DiscriminatorConfig) -> dict[str, Any]:
  """Parameters of `Discriminators(config)` from the state dict of `dac.model.discriminator.Discriminator`.

  `state_dict` holds numpy arrays under PyTorch's names. Returns nested dictionaries of float32 arrays (list layers
  under integer keys), as `nnx.replace_by_pure_dict` takes them. Raises LmsptError naming the first key that is
  missing, left over or of another shape than the config's.
  """
  abstract = nnx.eval_shape(lambda: Discriminators(config, sample_rate=1, rngs=nnx.Rngs(0)))
  wanted = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
  used = set()

  def read(path, leaf):
    keys = [p.key for p in path]
    name = _torch_name(keys)
    if name not in state_dict:
      raise LmsptError(f'discriminator weights lack {name!r}: do they belong to this discriminator config?')
    used.add(name)
    value = _from_torch(np.asarray(state_dict[name], np.float32), keys[-1], leaf.ndim)
    if value.shape != leaf.shape:
      raise LmsptError(f'discriminator weight {name!r} has shape {value.shape} in this layout: '
                       f'the config wants {leaf.shape}')
    return value

  params = jax.tree_util.tree_map_with_path(read, wanted)
  left = sorted(set(state_dict) - used)
  if left:
    raise LmsptError(f'discriminator weights hold {left[0]!r}, which this discriminator config has no place for')
  return params


def _torch_name(keys: list[str | int]) -> str:
  # PyTorch wraps a convolution and its activation in a Sequential, of which the convolution is member 0.
  *layer, parameter = map(str, keys)
  return '.'.join([*layer, parameter] if layer[-1] == 'conv_post' else [*layer, '0', parameter])


def _from_torch(value: np.ndarray, parameter: str, ndim: int) -> np.ndarray:
  """[O, I, K, 1], [O, I, K] or [O, I, Hk, Wk] -> [Hk, Wk, I, O], the strided axis last; gains and biases -> [O]."""
  if parameter != 'weight_v':
    return value.reshape(-1)
  if value.ndim == 3:  # multi-scale
    value = value[:, :, None, :]
  elif value.shape[3] == 1:  # multi-period: a period's phases lie along PyTorch's last axis
    value = value.swapaxes(2, 3)
  return value.transpose(2, 3, 1, 0)
