"""A causal model hears a recording in pieces; its codes and speech are those of the whole (docs/streaming.md)."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from _random_weights import stirred_weights
from _tiny_run import CONFIG, write_run

from lmspt_jax import LmsptError, Tokenizer
from lmspt_jax.cli import main as cli
from lmspt_jax.config import ModelConfig, QuantizerConfig, QuirksConfig
from lmspt_jax.data.audio_io import to_mono_at
from lmspt_jax.models.tokenizer import abstract_tokenizer

# An odd stride and rate; sums of every form of models/steady.py: short, long, of few outputs, in few rows.
MODEL = ModelConfig(
    causal=True, encoder_channels=64, encoder_strides=(15, 32), latent_dim=256, decoder_channels=128,
    decoder_rates=(32, 15), resynthesis_channels=32, resynthesis_rates=(20, 16), dilations=(1, 3),
    semantic=QuantizerConfig(codebook_size=256), acoustic=QuantizerConfig(num_codebooks=2, codebook_size=64))
RATE, HOP = MODEL.sample_rate, MODEL.hop
TEN_SECONDS = 10 * RATE


def make(folder, **changed) -> Tokenizer:
  """A tokenizer with stirred weights: no bias is 0, and the codes of speech spread."""
  tokenizer = Tokenizer.from_pretrained(write_run(folder, **changed))
  weights = stirred_weights(abstract_tokenizer(tokenizer.config.model)[1:])
  return Tokenizer(dataclasses.replace(tokenizer.model, params=weights[0], codebooks=weights[1]))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return make(tmp_path_factory.mktemp('run'), model=MODEL)


@pytest.fixture(scope='module')
def speech(speech_folder):
  """Twelve seconds of real speech, not whole frames; taken as 24 kHz, not resampled."""
  audio = np.concatenate([soundfile.read(path, dtype='float32')[0]
                          for path in sorted((speech_folder / 'audio').glob('*.flac'))[:5]])
  return audio[:12 * RATE + 7]


@pytest.fixture(scope='module')
def whole(tokenizer, speech):
  """Codes and speech of the whole: in windows of the largest size, so in programs of other shapes than a frame's."""
  codes = tokenizer.encode(speech, sample_rate=RATE)
  assert min(len(np.unique(ids_T)) for ids_T in codes.ids) > 20, 'hardly any codes: this shows nothing'
  return codes, tokenizer.decode(codes)


def encoded(tokenizer, audio, lengths):
  """All codes of `audio` in pieces of these lengths, the last of them for what is left."""
  parts, state = [], tokenizer.start()
  for piece in np.split(audio, np.cumsum(lengths)):
    codes, state = tokenizer.push(piece, state)
    parts.append(codes)
  parts.append(tokenizer.finish(state))
  return joined(parts)


def joined(parts):
  return dataclasses.replace(parts[0], ids=np.concatenate([part.ids for part in parts], axis=1),
                             num_samples=sum(part.num_samples for part in parts))


def decoded(tokenizer, codes, lengths, path='full'):
  """All speech of `codes` in pieces of these numbers of frames."""
  parts, state, done = [], tokenizer.start_decoding(path), 0
  for ids_KT in np.split(codes.ids, np.cumsum(lengths), axis=1):
    samples = min(ids_KT.shape[1] * HOP, codes.num_samples - done)
    part, state = tokenizer.push_codes(dataclasses.replace(codes, ids=ids_KT, num_samples=samples), state)
    parts.append(part)
    done += samples
  return np.concatenate(parts)


def assert_same(found, wanted):
  """Two `Codes`."""
  np.testing.assert_array_equal(found.ids, wanted.ids)
  assert dataclasses.replace(found, ids=None) == dataclasses.replace(wanted, ids=None)


