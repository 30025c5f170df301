"""A model for inference: kernels as they are applied, in place of a direction and a gain each, and codes at length 1.

Normalisation inside a compiled program is work at every call, and XLA:CPU's sum over a large kernel depends on the
number of threads in its last bits. Here it is done once, in numpy and float64: a choice between two codes that are
nearly equally near depends on the last bits of both, which so are the same in every program and in exported graphs.
Layers that hold a folded kernel convolve in the `steady` form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from lmspt_jax.config import ModelConfig
from lmspt_jax.models.layers import Conv1d, Upsample1d, upsampling_kernel
from lmspt_jax.models.quantizers import VectorQuantizer
from lmspt_jax.models.tokenizer import merge_tokenizer, split_tokenizer


def folded_tokenizer(config: ModelConfig, params: dict[str, Any],
                     codebooks: dict[str, Any]) -> tuple[nnx.GraphDef, dict, dict]:
  """`split_tokenizer` of the model around these arrays, every `weight_v` being the kernel float32 [K, I, O], those of
  transposed convolutions as `upsampling_kernel` lays them out, and codebooks having their `directions`."""
  module = merge_tokenizer(config, params, codebooks)
  for _, layer in nnx.iter_modules(module):
    if isinstance(layer, Conv1d | Upsample1d):
      kernel_KIO = applied_kernel(layer)
      layer.weight_v = nnx.Param(
          upsampling_kernel(kernel_KIO, layer.rate) if isinstance(layer, Upsample1d) else kernel_KIO)
      layer.weight_g = None
    elif isinstance(layer, VectorQuantizer):
      layer.directions = nnx.Param(directions(layer.codebook[...]))
  return split_tokenizer(module)


def applied_kernel(layer: Conv1d | Upsample1d) -> np.ndarray:
  """The kernel of a layer that is not folded, float32 [K, I, O]."""
  v_KIO = np.asarray(layer.weight_v[...], np.float64)
  others = tuple(axis for axis in range(3) if axis != layer.gain_axis)
  gain = np.asarray(layer.weight_g[...], np.float64).reshape([-1 if a == layer.gain_axis else 1 for a in range(3)])
  return (v_KIO * (gain / np.sqrt(np.sum(np.square(v_KIO), axis=others, keepdims=True)))).astype(np.float32)


def directions(codebook_SD: Any) -> np.ndarray:
  """Codes at length 1, float32 [S, D]."""
  wide_SD = np.asarray(codebook_SD, np.float64)
  return (wide_SD / np.maximum(np.linalg.norm(wide_SD, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
