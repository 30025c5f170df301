"""The codec as ONNX: `export/graphs.py` says what the graphs take and give. They run without jax.

The networks are written node by node from the model's layers, rather than converted from what JAX traces of them: they
are a handful of operators, and so the graphs keep PyTorch's layout [B, C, T], in which ONNX convolves, and depend on
`onnx` alone. Kernels are stored as they are applied, without their weight normalisation. Everything is float32.

Axes: B batch, C channels, T steps, K codebooks; of kernels K taps, I channels in, O channels out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmspt_jax.config import ModelConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.export.graphs import FORMAT_VERSION, graph_names, write_bytes
from lmspt_jax.models.codec import Decoder, Encoder
from lmspt_jax.models.folding import applied_kernel, directions
from lmspt_jax.models.layers import Conv1d, ResidualUnit, Snake, Upsample1d
from lmspt_jax.models.quantizers import (
  CANDIDATES,
  FiniteScalarQuantizer,
  ResidualQuantizer,
  VectorQuantizer,
)
from lmspt_jax.models.tokenizer import SpeechTokenizer, merge_tokenizer
from lmspt_jax.version import __version__

# Old enough for runtimes of 2022 (onnxruntime 1.12), new enough for every operator here.
OPSET, IR_VERSION = 17, 8


def write_onnx(folder: Path, config: ModelConfig, params: dict[str, Any], codebooks: dict[str, Any], *,
               resynthesis: bool) -> list[Path]:
  """Writes encode.onnx, decode.onnx and, if wanted, resynthesis.onnx into an existing folder.

  Args:
    params, codebooks: the model's arrays, as `models.tokenizer.split_tokenizer` parts them.

  Raises:
    LmsptError: `onnx` is not installed, or a file can't be written.
  """
  model = merge_tokenizer(config, params, codebooks)
  build = {'encode': _encode, 'decode': _decode, 'resynthesis': _resynthesis}
  return [write_bytes(folder / f'{name}.onnx', build[name](model).serialised(name))
          for name in graph_names(resynthesis)]


def versions() -> dict[str, Any]:
  """What the files depend on: {'format', 'opset', 'ir'}."""
  return {'format': FORMAT_VERSION, 'opset': OPSET, 'ir': IR_VERSION}


# ---------------------------------------------------------------- the graphs


def _encode(model: SpeechTokenizer) -> _Graph:
  config = model.config
  graph = _Graph('audio', 'float32', ('batch', 'samples'))
  samples = graph.add('Shape', 'audio', start=1, end=2)
  missing = graph.add('Mod', graph.add('Neg', samples), graph.array([config.hop]))
  whole = graph.add('Pad', 'audio', graph.add('Concat', graph.array([0, 0, 0]), missing, axis=0))
  audio = graph.add('Unsqueeze', whole, graph.array([1]))
  latent = graph.add('Transpose', _encoder(graph, audio, model.semantic_encoder), perm=[0, 2, 1])
  semantic_codes, z_semantic = _quantize(graph, latent, model.semantic_quantizer)
  if not config.shared_encoder:
    latent = graph.add('Transpose', _encoder(graph, audio, model.acoustic_encoder), perm=[0, 2, 1])
  if config.subtract_semantic:
    latent = graph.add('Sub', latent, z_semantic)
  acoustic_codes, _ = _quantize(graph, latent, model.acoustic_quantizer)
  graph.add('Concat', *semantic_codes, *acoustic_codes, axis=1, output='ids')
  return graph.returning('ids', 'int32', ('batch', config.num_codebooks, 'frames'))


def _decode(model: SpeechTokenizer) -> _Graph:
  config = model.config
  graph = _Graph('ids', 'int32', ('batch', 'codebooks', 'frames'))
  # Rows that were not given are -1, which adds nothing. More rows than codebooks are a negative size, an error.
  sizes = [graph.add('Shape', 'ids', start=axis, end=axis + 1) for axis in range(3)]
  absent = graph.add('Concat', sizes[0], graph.add('Sub', graph.array([config.num_codebooks]), sizes[1]), sizes[2],
                     axis=0)
  absent = graph.add('Expand', graph.array(np.full((1, 1, 1), -1, np.int32)), absent)
  ids = graph.add('Concat', 'ids', absent, axis=1)
  latent = graph.add('Add', _lookup(graph, ids, 0, model.semantic_quantizer),
                     _lookup(graph, ids, 1, model.acoustic_quantizer))
  _decoder(graph, latent, model.decoder)
  return graph.returning('audio', 'float32', ('batch', 'samples'))


def _resynthesis(model: SpeechTokenizer) -> _Graph:
  graph = _Graph('ids', 'int32', ('batch', 'codebooks', 'frames'))
  _decoder(graph, _lookup(graph, 'ids', 0, model.semantic_quantizer), model.resynthesis_decoder)
  return graph.returning('audio', 'float32', ('batch', 'samples'))


# ---------------------------------------------------------------- networks, [B, C, T]


def _encoder(graph: _Graph, x: str, encoder: Encoder) -> str:
  x = _conv(graph, x, encoder.conv_in)
  for block in encoder.blocks:
    for unit in block.units:
      x = _unit(graph, x, unit)
    x = _conv(graph, _snake(graph, x, block.snake), block.conv)
  return _conv(graph, _snake(graph, x, encoder.snake_out), encoder.conv_out)


def _decoder(graph: _Graph, z_BTC: str, decoder: Decoder) -> None:
  """Ends in the output 'audio' [B, N], whole frames."""
  x = _conv(graph, graph.add('Transpose', z_BTC, perm=[0, 2, 1]), decoder.conv_in)
  short = 0  # steps that odd rates have left out so far; it does not depend on T
  for block in decoder.blocks:
    x = _upsample(graph, _snake(graph, x, block.snake), block.upsample)
    short = short * block.upsample.rate + sum(block.upsample.trimmed) - block.upsample.rate
    for unit in block.units:
      x = _unit(graph, x, unit)
  x = graph.add('Tanh', _conv(graph, _snake(graph, x, decoder.snake_out), decoder.conv_out))
  x = graph.add('Squeeze', x, graph.array([1]))
  graph.add('Pad', x, graph.array([0, 0, 0, short]), output='audio')


def _unit(graph: _Graph, x: str, unit: ResidualUnit) -> str:
  y = _conv(graph, _snake(graph, x, unit.snake_in), unit.conv_in)
  return graph.add('Add', x, _conv(graph, _snake(graph, y, unit.snake_out), unit.conv_out))


def _snake(graph: _Graph, x: str, snake: Snake) -> str:
  alpha_C1 = np.asarray(snake.alpha[...])[:, None]
  sine = graph.add('Sin', graph.add('Mul', x, graph.array(alpha_C1)))
  square = graph.add('Mul', sine, sine)
  return graph.add('Add', x, graph.add('Div', square, graph.array(alpha_C1 + np.float32(1e-9))))


def _conv(graph: _Graph, x: str, conv: Conv1d) -> str:
  """T is a multiple of the stride: recordings are whole frames. So a causal convolution needs nothing on the right."""
  pads = [conv.padding, conv.padding]
  if conv.causal:
    pads = [(conv.kernel_size - 1) * conv.dilation + 1 - conv.stride, 0]
  return graph.add('Conv', x, graph.array(applied_kernel(conv).transpose(2, 1, 0)), graph.array(conv.bias[...]),
                   pads=pads, kernel_shape=[conv.kernel_size], strides=[conv.stride], dilations=[conv.dilation])


def _upsample(graph: _Graph, x: str, upsample: Upsample1d) -> str:
  return graph.add('ConvTranspose', x, graph.array(applied_kernel(upsample).transpose(1, 2, 0)),
                   graph.array(upsample.bias[...]), kernel_shape=[2 * upsample.rate], strides=[upsample.rate],
                   pads=list(upsample.trimmed))


# ---------------------------------------------------------------- quantizers, [B, T, C] as in the model


def _quantize(graph: _Graph, z: str, residual: ResidualQuantizer) -> tuple[list[str], str]:
  """Codes, each [B, 1, T] int32, and the sum of what they stand for."""
  codes, total = [], ''
  for quantizer in residual.quantizers:
    one = _finite_scalar if isinstance(quantizer, FiniteScalarQuantizer) else _nearest
    codes_BT, z_q = one(graph, _project(graph, z, quantizer.in_proj), quantizer)
    quantized = _project(graph, z_q, quantizer.out_proj)
    codes.append(graph.add('Unsqueeze', codes_BT, graph.array([1])))
    total = graph.add('Add', total, quantized) if total else quantized
    z = graph.add('Sub', z, quantized)
  return codes, total


def _nearest(graph: _Graph, z_e: str, quantizer: VectorQuantizer) -> tuple[str, str]:
  """As `quantizers.nearest_codes` finds it; N candidates."""
  codebook_SD = np.asarray(quantizer.codebook[...])
  directions_SD = directions(codebook_SD)
  last = graph.array([-1])
  norm = graph.add('Sqrt', graph.add('Max', graph.add('ReduceSum', graph.add('Mul', z_e, z_e), last, keepdims=1),
                                     graph.array(np.float32(1e-24))))
  similarity = graph.add('MatMul', graph.add('Div', z_e, norm), graph.array(directions_SD.T))
  codes_BTN = graph.top(similarity, min(CANDIDATES, len(codebook_SD)))
  first_BT1 = graph.add('Slice', codes_BTN, graph.array([0]), graph.array([1]), last)
  difference_BTND = graph.add('Sub', graph.add('Gather', graph.array(directions_SD), codes_BTN, axis=0),
                              graph.add('Gather', graph.array(directions_SD), first_BT1, axis=0))
  gains_BTN = graph.add('ReduceSum', graph.add('Mul', graph.add('Unsqueeze', z_e, graph.array([-2])), difference_BTND),
                        last, keepdims=0)
  best_BT1 = graph.add('ArgMax', gains_BTN, axis=-1, keepdims=1, select_last_index=0)
  best_BT1 = graph.add('GatherElements', codes_BTN, best_BT1, axis=-1)
  # Of equal codes the first: found here, as every code's is known.
  _, firsts, inverse = np.unique(directions_SD, axis=0, return_index=True, return_inverse=True)
  codes = graph.add('Gather', graph.array(firsts[inverse.reshape(-1)]), graph.add('Squeeze', best_BT1, last), axis=0)
  z_q = graph.add('Gather', graph.array(codebook_SD), codes, axis=0)
  return graph.cast(codes, 'int32'), _straight_through(graph, z_e, z_q)


def _finite_scalar(graph: _Graph, z_e: str, quantizer: FiniteScalarQuantizer) -> tuple[str, str]:
  (levels, basis), (reach, offset) = quantizer.radix(), quantizer.bounds()
  half = graph.array(np.asarray(levels // 2, np.float32))
  inner = graph.add('Tanh', graph.add('Add', z_e, graph.array(jnp.arctanh(offset / reach))))
  bounded = graph.add('Sub', graph.add('Mul', inner, graph.array(reach)), graph.array(offset))
  whole = graph.add('Round', bounded)  # halves to even, as jnp.round
  digits = graph.cast(graph.add('Add', whole, half), 'int32')
  codes = graph.add('ReduceSum', graph.add('Mul', digits, graph.array(basis)), graph.array([-1]), keepdims=0)
  return codes, graph.add('Div', _straight_through(graph, bounded, whole), half)


def _straight_through(graph: _Graph, z_e: str, z_q: str) -> str:
  """z_q with the model's rounding: it adds to z_e what is missing."""
  return graph.add('Add', z_e, graph.add('Sub', z_q, z_e))


