"""The codec as StableHLO, by `jax.export`: `export/graphs.py` says what the graphs take and give.

A graph is two files: NAME.stablehlo, a serialised `jax.export.Exported` of a function of (weights, array), and
NAME.safetensors, those weights by name. As constants inside the graph they would be copied into every compiled program,
one per shape. No code of this package is needed to call it:

    encode = jax.export.deserialize(bytearray(Path('encode.stablehlo').read_bytes()))
    weights = jax.device_put(safetensors.numpy.load_file('encode.safetensors'))
    ids = jax.jit(encode.call)(weights, audio)

It runs on CPU, CUDA and TPU: transposed convolutions, which have a form for CPU and one for the others
(`models/layers.py`), are in it in both. JAX promises to read a serialised graph for six months of its later releases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from lmspt_jax.config import ModelConfig
from lmspt_jax.export.graphs import FORMAT_VERSION, graph_names, write_bytes
from lmspt_jax.models.folding import folded_tokenizer
from lmspt_jax.models.tokenizer import SpeechTokenizer
from lmspt_jax.pretrained.model import named_arrays

PLATFORMS = ('cpu', 'cuda', 'tpu')
# The parts of the model that a graph reads, where the model has them.
_PARTS = {'encode': ('semantic_encoder', 'acoustic_encoder', 'semantic_quantizer', 'acoustic_quantizer'),
          'decode': ('semantic_quantizer', 'acoustic_quantizer', 'decoder'),
          'resynthesis': ('semantic_quantizer', 'resynthesis_decoder')}


def write_stablehlo(folder: Path, config: ModelConfig, params: dict[str, Any], codebooks: dict[str, Any], *,
                    resynthesis: bool) -> list[Path]:
  """Writes encode, decode and, if wanted, resynthesis into an existing folder.

  Args:
    params, codebooks: the model's arrays, as `models.tokenizer.split_tokenizer` parts them.

  Returns:
    The files, in the order in which they were written.

  Raises:
    LmsptError: a file can't be written.
  """
  graphdef, *folded = folded_tokenizer(config, params, codebooks)
  arrays = named_arrays(folded[0]) | named_arrays(folded[1])
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), folded)

  def model(weights: dict[str, jax.Array]) -> SpeechTokenizer:
    """Around some of its weights; the others are shapes, and can't be computed with."""
    return nnx.merge(graphdef, *jax.tree_util.tree_map_with_path(
        lambda path, leaf: weights.get(_name(path), leaf), abstract))

  written = []
  for graph in graph_names(resynthesis):
    weights = {name: np.ascontiguousarray(leaf) for name, leaf in arrays.items()
               if name.partition('/')[0] in _PARTS[graph]}
    function, array = _function(graph, config, model)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    with _without_traces():
      exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, array)
    written += [write_bytes(folder / f'{graph}.stablehlo', bytes(exported.serialize())),
                write_bytes(folder / f'{graph}.safetensors', safetensors.numpy.save(weights))]
  return written


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
  """Else JAX writes into a graph, line by line, where in which files of this machine it came from."""
  flag = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, flag)
  jax.config.update(flag, 0)
  try:
    yield
  finally:
    jax.config.update(flag, before)


def versions() -> dict[str, Any]:
  """What the files depend on: {'format', 'jax', 'calling_convention', 'platforms'}."""
  return {'format': FORMAT_VERSION, 'jax': jax.__version__, 'platforms': list(PLATFORMS),
          'calling_convention': jax.export.maximum_supported_calling_convention_version}


def _function(graph: str, config: ModelConfig, model: Callable[[dict[str, jax.Array]], SpeechTokenizer]
              ) -> tuple[Callable[..., jax.Array], jax.ShapeDtypeStruct]:
  """(function of (weights, array), its array)."""
  if graph == 'encode':
    def encode(weights: dict[str, jax.Array], audio_BN: jax.Array) -> jax.Array:
      whole = config.num_frames(audio_BN.shape[1]) * config.hop
      return model(weights).encode(jnp.pad(audio_BN, ((0, 0), (0, whole - audio_BN.shape[1]))))

    return encode, jax.ShapeDtypeStruct(jax.export.symbolic_shape('batch, samples'), jnp.float32)

  def decode(weights: dict[str, jax.Array], ids_BKT: jax.Array) -> jax.Array:
    absent = ((0, 0), (0, config.num_codebooks - ids_BKT.shape[1]), (0, 0))
    return model(weights).decode(jnp.pad(ids_BKT, absent, constant_values=-1))

  def resynthesis(weights: dict[str, jax.Array], ids_BKT: jax.Array) -> jax.Array:
    return model(weights).resynthesize(ids_BKT)

  shape = jax.export.symbolic_shape('batch, codebooks, frames', constraints=[f'codebooks <= {config.num_codebooks}'])
  return {'decode': decode, 'resynthesis': resynthesis}[graph], jax.ShapeDtypeStruct(shape, jnp.int32)


def _name(path: tuple[Any, ...]) -> str:
  """'decoder/blocks/0/upsample/bias' of a leaf of (params, codebooks)."""
  return jax.tree_util.keystr(path[1:], simple=True, separator='/')