@pytest.mark.parametrize('length', [1, 7, HOP - 1, HOP, HOP + 1, TEN_SECONDS, None])
def test_pieces_of_any_length(tokenizer, speech, whole, length):
  wanted = whole[0]
  if length in (1, 7):  # fewer pieces
    speech = speech[:2 * length * HOP + 5]
    wanted = tokenizer.encode(speech, sample_rate=RATE)
  if length is None:
    lengths = np.random.default_rng(0).choice([0, 1, 7, 100, HOP, 2 * HOP + 3, 9000], 80)
  else:
    lengths = [length] * (len(speech) // length)
  assert_same(encoded(tokenizer, speech, lengths), wanted)


@pytest.mark.parametrize('path', ['full', 'semantic', 'resynthesis'])
def test_speech_in_pieces(tokenizer, whole, path):
  wanted = tokenizer.decode(whole[0], path=path)
  for lengths in ([1] * 9, [0, 3, 0, 200, 17]):
    np.testing.assert_array_equal(decoded(tokenizer, whole[0], lengths, path), wanted)
  assert np.abs(wanted).max() > 0.01


def test_a_code_comes_with_the_last_sample_of_its_frame(tokenizer, speech):
  codes, state = tokenizer.push(speech[:3 * HOP - 1], tokenizer.start())
  assert codes.ids.shape == (3, 2) and codes.num_samples == 2 * HOP
  codes, state = tokenizer.push(speech[3 * HOP - 1:3 * HOP], state)
  assert codes.ids.shape == (3, 1)
  audio, _ = tokenizer.push_codes(codes, tokenizer.start_decoding())
  assert audio.shape == (HOP,) and audio.dtype == np.float32


def test_a_state_stays_as_it_is(tokenizer, speech):
  _, state = tokenizer.push(speech[:3 * HOP + 100], tokenizer.start())
  kept = copy.deepcopy(state)
  rest = speech[3 * HOP + 100:6 * HOP]
  first, _ = tokenizer.push(rest, state)
  tokenizer.push(-rest, state)
  tokenizer.finish(state)
  for other in (state, kept, copy.copy(state)):
    assert_same(tokenizer.push(rest, other)[0], first)
  _, decoding = tokenizer.push_codes(first, tokenizer.start_decoding())
  audio, _ = tokenizer.push_codes(first, decoding)
  for other in (decoding, copy.deepcopy(decoding)):
    np.testing.assert_array_equal(tokenizer.push_codes(first, other)[0], audio)


def test_nothing_is_refused_as_encode_refuses_it(tokenizer):
  codes, state = tokenizer.push(np.zeros(0, np.float32), tokenizer.start())
  assert codes.ids.shape == (3, 0) and codes.num_samples == 0
  with pytest.raises(LmsptError, match='holds no samples'):
    tokenizer.finish(state)
  with pytest.raises(LmsptError, match='NaN'):
    tokenizer.push(np.full(3, np.nan, np.float32), state)
  with pytest.raises(LmsptError, match='int16'):
    tokenizer.push(np.zeros(3, np.int16), state)
  with pytest.raises(LmsptError, match='DecodingState'):
    tokenizer.push(np.zeros(3, np.float32), tokenizer.start_decoding())
  with pytest.raises(LmsptError, match='another'):
    tokenizer.push(np.zeros(3, np.float32), dataclasses.replace(state, model_hash='another'))


def test_nothing_follows_an_end(tokenizer, speech):
  tail = tokenizer.finish(tokenizer.push(speech[:100], tokenizer.start())[1])
  audio, state = tokenizer.push_codes(tail, tokenizer.start_decoding())
  assert len(audio) == tail.num_samples == 100
  with pytest.raises(LmsptError, match='100 samples'):
    tokenizer.push_codes(tail, state)


def test_not_causal(tiny_tokenizer):
  for start in (tiny_tokenizer.start, tiny_tokenizer.start_decoding):
    with pytest.raises(LmsptError, match=r'not causal.*lmspt_12_5hz_causal'):
      start()


FSQ = QuantizerConfig(kind='fsq', fsq_levels=(8, 5, 5))
VARIANTS = {'shared encoder': dict(shared_encoder=True),
            'no subtraction, fsq': dict(subtract_semantic=False, semantic=FSQ)}


@pytest.mark.parametrize('name', VARIANTS)
def test_variants(name, tmp_path, speech):
  """Of the tiny model, whose few channels are no multiple of what a CPU adds up at once."""
  tokenizer = make(tmp_path, model=dataclasses.replace(CONFIG.model, causal=True, **VARIANTS[name]))
  audio = speech[:3 * RATE + 1]
  wanted = tokenizer.encode(audio, sample_rate=RATE)
  assert len(np.unique(wanted.ids[0])) > 5
  found = encoded(tokenizer, audio, [HOP + 1] * 100)
  assert_same(found, wanted)
  np.testing.assert_allclose(decoded(tokenizer, found, [1] * 149), tokenizer.decode(wanted), atol=1e-5)


def test_drop_tail(tokenizer, speech):
  config = dataclasses.replace(tokenizer.config, quirks=QuirksConfig(drop_tail=True))
  other = Tokenizer(dataclasses.replace(tokenizer.model, config=config))
  audio = speech[:3 * HOP + 9]
  assert_same(encoded(other, audio, [HOP, 100]), other.encode(audio, sample_rate=RATE))
  with pytest.raises(LmsptError, match='drops the tail'):
    other.finish(other.push(audio[:9], other.start())[1])


# ---------------------------------------------------------------- lmspt encode --stream, lmspt decode --stream


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('cli'), model=dataclasses.replace(CONFIG.model, causal=True))


