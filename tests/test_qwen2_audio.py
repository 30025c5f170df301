"""Qwen2-Audio's audio tower as a teacher: folders, what is said about broken ones, and distillation at 25 Hz.

That the tower computes what `transformers` does is in tests/parity/test_qwen2_audio_parity.py.
"""

from __future__ import annotations

import fnmatch
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from _small_tower import TOWER, tower_params, tower_tensors, write_tower
from make_golden_step import TINY, fast, replaced, speech_batches

from lmspt_jax.audio.mel import log_mel_spectrogram
from lmspt_jax.config import ComputeConfig, ModelConfig
from lmspt_jax.convert.safetensors_file import SafetensorsFile
from lmspt_jax.convert.whisper import load_whisper, whisper_dims
from lmspt_jax.errors import LmsptError
from lmspt_jax.models import whisper
from lmspt_jax.models.qwen2_audio import Qwen2AudioEncoder
from lmspt_jax.models.teachers import encoder_of
from lmspt_jax.sharding import Placement, make_mesh
from lmspt_jax.training.flops import count_flops
from lmspt_jax.training.setup import load_teacher
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import FrozenTeacher, make_distillation, stored_params


@pytest.fixture(scope='module')
def audio():
  """Real speech at 16 kHz, [2, 6400]: 40 positions of Whisper, 10 of the tower."""
  return speech_batches(TINY, 1)[0]['audio'][:2]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize('alone, prefix, shards', [
    (False, 'audio_tower.', 1), (False, 'audio_tower.', 3), (False, 'model.audio_tower.', 3),
    (True, '', 1), (True, '', 3), (True, 'audio_tower.', 1)])
def test_folders(tmp_path, alone, prefix, shards):
  folder = write_tower(tmp_path / 'hf', alone=alone, prefix=prefix, shards=shards)
  if shards > 1 and not alone:
    (folder / f'model-{shards:05}-of-{shards:05}.safetensors').unlink()  # the language model's is not needed
  found = load_whisper(f'hf:{folder}')
  assert found.dims == TOWER == whisper_dims(f'hf:{folder}')
  assert found.tokenizer_path is None
  jax.tree.map(np.testing.assert_array_equal, found.params, {'encoder': tower_params()})
  assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype('float32')}
  # A run goes on with the same teacher, however its folder is cut.
  assert found.sha256 == load_whisper(f'hf:{write_tower(tmp_path / "again")}').sha256
  changed = tower_tensors() | {'layers.1.fc2.bias': np.zeros(32, np.float32)}
  assert found.sha256 != load_whisper(f'hf:{write_tower(tmp_path / "other", tensors=changed)}').sha256


def test_the_language_model_is_not_read(tmp_path, monkeypatch):
  folder, read = write_tower(tmp_path / 'hf'), []

  tensor = SafetensorsFile.read
  monkeypatch.setattr(SafetensorsFile, 'read', lambda file, name: read.append(name) or tensor(file, name))
  load_whisper(f'hf:{folder}')
  assert set(read) == {f'audio_tower.{name}' for name in tower_tensors()}


@pytest.mark.parametrize('shards', [1, 3])
def test_of_a_repository_only_the_shards_of_the_tower_are_fetched(tmp_path, monkeypatch, shards):
  hub, cache, asked = write_tower(tmp_path / 'hub', shards=shards), tmp_path / 'cache' / 'c0ffee', []

  def snapshot_download(repository, *, revision, allow_patterns):
    asked.append((repository, revision))
    cache.mkdir(parents=True, exist_ok=True)
    for path in hub.iterdir():
      if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
        shutil.copy(path, cache)
    return str(cache)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  found = load_whisper('hf://Qwen/Qwen2-Audio-7B@main')
  jax.tree.map(np.testing.assert_array_equal, found.params, {'encoder': tower_params()})
  assert asked == [('Qwen/Qwen2-Audio-7B', 'main'), ('Qwen/Qwen2-Audio-7B', 'c0ffee')]  # the second one by commit
  fetched = {path.name for path in cache.glob('*.safetensors')}
  whole = {'model.safetensors'} if shards == 1 else {f'model-{i:05}-of-00003.safetensors' for i in (1, 2)}
  assert fetched == whole


def test_half_precision_and_defaults(tmp_path):
  narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in tower_tensors().items()}
  found = load_whisper(f'hf:{write_tower(tmp_path / "hf", tensors=narrow)}').params['encoder']
  exact = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), tower_params())
  jax.tree.map(np.testing.assert_array_equal, found, exact)  # its positions too are what the file holds
  folder = write_tower(tmp_path / 'large')
  (folder / 'config.json').write_text(json.dumps({'model_type': 'qwen2_audio', 'audio_config': {}}))
  dims = whisper_dims(f'hf:{folder}')
  assert (dims.n_mels, dims.width, dims.heads, dims.audio_layers, dims.audio_context) == (128, 1280, 20, 32, 1500)


