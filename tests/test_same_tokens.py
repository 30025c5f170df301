"""The same audio gives the same tokens (docs/same_tokens.md), on real speech."""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from _random_weights import random_weights
from _tiny_run import write_run
from flax import nnx

from lmspt_jax import Tokenizer
from lmspt_jax.cli import main as cli
from lmspt_jax.config import ModelConfig, QuantizerConfig
from lmspt_jax.data.audio_io import mono_blocks, read_audio, to_mono_at
from lmspt_jax.inference import windows
from lmspt_jax.inference.codes import read_codes
from lmspt_jax.inference.windows import WindowedProgram, cut, filled_rows
from lmspt_jax.models.folding import folded_tokenizer
from lmspt_jax.models.inside import Inside
from lmspt_jax.models.reach import (
  Reach,
  decoder_gap,
  decoder_reach,
  encoder_gap,
  encoder_reach,
  encoder_samples,
  resynthesis_gap,
  resynthesis_reach,
)
from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer

# Few layers, for compilation's sake, but an odd rate, and sums long enough for XLA:CPU to share among threads.
MODEL = ModelConfig(
    encoder_channels=16, encoder_strides=(15, 32), latent_dim=256, decoder_channels=64, decoder_rates=(32, 15),
    resynthesis_channels=16, resynthesis_rates=(20, 16), dilations=(1,),
    semantic=QuantizerConfig(codebook_size=256), acoustic=QuantizerConfig(num_codebooks=2, codebook_size=64))
CAUSAL = dataclasses.replace(MODEL, causal=True)
RATE, HOP = MODEL.sample_rate, MODEL.hop
LARGEST = 64  # frames of the largest windows here, so that little speech fills many
# Of the recordings: in the smallest window, in the largest, in several, and around where another one begins.
FRAMES = (1, 5, 16, 17, 40, 64, 65, 90, 121, 122, 123, 180, 181, 33, 300, 12)


@pytest.fixture(scope='module', autouse=True)
def _small_windows():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(windows, 'LEAST_LARGEST', LARGEST)
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('run'), model=MODEL)


@pytest.fixture(scope='module')
def tokenizer(run):
  return Tokenizer.from_pretrained(run)


@pytest.fixture(scope='module')
def rows_of_two(tokenizer):
  """The same model in programs of several rows, as on an accelerator."""
  other = Tokenizer(tokenizer.model)
  for name in ('encode', 'decode'):
    assert other._program(name)._rows == 1
    other._program(name)._rows = 2
  return other


@pytest.fixture(scope='module')
def recordings(speech_folder):
  """Real speech of FRAMES whole frames each, the last samples of some missing; taken as 24 kHz, not resampled."""
  audio = np.concatenate([soundfile.read(path, dtype='float32')[0]
                          for path in sorted((speech_folder / 'audio').glob('*.flac'))[:20]])
  ends = np.cumsum(FRAMES) * HOP
  return [part[:len(part) - 7 * (n % 3)] for n, part in enumerate(np.split(audio, ends)[:-1])]


@pytest.fixture(scope='module')
def alone(tokenizer, recordings):
  """Codes and speech of each recording by itself."""
  codes = [tokenizer.encode(audio, sample_rate=RATE) for audio in recordings]
  return codes, [tokenizer.decode(one) for one in codes]


def digest(codes, audio) -> list[str]:
  """Of ids and samples, bit for bit."""
  return [hashlib.sha256(one.ids.tobytes() + wave.tobytes()).hexdigest()
          for one, wave in zip(codes, audio, strict=True)]


@pytest.mark.parametrize('batch', [1, 3, 16])
def test_any_batch_in_any_order(tokenizer, recordings, alone, batch):
  wanted = digest(*alone)
  order = np.random.default_rng(batch).permutation(len(recordings))
  for chosen in np.split(order, range(batch, len(order), batch)):
    codes = tokenizer.encode([recordings[i] for i in chosen], sample_rate=RATE)
    assert digest(codes, tokenizer.decode(codes)) == [wanted[i] for i in chosen]
  assert len(np.unique(np.concatenate([one.ids[0] for one in alone[0]]))) > 20, 'hardly any codes: this shows nothing'