def _lookup(graph: _Graph, ids_BKT: str, first: int, residual: ResidualQuantizer) -> str:
  """The sum [B, T, C] of what the rows of ids from `first` on stand for."""
  total = ''
  for row, quantizer in enumerate(residual.quantizers, first):
    codes = graph.add('Gather', ids_BKT, graph.array(np.int64(row)), axis=1)
    if isinstance(quantizer, FiniteScalarQuantizer):
      levels, basis = quantizer.radix()
      digits = graph.add('Div', graph.add('Unsqueeze', codes, graph.array([-1])), graph.array(basis))
      digits = graph.add('Mod', digits, graph.array(levels))
      steps = graph.cast(graph.add('Sub', digits, graph.array(levels // 2)), 'float32')
      z_q = graph.add('Div', steps, graph.array(np.asarray(levels // 2, np.float32)))
    else:
      z_q = graph.add('Gather', graph.array(quantizer.codebook[...]), codes, axis=0)
    absent = graph.add('Unsqueeze', graph.add('Less', codes, graph.array(np.int32(0))), graph.array([-1]))
    quantized = graph.add('Where', absent, graph.array(np.float32(0)), _project(graph, z_q, quantizer.out_proj))
    total = graph.add('Add', total, quantized) if total else quantized
  return total


def _project(graph: _Graph, x_BTC: str, conv: Conv1d) -> str:
  return graph.add('Add', graph.add('MatMul', x_BTC, graph.array(applied_kernel(conv)[0])), graph.array(conv.bias[...]))


# ---------------------------------------------------------------- writing


def _onnx() -> Any:
  """The package, which is an extra."""
  try:
    import onnx
  except ImportError as error:
    raise LmsptError(f"ONNX files are written by the package onnx ({error}): pip install 'lmspt_jax[onnx]'") from error
  return onnx


class _Graph:
  """A graph of one input and one output as it is written; values are known by name."""

  def __init__(self, name: str, dtype: str, shape: tuple[int | str, ...]):
    self._onnx = _onnx()
    self._nodes: list[Any] = []
    self._arrays: dict[tuple[Any, ...], Any] = {}
    self._input, self._output = self._value(name, dtype, shape), None

  def add(self, operator: str, *inputs: str, output: str = '', **attributes: Any) -> str:
    """Appends a node; the name of its output."""
    output = output or f'{operator}_{len(self._nodes)}'
    self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], **attributes))
    return output

  def top(self, value: str, count: int) -> str:
    """Positions of the largest values along the last axis, of equal ones the first."""
    name = f'TopK_{len(self._nodes)}'
    self._nodes.append(self._onnx.helper.make_node('TopK', [value, self.array([count])], [f'{name}_values', name],
                                                   axis=-1, largest=1, sorted=1))
    return name

  def cast(self, value: str, dtype: str) -> str:
    return self.add('Cast', value, to=self._type(dtype))

  def array(self, value: Any) -> str:
    """A constant; Python's integers are int64, as ONNX wants shapes and axes. Equal ones are stored once."""
    value = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    key = (value.dtype.str, value.shape, value.tobytes())
    if key not in self._arrays:
      self._arrays[key] = self._onnx.numpy_helper.from_array(value, f'array_{len(self._arrays)}')
    return self._arrays[key].name

  def returning(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> _Graph:
    """The graph, whose output is `name`."""
    self._output = self._value(name, dtype, shape)
    return self

  def serialised(self, name: str) -> bytes:
    """A whole model, checked."""
    helper = self._onnx.helper
    graph = helper.make_graph(self._nodes, name, [self._input], [self._output], list(self._arrays.values()))
    model = helper.make_model(graph, producer_name='lmspt_jax', producer_version=__version__, ir_version=IR_VERSION,
                              model_version=FORMAT_VERSION, opset_imports=[helper.make_opsetid('', OPSET)])
    self._onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)

  def _value(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> Any:
    return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), shape)

  def _type(self, dtype: str) -> int:
    return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