def _line(uri: str, *words: str, parts: tuple[str, ...] = ('encoder',)) -> None:
  with pytest.raises(LmsptError) as error:
    load_whisper(uri, parts)
  text = str(error.value)
  assert '\n' not in text and all(word in text for word in words), text


def test_faults(tmp_path):
  missing = {name: value for name, value in tower_tensors().items() if name != 'embed_positions.weight'}
  damaged = tower_tensors() | {'layers.0.fc1.weight': np.full((128, 32), np.nan, np.float32)}
  cases = {
      'string': ({'d_model': '32'}, 'config.json', "width = '32'"),
      'heads': ({'encoder_attention_heads': 5}, 'width 32 with (5,) heads'),
      'fewer': ({'encoder_layers': 1}, 'says 1 encoder layers but holds more'),
      'more': ({'encoder_layers': 3}, "no tensor 'audio_tower.layers.2."),
      'mels': ({'num_mel_bins': 80}, 'audio_tower.conv1.weight gives [3, 128, 32] where the dimensions say'),
      'context': ({'max_source_positions': 10}, 'audio_tower.embed_positions.weight gives [1500, 32]'),
      'huge': ({'max_source_positions': 900_000}, 'encoder dimensions for 28839936 parameters or more'),
      'activation': ({'activation_function': 'relu'}, "activation_function = 'relu'", 'gelu'),
      'missing': ({'tensors': missing}, "no tensor 'audio_tower.embed_positions.weight'"),
      'damaged': ({'tensors': damaged}, 'audio_tower.layers.0.fc1.weight', 'not finite'),
      'nothing': ({'tensors': {}}, "no tensor 'audio_tower.conv1.weight'; did you mean 'multi_modal_projector.")}
  for name, (changes, *words) in cases.items():
    _line(f'hf:{write_tower(tmp_path / name, **changes)}', *words)
  folder = write_tower(tmp_path / 'whole', shards=3)
  _line(f'hf:{folder}', str(folder), 'no decoder', 'use a Whisper', parts=('decoder',))
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  (folder / 'model-00001-of-00003.safetensors').unlink()
  _line(f'hf:{folder}', 'model-00001-of-00003.safetensors: no such file')
  kept = {name: file for name, file in index['weight_map'].items() if not name.startswith('audio_tower.')}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': kept}))
  _line(f'hf:{folder}', "model.safetensors.index.json: no tensor 'audio_tower.conv1.weight'")
  (folder / 'config.json').write_text('{"model_type": "qwen2_audio"}')
  _line(f'hf:{folder}', 'config.json: has no audio_config')


# ---------------------------------------------------------------- the teacher


def teacher(window: str = 'crop', **compute) -> FrozenTeacher:
  return FrozenTeacher(TOWER, 16_000, window, compute=ComputeConfig(**compute))


def test_pairs_are_averaged_before_the_last_norm(audio):
  """What Whisper's encoder gives with these weights, worked on by hand."""
  params = tower_params()
  positions = whisper.sinusoids(1500, 32)
  mel_BTF = log_mel_spectrogram(audio, 128)
  dims = whisper.WhisperDims(n_mels=128, width=32, heads=2, audio_layers=2, text_layers=1, vocab_size=8)
  plain = {name: value for name, value in params.items() if name != 'positions'}
  hidden_BTD = np.asarray(fast(lambda p, x: whisper.bind(whisper.WhisperEncoder, dims, p).hidden(x))(plain, mel_BTF))
  pooled_BPD = (hidden_BTD[:, 0::2] + hidden_BTD[:, 1::2]) / 2
  centred = pooled_BPD - pooled_BPD.mean(-1, keepdims=True)
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  expected = expected * params['norm']['scale'] + params['norm']['bias']
  run = fast(lambda p, x: whisper.bind(Qwen2AudioEncoder, TOWER, p)(x))
  np.testing.assert_allclose(run({**params, 'positions': positions}, mel_BTF), expected, atol=1e-4)
  assert np.abs(run(params, mel_BTF) - expected).max() > 0.01  # the checkpoint's positions are used


def test_windows_and_lengths(audio):
  found = fast(teacher().features)(tower_params(), audio)
  assert found.shape == (2, 10, 32)
  # 29 mel frames and a bit are 15 positions before the pooling: whole ones are made of them, none is dropped.
  ragged = audio[:, :4700]
  padded = np.pad(ragged, ((0, 0), (0, 5120 - 4700)))
  np.testing.assert_allclose(fast(teacher().features)(tower_params(), ragged),
                             fast(teacher().features)(tower_params(), padded), atol=1e-5)
  assert jax.eval_shape(teacher().features, tower_params(), ragged).shape == (2, 8, 32)
  assert jax.eval_shape(teacher('full').features, tower_params(), audio).shape == (2, 750, 32)
  np.testing.assert_array_equal(teacher().valid_positions(np.array([6400, 3201, 3200, 1]), 10).sum(1), [10, 6, 5, 1])
  with pytest.raises(ValueError, match='at most 30 s'):
    jax.eval_shape(teacher().features, tower_params(), np.zeros((1, 480_001), np.float32))


