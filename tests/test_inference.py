"""`Tokenizer` in Python: lengths, rates, channels, paths, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from lmspt_jax import Codes, LmsptError, Tokenizer
from lmspt_jax.checkpoint import restore_for_inference
from lmspt_jax.inference.checks import check_codes
from lmspt_jax.inference.codes import read_codes, write_codes
from lmspt_jax.pretrained.model import model_hash


@pytest.fixture(scope='module')
def speech(speech_folder):
  """Real speech, 16 kHz float32."""
  audio, rate = soundfile.read(speech_folder / 'audio' / 'asterisk-conf-invalid.flac', dtype='float32')
  assert rate == 16_000
  return audio[8000:24000]


def test_properties(tiny_tokenizer):
  t = tiny_tokenizer
  assert (t.sample_rate, t.resynthesis_sample_rate, t.frame_rate, t.hop) == (24_000, 16_000, 50.0, 480)
  assert (t.num_codebooks, t.codebook_sizes) == (4, (32, 16, 16, 16))
  assert len(t.model_hash) == 16 and t.config.name == 'tiny' and (t.model.step, t.model.teacher_id) == (3, 'teacher-id')


# One more or one less than whole frames of 480 samples at 24 kHz, and the shortest recording there is.
@pytest.mark.parametrize('num_samples, frames', [(1, 1), (4799, 10), (4800, 10), (4801, 11)])
def test_no_tail_is_lost(tiny_tokenizer, speech, num_samples, frames):
  codes = tiny_tokenizer.encode(speech[:num_samples], sample_rate=24_000)
  assert codes.ids.shape == (4, frames) and codes.ids.dtype == np.int32
  assert codes.num_samples == num_samples
  audio = tiny_tokenizer.decode(codes)
  assert audio.shape == (num_samples,) and audio.dtype == np.float32
  assert tiny_tokenizer.decode(codes, path='resynthesis').shape == (round(num_samples * 2 / 3),)


def test_codes_are_the_models_own(tiny_tokenizer, tiny_run, speech):
  """Padding stops at the last whole frame: the codes are those of the module on exactly that input."""
  model = restore_for_inference(tiny_run).tokenizer
  padded = jnp.asarray(np.pad(speech[:4700], (0, 100)))[None]
  codes = tiny_tokenizer.encode(speech[:4700], sample_rate=24_000)
  # Compiled both times: rounding differs between a compiled model and one run operation by operation.
  np.testing.assert_array_equal(codes.ids, jax.jit(lambda x: model.encode(x))(padded)[0])
  for path, method in (('full', model.decode), ('semantic', model.decode_semantic),
                       ('resynthesis', model.resynthesize)):
    audio = tiny_tokenizer.decode(codes, path=path)
    want = jax.jit(lambda ids, method=method: method(ids))(jnp.asarray(codes.ids)[None])[0]
    np.testing.assert_allclose(audio, want[:len(audio)], atol=1e-6)
    assert np.abs(audio).max() > 1e-4  # not silence, so that the three differ
  assert not np.allclose(tiny_tokenizer.decode(codes), tiny_tokenizer.decode(codes, path='semantic'), atol=1e-4)


@pytest.mark.parametrize('rate', [8_000, 16_000, 44_100, 48_000])
def test_any_rate_in(tiny_tokenizer, speech, rate):
  codes = tiny_tokenizer.encode(speech[:rate // 5], sample_rate=rate)
  assert codes.num_samples == 4800 and codes.ids.shape[1] == 10
  assert (codes.sample_rate, codes.frame_rate) == (24_000, 50.0)


def test_channels_are_averaged(tiny_tokenizer, speech):
  x = speech[:4800]
  mono = tiny_tokenizer.encode(x, sample_rate=24_000)
  stereo = tiny_tokenizer.encode(np.stack([2 * x, np.zeros_like(x)]), sample_rate=24_000)
  left = tiny_tokenizer.encode(2 * x, sample_rate=24_000)
  np.testing.assert_array_equal(mono.ids, stereo.ids)
  assert not np.array_equal(mono.ids, left.ids)


def test_a_list_gives_a_list(tiny_tokenizer, speech):
  items = [speech[:4800], speech[4800:9500]]
  codes = tiny_tokenizer.encode(items, sample_rate=24_000)
  for item, one in zip(items, codes, strict=True):
    np.testing.assert_array_equal(one.ids, tiny_tokenizer.encode(item, sample_rate=24_000).ids)
  assert [len(a) for a in tiny_tokenizer.decode(codes)] == [4800, 4700]
  assert tiny_tokenizer.encode([], sample_rate=24_000) == []


def test_fewer_codebooks_decode(tiny_tokenizer, speech):
  codes = tiny_tokenizer.encode(speech[:4800], sample_rate=24_000)
  first = dataclasses.replace(codes, ids=codes.ids[:1])
  np.testing.assert_allclose(tiny_tokenizer.decode(first), tiny_tokenizer.decode(codes, path='semantic'), atol=1e-6)


@pytest.mark.parametrize('audio, rate, word', [
    (np.zeros(0, np.float32), 16_000, 'no samples'),
    (np.array([0, np.nan], np.float32), 16_000, 'NaN or infinite'),
    (np.array([0, 1e300]), 16_000, 'NaN or infinite'),
    (np.zeros(9, np.int16), 16_000, 'int16'),
    (np.zeros((480, 2), np.float32), 16_000, 'transpose'),
    (np.zeros((1, 1, 9), np.float32), 16_000, '(1, 1, 9)'),
    (np.zeros(9, np.float32), 0, 'sample rate 0'),
    (np.zeros(9, np.float32), 16_000.5, '16000.5'),
])
def test_refuses_audio(tiny_tokenizer, audio, rate, word):
  with pytest.raises(LmsptError) as error:
    tiny_tokenizer.encode(audio, sample_rate=rate)
  assert word in str(error.value)


@pytest.mark.parametrize('changes, word', [
    ({'ids': np.full((4, 10), 16)}, 'codebook 1 from 16 to 16'),
    ({'ids': np.full((4, 10), -1)}, 'codebook 0 from -1'),
    ({'ids': np.zeros((5, 10), int)}, '4 codebooks'),
    ({'ids': np.zeros((4, 0), int)}, 'at least 1 frame'),
    ({'num_samples': 4801}, '4321 to 4800'),
    ({'num_samples': 4320}, '4321 to 4800'),
    ({'sample_rate': 16_000}, '16000 Hz'),
    ({'model_hash': 'f' * 16}, 'f' * 16),
])
def test_refuses_codes(tiny_tokenizer, changes, word):
  codes = Codes(np.zeros((4, 10), int), 4800, 24_000, 50.0)
  check_codes(codes, tiny_tokenizer.config.model, tiny_tokenizer.model_hash)
  with pytest.raises(LmsptError) as error:
    tiny_tokenizer.decode(dataclasses.replace(codes, **changes))
  assert word in str(error.value)


def test_refuses_a_path(tiny_tokenizer):
  with pytest.raises(LmsptError, match="path 'aux': use one of full, semantic, resynthesis"):
    tiny_tokenizer.decode(Codes(np.zeros((4, 10), int), 4800, 24_000, 50.0), path='aux')


def test_drop_tail_quirk(tiny_tokenizer, speech):
  config = dataclasses.replace(tiny_tokenizer.config,
                               quirks=dataclasses.replace(tiny_tokenizer.config.quirks, drop_tail=True))
  release = Tokenizer(dataclasses.replace(tiny_tokenizer.model, config=config))
  codes = release.encode(speech[:5279], sample_rate=24_000)
  assert (codes.ids.shape[1], codes.num_samples, len(release.decode(codes))) == (10, 4800, 4800)
  with pytest.raises(LmsptError, match='shorter than one frame'):
    release.encode(speech[:479], sample_rate=24_000)


def test_model_hash(tiny_tokenizer):
  t = tiny_tokenizer
  model = t.config.model
  assert model_hash(model, t.params, t.codebooks) == t.model_hash
  assert model_hash(dataclasses.replace(model, latent_dim=8), t.params, t.codebooks) != t.model_hash
  leaves, treedef = jax.tree.flatten(t.params)
  leaves[-1] = np.asarray(leaves[-1]) + np.float32(1e-3)
  assert model_hash(model, jax.tree.unflatten(treedef, leaves), t.codebooks) != t.model_hash
  counted = jax.tree_util.tree_map_with_path(
      lambda path, x: np.asarray(x) + 1 if path[-1].key == 'counts' else x, t.codebooks)
  assert not np.array_equal(jax.tree.leaves(counted)[0], jax.tree.leaves(t.codebooks)[0])
  assert model_hash(model, t.params, counted) == t.model_hash


def test_codes_file_holds_large_codebooks(tmp_path):
  ids = np.array([[0, 70_000]])
  write_codes(tmp_path / 'a.npz', Codes(ids, 960, 24_000, 50.0, 'x'), 70_001)
  with np.load(tmp_path / 'a.npz') as archive:
    assert archive['ids'].dtype == np.int32
  codes = read_codes(tmp_path / 'a.npz')
  np.testing.assert_array_equal(codes.ids, ids)
  assert (codes.num_samples, codes.sample_rate, codes.frame_rate, codes.model_hash) == (960, 24_000, 50.0, 'x')
  with pytest.raises(LmsptError, match="can't be written"):
    write_codes(tmp_path / 'absent' / 'a.npz', codes, 16)