def test_any_row_of_a_program(rows_of_two, recordings, alone):
  """Several windows in a call. Another program than that of one row, so speech may differ from that by rounding."""
  wanted = None
  for seed in range(3):
    order = np.random.default_rng(seed).permutation(len(recordings))
    codes = rows_of_two.encode([recordings[i] for i in order], sample_rate=RATE)
    found = digest(codes, rows_of_two.decode(codes))
    found = [found[i] for i in np.argsort(order)]
    wanted = wanted or found
    assert found == wanted
  for i, one in zip(order, codes, strict=True):
    np.testing.assert_array_equal(one.ids, alone[0][i].ids)


def test_any_windows(tokenizer, recordings, alone, monkeypatch):
  """Windows as they are by default, so that all is in other places; and many recordings in one row of a program."""
  monkeypatch.undo()
  other = Tokenizer(tokenizer.model)
  monkeypatch.setattr(windows, 'LEAST_LARGEST', 4 * LARGEST)
  assert other._program('encode').sizes[-1] == other._program('decode').sizes[-1] == 4 * LARGEST
  packed = []
  rows_of = windows.filled_rows
  monkeypatch.setattr(windows, 'filled_rows', lambda *given: (
      packed.append(len(row[1])) or row for row in rows_of(*given)))
  codes = other.encode(recordings, sample_rate=RATE)
  assert max(packed) >= 4
  assert digest(codes, other.decode(codes)) == digest(*alone)


def test_codes_are_those_of_the_whole(tokenizer, recordings, alone):
  """The module on each whole recording, compiled for its length."""
  model = merge_tokenizer(MODEL, tokenizer.params, tokenizer.codebooks)
  encode, decode = jax.jit(lambda x: model.encode(x)), jax.jit(lambda ids: model.decode(ids))
  for number in (3, 14):
    codes, audio = alone[0][number], alone[1][number]
    padded = np.pad(recordings[number], (0, -len(recordings[number]) % HOP))
    np.testing.assert_array_equal(codes.ids, encode(padded[None])[0])
    np.testing.assert_allclose(audio, np.asarray(decode(jnp.asarray(codes.ids)[None])[0])[:len(audio)], atol=1e-5)
    assert np.abs(audio).max() > 1e-2


@pytest.mark.parametrize('causal', [False, True])
def test_an_end_in_a_window_is_an_end(causal, recordings):
  """Latents and speech of a masked window against those of an array that ends there; and what follows is not read."""
  config = CAUSAL if causal else MODEL
  params, codebooks = random_weights(abstract_tokenizer(config)[1:])
  model = merge_tokenizer(config, params, codebooks)
  stirred = jax.tree.map(lambda x: x + 0.1, nnx.state(model, nnx.PathContains('bias')))  # what follows an end is not 0
  nnx.update(model, stirred)
  inside = lambda n: Inside((np.arange(20) < n).astype(np.int32)[None], gap=1)
  encode = jax.jit(lambda x, n=None: model.semantic_encoder(x, n and dataclasses.replace(n, steps=HOP)))
  audio = recordings[14][None, :20 * HOP]
  beyond = audio.copy()
  beyond[:, 11 * HOP:] = 9.0
  whole, n = encode(audio[:, :11 * HOP]), inside(11)
  np.testing.assert_allclose(encode(beyond, n)[:, :11], whole, atol=1e-5)
  z = np.random.default_rng(0).normal(size=(1, 20, config.latent_dim)).astype(np.float32)
  for decoder, wanted in ((model.decoder, lambda z, n: model._main(z, n)),
                          (model.resynthesis_decoder, lambda z, n: model._auxiliary(z, n))):
    run = jax.jit(wanted)
    short = np.asarray(run(z[:, :11], None))
    long = np.asarray(run(z, n))
    np.testing.assert_allclose(long[:, :short.shape[1]], short, atol=1e-5)
    assert not long[:, short.shape[1]:].any() and np.abs(short).max() > 0.01, type(decoder)


