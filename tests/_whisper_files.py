"""A small Whisper of random weights, and writers of it in the formats that `convert.whisper` reads."""

from __future__ import annotations

import json
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from _whisper_arrays import named_arrays
from flax import nnx

from lmspt_jax.convert.whisper_names import CTRANSLATE2_NAMES, OPENAI_NAMES, foreign_layout, foreign_name
from lmspt_jax.models import whisper

SMALL = whisper.WhisperDims(
  n_mels=8, width=16, heads=2, audio_layers=2, text_layers=1, vocab_size=40, audio_context=10, text_context=12
)


def small_params(dims=SMALL):
  params = nnx.to_pure_dict(nnx.state(whisper.Whisper(dims, rngs=nnx.Rngs(3))))
  # Noise everywhere: fresh biases and scales are all equal and would hide a mix-up.
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(treedef, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def named(params, rules, dims=SMALL):
  """A foreign state dict: parameters under a format's names and in its layout, with the encoder's positions."""
  out = {}
  for path, value in named_arrays(params):
    out[foreign_name(path, rules)] = np.ascontiguousarray(foreign_layout(path, value))
  out[foreign_name('encoder/positions', rules)] = whisper.sinusoids(dims.audio_context, dims.width)
  return out


def ctranslate2_variables(params):
  fused = {}
  for path, value in named_arrays(params):
    name = foreign_name(path, CTRANSLATE2_NAMES)
    order = next((i for i, p in enumerate(('/query/', '/key/', '/value/')) if p in path), 0)
    fused.setdefault(name, {})[order] = foreign_layout(path, value)
  for name, rows in fused.items():
    if name.endswith('bias') and 2 in rows:
      rows[1] = np.zeros_like(rows[2])  # keys have no bias
  out = {name: np.concatenate([rows[i] for i in sorted(rows)]) for name, rows in fused.items()}
  out['encoder/position_encodings/encodings'] = whisper.sinusoids(SMALL.audio_context, SMALL.width)
  out['encoder/num_heads'] = out['decoder/num_heads'] = np.int16(SMALL.heads)
  return out


def write_ctranslate2(path, variables, aliases=(), spec='WhisperSpec', version=6):
  codes = {np.dtype(t): i for i, t in enumerate(('f4', 'i1', 'i2', 'i4', 'f2', ml_dtypes.bfloat16))}
  text = lambda s: struct.pack('<H', len(s) + 1) + s.encode() + b'\0'
  out = [struct.pack('<I', version), text(spec), struct.pack('<II', 3, len(variables))]
  for name, value in variables.items():
    value = np.asarray(value)
    out += [text(name), struct.pack(f'<B{value.ndim}I', value.ndim, *value.shape)]
    out += [struct.pack('<BI', codes[value.dtype], value.nbytes), value.tobytes()]
  out += [struct.pack('<I', len(aliases)), *(text(part) for alias in aliases for part in alias)]
  path.write_bytes(b''.join(out))
  return path


def write_hugging_face(folder, tensors, shards=1, prefix='', **changes):
  folder.mkdir()
  config = {
    'model_type': 'whisper', 'num_mel_bins': 8, 'd_model': 16, 'encoder_layers': 2, 'decoder_layers': 1,
    'vocab_size': 40, 'max_source_positions': 10, 'max_target_positions': 12, 'encoder_attention_heads': 2,
    'decoder_attention_heads': 2,
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config | changes))
  names = sorted(tensors)
  if shards == 1:
    safetensors.numpy.save_file({prefix + n: tensors[n] for n in names}, folder / 'model.safetensors')
    return folder
  files = [f'model-{i + 1:05}-of-{shards:05}.safetensors' for i in range(shards)]
  for i, file in enumerate(files):
    safetensors.numpy.save_file({prefix + n: tensors[n] for n in names[i::shards]}, folder / file)
  weight_map = {prefix + n: files[i % shards] for i, n in enumerate(names)}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  return folder


def write_openai(path, params, dims=SMALL, tensors=None):
  """As `torch.save` writes it: protocol 2, a storage per tensor. `tensors` replaces the named ones of `params`."""
  tensors = named(params, OPENAI_NAMES) if tensors is None else tensors
  text = lambda s: b'X' + struct.pack('<I', len(s)) + s.encode()
  whole = lambda n: b'J' + struct.pack('<i', n)
  group = lambda numbers: b'(' + b''.join(map(whole, numbers)) + b't'
  kinds = {'f4': 'FloatStorage', 'f2': 'HalfStorage', 'f8': 'DoubleStorage', 'i8': 'LongStorage'}
  fields = {
    'n_mels': dims.n_mels, 'n_vocab': dims.vocab_size, 'n_audio_ctx': dims.audio_context,
    'n_audio_state': dims.width, 'n_audio_head': dims.heads, 'n_audio_layer': dims.audio_layers,
    'n_text_ctx': dims.text_context, 'n_text_state': dims.width, 'n_text_head': dims.heads,
    'n_text_layer': dims.text_layers,
  }  # fmt: skip
  out = [b'\x80\2}q\0(', text('dims'), b'}q\1(', *(text(key) + whole(value) for key, value in fields.items()), b'u']
  out += [text('model_state_dict'), b'ccollections\nOrderedDict\nq\2)Rq\3(']
  for key, (name, value) in enumerate(tensors.items()):
    strides = [step // value.itemsize for step in value.strides]
    out += [text(name), b'ctorch._utils\n_rebuild_tensor_v2\nq\4((', text('storage')]
    out += [b'ctorch\n', kinds[value.dtype.str[1:]].encode(), b'\nq\5', text(str(key)), text('cpu'), whole(value.size)]
    out += [b'tQ', whole(0), group(value.shape), group(strides), b'\x89ccollections\nOrderedDict\n)RtR']
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('archive/data.pkl', b''.join([*out, b'uu.']))
    file.writestr('archive/byteorder', b'little')
    for key, value in enumerate(tensors.values()):
      file.writestr(f'archive/data/{key}', value.tobytes())
    file.writestr('archive/version', b'3\n')
  return path
