"""Weights for a model of the codec's layers without running its initialisation, which takes JAX half a minute."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def random_weights(abstract: Any, seed: int = 0) -> Any:
  """Arrays for nested dictionaries of shapes under the layers' parameter names, as large as training starts them."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    value = {
        'weight_v': lambda: rng.uniform(-1, 1, leaf.shape), 'weight_g': lambda: np.full(leaf.shape, 3**-0.5),
        'bias': lambda: np.zeros(leaf.shape), 'alpha': lambda: np.ones(leaf.shape),
        'counts': lambda: np.ones(leaf.shape), 'mass': lambda: np.ones(leaf.shape),
        'codebook': lambda: rng.normal(size=leaf.shape), 'sums': lambda: rng.normal(size=leaf.shape)}[path[-1].key]()
    return value.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, abstract)


def stirred_weights(abstract: Any, seed: int = 0) -> Any:
  """`random_weights` with snakes, gains and biases away from where training starts, so that a swapped one shows.

  Gains before the codebooks are large: the latents of real speech then spread over the codes, and over FSQ's levels.
  """
  rng = np.random.default_rng(seed)

  def stir(path, value):
    name, gain = path[-1].key, 100 if path[-2].key == 'in_proj' else 1
    if name == 'bias':
      value = rng.uniform(-0.005, 0.005, value.shape)
    elif name in ('alpha', 'weight_g'):
      value = value * gain * rng.uniform(0.7, 1.4, value.shape)
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(stir, random_weights(abstract, seed))