# Some layers see farther than a gap and are evaluated tap by tap: those of 128 channels and two steps a frame.
FAR = dataclasses.replace(MODEL, encoder_channels=32, encoder_strides=(30, 8, 2), decoder_channels=256,
                          decoder_rates=(2, 15, 16), resynthesis_channels=32, resynthesis_rates=(8, 5, 8),
                          dilations=(1, 9))


@pytest.mark.parametrize('causal', [False, True])
def test_neighbours_in_a_row(causal):
  """Recordings with no more than gaps between them, and what was in the gaps not 0: bit for bit as alone, and as an
  exported graph has them."""
  config = dataclasses.replace(FAR, causal=causal)
  graphdef, params, codebooks = folded_tokenizer(config, *random_weights(abstract_tokenizer(config)[1:]))
  params = jax.tree.map(lambda x: x + 0.05 if x.ndim == 1 else x, params)  # biases
  model = nnx.merge(graphdef, params, codebooks)
  lengths, size = (9, 1, 14, 5), 64
  generator = np.random.default_rng(0)
  for gap, width, function in (
      (encoder_gap(config), config.hop, lambda x, inside: model.semantic_encoder(
          x.reshape(1, -1), inside and dataclasses.replace(inside, steps=config.hop))),
      (decoder_gap(config), config.latent_dim, lambda x, inside: model._main(x, inside).reshape(*x.shape[:2], -1)),
      (resynthesis_gap(config), config.latent_dim,
       lambda x, inside: model._auxiliary(x, inside).reshape(*x.shape[:2], -1))):
    assert 1 <= gap < 10 and gap * 2 < 9 * (6 if causal else 3), 'some layer sees farther'
    function = jax.jit(function)
    items = [generator.normal(size=(length, width)).astype(np.float32) for length in lengths]
    together_TW, numbers_T = np.full((1, size, width), 9, np.float32), np.zeros((1, size), np.int32)
    places, first = [], 0
    for number, item in enumerate(items, 1):
      places.append(slice(first, first + len(item)))
      together_TW[0, places[-1]], numbers_T[0, places[-1]] = item, number
      first += len(item) + gap
    found = np.asarray(function(together_TW, Inside(numbers_T, gap)))[0]
    for item, place in zip(items, places, strict=True):
      alone_TW, number_T = np.zeros((1, size, width), np.float32), np.zeros((1, size), np.int32)
      alone_TW[0, :len(item)], number_T[0, :len(item)] = item, 1
      wanted = np.asarray(function(alone_TW, Inside(number_T, gap)))[0, :len(item)]
      assert np.std(wanted) > 1e-3
      np.testing.assert_array_equal(found[place], wanted)
    np.testing.assert_array_equal(found[places[2]], function(items[2][None], None)[0])  # in an array of its own