@pytest.mark.parametrize('window', ['crop', 'full'])
def test_loss_counts_real_positions_and_its_gradient_reaches_the_audio_alone(audio, window):
  num_samples, student = np.array([6400, 3000], np.int32), audio * np.float32(0.3)
  distillation = make_distillation(replaced(TINY, teacher__window=window), TOWER)
  run = fast(jax.value_and_grad(distillation.loss, argnums=(0, 3)))
  loss, (to_teacher, to_student) = run(tower_params(), audio, num_samples, student)
  features = fast(teacher(window).features)
  square = np.square(features(tower_params(), student) - features(tower_params(), audio)).mean(-1)
  expected = np.concatenate([square[0, :10], square[1, :5]]).mean()  # position 4 starts at 2560, before the end
  assert float(loss) == pytest.approx(float(expected), rel=1e-3)
  assert float(distillation.weight(num_samples, 6400)) == 15
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_teacher))
  assert np.isfinite(to_student).all() and np.abs(to_student).max(axis=1).min() > 1e-4


def test_recomputed_and_in_bfloat16(audio):
  gradient = lambda it, params: np.asarray(fast(jax.grad(lambda x: jnp.sum(jnp.square(it.features(params, x)))))(audio))
  exact = gradient(teacher(), tower_params())
  recomputed = gradient(teacher(remat_teacher='block'), tower_params())
  np.testing.assert_allclose(recomputed, exact, atol=1e-5 * np.abs(exact).max())
  narrow = stored_params(tower_params(), ComputeConfig(dtype='bfloat16'))
  assert narrow['positions'].dtype == np.float32 and narrow['blocks']['mlp']['up']['kernel'].dtype == jnp.bfloat16
  features = fast(teacher(dtype='bfloat16').features)(narrow, audio)
  expected = fast(teacher().features)(tower_params(), audio)
  assert features.dtype == jnp.float32
  assert 1e-5 < float(jnp.abs(features - expected).max() / jnp.abs(expected).max()) < 0.05


@pytest.mark.parametrize('frame_rate, hop', [(12.5, 1920), (25, 960), (50, 480)])
def test_pooled_features_are_those_of_each_frames_time(audio, frame_rate, hop):
  """0.4 s: 10 features; of a 12.5 Hz frame two are averaged, two 50 Hz frames have one."""
  config = replaced(TINY, model=ModelConfig(sample_rate=24_000, encoder_strides=(hop,), latent_dim=8),
                    teacher__strategy='pooled')
  distillation = make_distillation(config, TOWER)
  assert config.model.frame_rate == frame_rate and distillation.init(jax.random.key(0))['kernel'].shape == (8, 32)
  audio = np.repeat(audio, 3, axis=1)[:, ::2]  # any signal at 24 kHz
  targets_BPD = np.asarray(fast(distillation.teacher.targets)(tower_params(), audio))
  expected_BTD = {12.5: targets_BPD.reshape(2, 5, 2, 32).mean(2), 25: targets_BPD,
                  50: np.repeat(targets_BPD, 2, axis=1)}[frame_rate]
  num_samples = np.array([9600, 9600], np.int32)
  loss = fast(distillation.loss)
  assert float(loss(tower_params(), audio, num_samples, expected_BTD)) < 1e-8
  late = np.roll(expected_BTD, 1, axis=1)
  assert float(loss(tower_params(), audio, num_samples, late)) == pytest.approx(
      float(np.square(late - expected_BTD).mean()), rel=1e-3)


def test_a_training_step_with_a_folder_as_teacher(tmp_path):
  """Traced: compiling it takes longer than all the rest here, and its loss has been computed above."""
  config = replaced(TINY, teacher__checkpoint=f'hf:{write_tower(tmp_path / "hf")}', mesh__data=1)
  loaded = load_teacher(config, Placement(config, make_mesh(config, jax.devices()[:1])))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tower_params())
  assert loaded.dims == TOWER and len(loaded.sha256) == 64
  experiment = Experiment(config, loaded.dims)
  batch = speech_batches(config, 1)[0]
  traced = jax.jit(make_train_step(experiment)).trace(experiment.abstract_state(), loaded.params, batch)
  state, found = traced.out_info
  assert jax.tree.structure(state) == jax.tree.structure(experiment.abstract_state())
  assert 'loss/distillation' in found
  assert count_flops(traced.jaxpr).parts['teacher'] > 0


def test_it_costs_what_an_encoder_of_whisper_of_its_size_does(audio):
  sizes = {name: getattr(TOWER, name) for name in ('n_mels', 'width', 'heads', 'audio_layers')}
  plain = whisper.WhisperDims(**sizes, text_layers=1, vocab_size=8)

  def flops(dims):
    params = whisper.abstract_params(encoder_of(dims), dims)
    loss = make_distillation(TINY, dims).loss
    return count_flops(jax.jit(jax.grad(loss, argnums=3)).trace(params, audio, np.array([6400, 6400]), audio).jaxpr)

  assert flops(TOWER) == flops(plain) and flops(TOWER).model_flops > 1e7