def lmspt(*argv, **options):
  return subprocess.Popen([sys.executable, '-m', 'lmspt_jax', *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **options)


def test_in_a_pipe(run, repo, speech):
  """A frame of codes is written before the next one is read; half a sample at the end is said; so is half a frame."""
  pcm = np.rint(speech[:4 * HOP + 50] * 32768).astype('<i2')
  wanted = Tokenizer.from_pretrained(run).encode(pcm / np.float32(32768), sample_rate=RATE)
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(repo), os.environ.get('PYTHONPATH', '')])}
  with lmspt('encode', '--stream', f'--model={run}', env=environment) as process:
    process.stdin.write(pcm[:HOP].tobytes() + pcm[HOP:].tobytes()[:1])
    process.stdin.flush()
    first = process.stdout.read(8)  # waits for the first frame, while the input stays open
    rest, said = process.communicate(pcm[HOP:].tobytes()[1:] + b'x')
  ids_TK = np.frombuffer(first + rest, '<u2').reshape(-1, 4)
  np.testing.assert_array_equal(ids_TK.T, wanted.ids)
  assert process.returncode == 1 and b'middle of a sample' in said.splitlines()[-1], said


@pytest.fixture
def piped(monkeypatch, capfdbinary):
  """Runs the command here with these bytes as its standard input: (status, bytes written, what it said)."""

  def call(given, *argv):
    reading, writing = os.pipe()
    os.write(writing, given)
    os.close(writing)
    with os.fdopen(reading, 'rb') as file, monkeypatch.context() as patch:
      patch.setattr(sys, 'stdin', type('Text', (), {'buffer': file}))
      status = cli.main(list(map(str, argv)))
    out, said = capfdbinary.readouterr()
    return status, out, said.decode()

  return call


def test_codes_in_a_pipe(run, piped, speech):
  tokenizer = Tokenizer.from_pretrained(run)
  codes = tokenizer.encode(speech[:5 * HOP], sample_rate=RATE)
  frames = codes.ids.T.astype('<u2').tobytes()
  for path, rate in (('full', 24_000), ('resynthesis', 16_000)):
    status, out, said = piped(frames, 'decode', '--stream', f'--model={run}', f'--path={path}')
    assert status == 0 and str(rate) in said, said
    wanted = np.clip(np.rint(tokenizer.decode(codes, path=path) * 32768), -32768, 32767)
    np.testing.assert_allclose(np.frombuffer(out, '<i2'), wanted, atol=1)  # a rounding apart at most
  status, out, said = piped(frames + b'abc', 'decode', '--stream', f'--model={run}')
  assert status == 1 and len(out) == 5 * HOP * 2 and '3 bytes' in said and 'middle of a frame' in said
  status, _, said = piped(b'\xff' * 8, 'decode', '--stream', f'--model={run}')
  assert status == 1 and 'standard input: ids of codebook 0' in said
  status, _, said = piped(b'', 'decode', '--stream', f'--model={run}')
  assert status == 1 and 'standard input: holds no codes' in said


def test_another_rate_in_a_pipe(run, piped, speech):
  pcm = np.rint(speech[:16_000] * 32768).astype('<i2')
  tokenizer = Tokenizer.from_pretrained(run)
  wanted = tokenizer.encode(to_mono_at(pcm / np.float32(32768), 16_000, RATE), sample_rate=RATE)
  status, out, _ = piped(pcm.tobytes(), 'encode', '--stream', f'--model={run}', '--rate=16000')
  assert status == 0
  np.testing.assert_array_equal(np.frombuffer(out, '<u2').reshape(-1, 4).T, wanted.ids)
  status, _, said = piped(b'', 'encode', '--stream', f'--model={run}')
  assert status == 1 and 'standard input' in said and 'holds no samples' in said


def test_a_reader_that_left(run, piped, monkeypatch, tmp_path):
  """As after `| head`: quiet, and not success."""

  class Gone:
    def write(self, data):
      raise BrokenPipeError

    def flush(self):
      pass

    def fileno(self):
      return os.open(tmp_path / 'closed', os.O_CREAT | os.O_WRONLY)

  monkeypatch.setattr(sys, 'stdout', type('Text', (), {'buffer': Gone(), 'fileno': Gone().fileno}))
  status, _, said = piped(bytes(2 * HOP), 'encode', '--stream', f'--model={run}')
  assert status == 141 and 'error' not in said and 'Traceback' not in said


@pytest.mark.parametrize('argv, word', [
    (['encode', '--model=m', '--stream', 'a.wav'], 'a.wav'),
    (['encode', '--model=m', '--stream', '--out=o'], '--out'),
    (['encode', '--model=m', 'a.wav'], '--out'),
    (['encode', '--model=m', '--out=o'], 'AUDIO'),
    (['encode', '--model=m', '--out=o', '--rate=16000', 'a.wav'], '--rate'),
    (['decode', '--model=m', '--stream', 'a.npz'], 'a.npz'),
    (['decode', '--model=m', '--out=o'], 'CODES'),
])
def test_usage(argv, word, capsys):
  assert cli.main(argv) == 2
  assert word in capsys.readouterr().err