@pytest.mark.parametrize('config', [MODEL, CAUSAL], ids=['non-causal', 'causal'])
def test_reach_is_tight(config):
  """Of the gradient of one frame's output, by input."""
  config = dataclasses.replace(config, dilations=(1, 3))
  params, codebooks = random_weights(abstract_tokenizer(config)[1:])
  model = merge_tokenizer(config, params, codebooks)
  frames, at = 40, 20
  rng = np.random.default_rng(0)
  audio = rng.normal(size=(1, frames * config.hop)).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(model.semantic_encoder(x)[0, at] ** 2)))(audio)[0]
  seen = np.flatnonzero(gradient) - at * config.hop
  assert (seen[0], seen[-1]) == encoder_samples(config)
  assert encoder_reach(config) == (-(seen[0] // config.hop), seen[-1] // config.hop)
  z = rng.normal(size=(1, frames, config.latent_dim)).astype(np.float32)
  for decode, reach in ((model._main, decoder_reach(config)), (model._auxiliary, resynthesis_reach(config))):
    hop = decode(z).shape[1] // frames
    heard = lambda z, decode=decode, hop=hop: jnp.sum(decode(z)[0, at * hop:(at + 1) * hop] ** 2)
    seen = np.flatnonzero(np.abs(jax.jit(jax.grad(heard))(z)[0]).sum(axis=-1)) - at
    assert Reach(-seen[0], seen[-1]) == reach


@pytest.mark.parametrize('frames', [1, 16, 17, 64, 65, 122, 123, 500])
def test_windows_cover_and_see_enough(frames):
  """Whatever blocks frames come in, the windows are the same, their cores follow on one another, and the context of
  each core's frames is in its window."""
  reach, sizes = Reach(3, 2), (16, 32, 64)
  item = np.arange(frames)[:, None]
  found = list(cut(5, [item], sizes[-1], reach))
  for lengths in ([1] * frames, [frames - 1, 1], [7] * (frames // 7 + 1)):
    blocks = np.split(item, np.cumsum(lengths))
    for one, other in zip(found, cut(5, blocks, sizes[-1], reach), strict=True):
      np.testing.assert_array_equal(one.frames_TW, other.frames_TW)
      assert (one.position, one.core) == (other.position, other.core)
  done = 0
  for window in found:
    here = item[window.position:window.position + len(window.frames_TW)]
    np.testing.assert_array_equal(window.frames_TW, here)
    first, last = (window.position + at for at in window.core)
    assert window.item == 5 and first == done and len(window) <= sizes[-1]
    assert window.position in (0, *range(first - reach.left + 1)), 'a core sees to its left'
    end = window.position + len(here)
    assert end == frames or end >= last + reach.right, 'and to its right'
    done = last
  assert done == frames


def test_files_are_arrays(tokenizer, run, recordings, tmp_path):
  """`lmspt encode` and `decode`, which go block by block, against arrays; a file of another rate and nine channels."""
  audio = np.stack([np.roll(recordings[14], 50 * n) for n in range(9)], axis=1)
  soundfile.write(tmp_path / 'nine.wav', audio, 44_100, subtype='FLOAT')
  soundfile.write(tmp_path / 'one.flac', recordings[14], RATE)
  for name in ('nine.wav', 'one.flac'):
    assert cli.main(['encode', f'--model={run}', f'--out={tmp_path}', str(tmp_path / name)]) == 0
    found = read_codes((tmp_path / name).with_suffix('.npz'))
    samples, rate = read_audio(tmp_path / name, name=name)
    wanted = tokenizer.encode(np.ascontiguousarray(samples.T), sample_rate=rate)
    assert found.num_samples == wanted.num_samples and found.ids.shape[1] > LARGEST
    np.testing.assert_array_equal(found.ids, wanted.ids)
    out = tmp_path / 'out'
    assert cli.main(['decode', f'--model={run}', f'--out={out}', str(tmp_path / name.split('.')[0]) + '.npz']) == 0
    decoded = tokenizer.decode(wanted)
    pcm = soundfile.read((out / name).with_suffix('.wav'), dtype='int16')[0]
    np.testing.assert_array_equal(pcm, np.rint(decoded * 32768).astype(np.int16))


@pytest.mark.parametrize('from_rate, to_rate', [(44_100, 24_000), (16_000, 24_000), (48_000, 16_000), (24_000, 24_000)])
def test_resampled_in_blocks(recordings, from_rate, to_rate):
  """Bit for bit the whole, down to a block of one sample."""
  stereo = np.stack([recordings[14], recordings[14][::-1]], axis=1)
  for audio in (stereo, stereo[:1], recordings[14]):
    whole = to_mono_at(audio, from_rate, to_rate)
    blocks = np.split(audio, [1, 8, 1000, 1001, 30_000])
    np.testing.assert_array_equal(np.concatenate(list(mono_blocks(blocks, from_rate, to_rate))), whole)


def test_blocks_of_any_lengths(tokenizer, recordings, alone):
  number = 14
  for count in (1, 2, 100):
    blocks = np.array_split(recordings[number], count)
    codes = tokenizer.encode_blocks(iter(blocks), sample_rate=RATE)
    np.testing.assert_array_equal(codes.ids, alone[0][number].ids)
  pieces = list(tokenizer.decode_blocks(codes))
  assert len(pieces) > 2
  np.testing.assert_array_equal(np.concatenate(pieces), alone[1][number])


def test_folding_keeps_the_model(tokenizer, recordings):
  config = MODEL
  graphdef, params, codebooks = folded_tokenizer(config, tokenizer.params, tokenizer.codebooks)
  plain = merge_tokenizer(config, tokenizer.params, tokenizer.codebooks)
  audio = recordings[4][None, :16 * HOP]
  latent = jax.jit(lambda p, x: nnx.merge(graphdef, p, codebooks).semantic_encoder(x))(params, audio)
  wanted = jax.jit(plain.semantic_encoder.__call__)(audio)
  np.testing.assert_allclose(latent, wanted, atol=1e-5 * np.abs(wanted).max())


def test_rows_are_filled_and_flushed():
  """Several windows in a row and rows in a call: nothing is lost or mixed, and an item's frames come in order."""
  calls = []

  def double(weights, frames_BTW, inside):
    calls.append(frames_BTW.shape)
    return jnp.where(inside.items_BT[..., None] > 0, 2 * frames_BTW, jnp.nan)

  program = WindowedProgram(double, lambda device: (), Reach(2, 2), 3, rows=2, streams=2,
                            devices=jax.local_devices()[:1])
  items = [np.arange(n, dtype=np.float32)[:, None] + 1000 * n for n in (3, 200, 64, 30, 5)]
  found = [np.zeros_like(item) for item in items]
  for number, start, frames in program([item] for item in items):
    assert not found[number][start:start + len(frames)].any()
    found[number][start:start + len(frames)] = frames
  for item, twice in zip(items, found, strict=True):
    np.testing.assert_array_equal(twice, 2 * item)
  assert set(calls) == {(8, 16, 1), (2, 64, 1)}  # 3, 30 and 20 frames in one row of 64; 5 in one of 16
  starts = [start for _, start, _ in program([[items[1]]])]
  assert starts == sorted(starts) and len(starts) == 4


@pytest.mark.parametrize('seed', range(3))
def test_rows_waste_little(seed):
  """Lengths as recordings have them: gaps and what is left over are a tenth of the frames at most."""
  generator, sizes = np.random.default_rng(seed), (16, 32, 64, 128, 256)
  lengths = np.clip(generator.lognormal(4, 0.6, 2000).astype(int), 1, 256)
  windows_ = (windows.Window(n, np.zeros((length, 1)), 0, (0, length)) for n, length in enumerate(lengths))
  done, evaluated = [], 0
  for size, row in filled_rows(windows_, sizes, 4):
    assert sum(map(len, row)) + 4 * (len(row) - 1) <= size
    done += [window.item for window in row]
    evaluated += size
  assert sorted(done) == list(range(2000)) and evaluated < 1.12 * lengths.sum()


def test_few_windows_are_not_put_together_at_a_loss():
  sizes = (16, 32, 64, 128, 256)
  made = lambda *lengths: [(size, [len(window) for window in row]) for size, row in filled_rows(
      (windows.Window(n, np.zeros((length, 1)), 0, (0, length)) for n, length in enumerate(lengths)), sizes, 2)]
  assert made(60, 60, 60) == [(64, [60]), (64, [60]), (64, [60])]  # together they would take 256
  assert made(60, 30, 30, 1) == [(128, [60, 30, 30, 1])]
  assert made(44, 256) == [(256, [256]), (64, [44])]
