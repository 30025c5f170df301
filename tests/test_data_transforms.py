"""Augmentation on real speech: what it does to the sound, and that it depends on (seed, index) alone."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import soundfile

from lmspt_jax.config import AugmentConfig
from lmspt_jax.data.audio_io import load_mono
from lmspt_jax.data.draws import Draws
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.transforms import Compose, Gain, Noise, Telephone, from_config
from lmspt_jax.errors import LmsptError

RATE = 24_000


@pytest.fixture(scope='module')
def speech(speech_folder):
  """Six seconds at 24 kHz."""
  paths = sorted((speech_folder / 'audio').glob('librivox*.flac'))
  return np.concatenate([load_mono(path, RATE) for path in paths])[:6 * RATE]


@pytest.fixture(scope='module')
def noise_folder(tmp_path_factory, speech_folder):
  """Two recordings of another voice: one of 0.7 s at 16 kHz, one of 9 s at 44.1 kHz in stereo; nothing else."""
  folder = tmp_path_factory.mktemp('noise')
  paths = sorted((speech_folder / 'audio').glob('asterisk-vm-*.flac'))
  babble = np.concatenate([load_mono(path, 44_100) for path in paths[:6]])[:9 * 44_100]
  soundfile.write(folder / 'long.wav', np.stack([babble, babble[::-1]], axis=1), 44_100)
  soundfile.write(folder / 'short.wav', load_mono(paths[7], 16_000)[4_000:15_200], 16_000)
  return folder


def level(audio):
  return 10 * np.log10(np.mean(np.square(audio, dtype=np.float64)))


def test_noise_is_added_at_the_ratio_drawn(speech, noise_folder):
  source = open_source(f'folder:{noise_folder}')
  for ratio in (-3.0, 0.0, 7.5, 20.0):
    transform = Noise(source, ratio, ratio, 1.0)
    for index in range(6):
      for clean in (speech * 0.1, speech[:5_000] * 0.1, speech * 0.01):  # too quiet for the limiter
        noisy = transform(clean, RATE, Draws(0, index))
        assert noisy.shape == clean.shape and noisy.dtype == np.float32
        assert level(clean) - level(noisy - clean) == pytest.approx(ratio, abs=0.1)
  ratios = [level(speech * 0.1) - level(Noise(source, 5, 20, 1.0)(speech * 0.1, RATE, Draws(3, i)) - speech * 0.1)
            for i in range(40)]
  assert 4.9 < min(ratios) < 8 and 17 < max(ratios) < 20.1


def test_loud_noise_is_scaled_down_with_the_speech_and_not_clipped(speech, noise_folder):
  loud = speech / np.abs(speech).max()
  noisy = Noise(open_source(f'folder:{noise_folder}'), -10, -10, 1.0)(loud, RATE, Draws(0, 1))
  assert np.abs(noisy).max() == pytest.approx(1, abs=1e-6)
  assert (np.abs(noisy) > 0.999).sum() < 5  # nothing flat
  factors = np.linalg.lstsq(np.stack([loud, np.roll(loud, 1)], axis=1), noisy, rcond=None)[0]
  assert 0 < factors.sum() < 0.7


def test_a_short_noise_is_repeated_and_every_part_of_a_long_one_is_used(speech, noise_folder):
  quiet = speech * np.float32(0.05)
  source = open_source(f'folder:{noise_folder}')
  long, short = (Noise(source.select([row]), 0, 0, 1.0) for row in (0, 1))
  added = short(quiet, RATE, Draws(0, 0)) - quiet
  period = round(0.7 * RATE)
  assert np.abs(added[period:] - added[:-period]).max() < 1e-6
  recording = load_mono(noise_folder / 'long.wav', RATE)
  places = set()
  for index in range(30):
    added = long(quiet[:RATE], RATE, Draws(0, index)) - quiet[:RATE]
    scores = np.correlate(recording[::4], added[::4], 'valid')
    places.add(round(4 * int(np.argmax(scores)) / RATE))
  assert min(places) <= 1 and max(places) >= 7


def test_a_noise_that_cannot_be_decoded_is_replaced_by_the_next(tmp_path, speech, noise_folder):
  shutil.copy(noise_folder / 'long.wav', tmp_path / 'c.wav')
  for name in ('a.wav', 'b.wav'):
    (tmp_path / name).write_text('not audio')
  source = open_source(f'folder:{tmp_path}')
  transform = Noise(source, 0, 0, 1.0)
  good = Noise(source.select([[source.name(row) for row in range(3)].index('c.wav')]), 0, 0, 1.0)
  for index in range(5):
    assert np.array_equal(transform(speech, RATE, Draws(0, index)), good(speech, RATE, Draws(0, index)))
  (tmp_path / 'c.wav').write_text('not audio either')
  with pytest.raises(AudioError, match=r'[abc]\.wav: not audio .*noise for augmentation, and 2 before') as error:
    transform(speech, RATE, Draws(0, 0))
  assert error.value.reason == 'undecodable' and '\n' not in str(error.value)


def band(audio, low, high):
  """Energy between two frequencies, dB."""
  spectrum = np.abs(np.fft.rfft(audio.astype(np.float64) * np.hanning(len(audio)))) ** 2
  frequencies = np.fft.rfftfreq(len(audio), 1 / RATE)
  return 10 * np.log10(spectrum[(frequencies >= low) & (frequencies < high)].sum())


def test_telephone_passes_300_to_3400_hz(speech):
  out = Telephone(1.0)(speech, RATE, Draws(0, 0))
  assert out.shape == speech.shape and out.dtype == np.float32
  assert band(out, 350, 3_350) == pytest.approx(band(speech, 350, 3_350), abs=0.05)
  assert band(out, 0, 250) < band(speech, 0, 250) - 40
  assert band(out, 3_500, 12_000) < band(speech, 3_500, 12_000) - 40
  inside = np.fft.rfft(speech) * np.isin(np.round(np.fft.rfftfreq(len(speech), 1 / RATE)), np.arange(300, 3_401))
  passed = np.fft.irfft(inside, len(speech))  # what an ideal filter leaves: same place in time, same sign
  assert np.corrcoef(out, passed)[0, 1] > 0.995
  assert len(Telephone(1.0)(speech[:1], RATE, Draws(0, 0))) == 1
  assert len(Telephone(1.0)(speech[:77_777], 44_100, Draws(0, 0))) == 77_777


def test_gain(speech):
  for index in range(20):
    out = Gain(-12, -3, 1.0)(speech, RATE, Draws(0, index))
    factor = out[np.abs(speech).argmax()] / speech[np.abs(speech).argmax()]
    assert -12 <= 20 * np.log10(factor) <= -3 and np.allclose(out, speech * factor, atol=1e-6)
  out = Gain(30, 30, 1.0)(speech, RATE, Draws(0, 0))
  assert np.abs(out).max() == pytest.approx(1, abs=1e-6) and np.corrcoef(out, speech)[0, 1] > 0.999999
  beyond = speech / np.abs(speech).max() * np.float32(1.5)  # as float files may be: not made louder, nor limited
  assert np.allclose(Gain(30, 30, 1.0)(beyond, RATE, Draws(0, 0)), beyond)


def test_probabilities_and_what_is_off_keeps_its_bits(speech, noise_folder):
  source = open_source(f'folder:{noise_folder}')
  before = speech.copy()
  for make in (lambda p: Gain(-9, -3, p), lambda p: Noise(source, 0, 10, p), Telephone):
    clip = speech[:4_000]
    done = [not np.array_equal(make(0.3)(clip, RATE, Draws(1, index)), clip) for index in range(100)]
    assert 15 <= sum(done) <= 45
    for index in range(20):
      assert make(0.0)(speech, RATE, Draws(1, index)) is speech
  assert np.array_equal(speech, before)  # nothing is changed in place
  assert from_config(AugmentConfig()) is None
  silence = np.zeros(4_000, np.float32)
  assert np.array_equal(Noise(source, 0, 0, 1.0)(silence, RATE, Draws(0, 0)), silence)


def test_a_crop_is_a_function_of_seed_and_index(speech, noise_folder):
  config = AugmentConfig(noise=f'folder:{noise_folder}', noise_probability=0.7, telephone_probability=0.5,
                         gain_probability=0.9)
  chain = from_config(config)
  assert [transform.name for transform in chain.transforms] == ['noise', 'telephone', 'gain']
  clip = speech[:8_000]
  first = [chain(clip, RATE, Draws(5, index)) for index in range(12)]
  again = copy.deepcopy(chain)  # as it goes to a worker
  for index in reversed(range(12)):  # another process, another order
    assert np.array_equal(again(clip, RATE, Draws(5, index)), first[index])
  assert len({one.tobytes() for one in first}) > 8
  assert sum(np.array_equal(chain(clip, RATE, Draws(6, index)), first[index]) for index in range(12)) <= 4
  alone = Compose((Gain(-6, 6, 0.9),))
  only = from_config(AugmentConfig(gain_probability=0.9))
  for index in range(12):  # a transform's draws do not hang on the others
    assert np.array_equal(alone(clip, RATE, Draws(5, index)), only(clip, RATE, Draws(5, index)))
    gain = Gain(-6, 6, 0.9)(clip, RATE, Draws(5, index).of('gain'))
    assert np.array_equal(gain, alone(clip, RATE, Draws(5, index)))


def test_draws_stay_what_they_are():
  draws = Draws(0, 1).of('noise')
  assert [draws.bits() for _ in range(2)] == [2384484387452434822, 3033068667776698180]  # runs are resumed by it
  values = np.array([Draws(7, index).uniform(2, 4) for index in range(2_000)])
  assert 2 <= values.min() < 2.01 and 3.99 < values.max() < 4 and abs(values.mean() - 3) < 0.05
  assert {Draws(7, index).below(3) for index in range(50)} == {0, 1, 2}


def test_noise_that_is_not_there(tmp_path):
  with pytest.raises(LmsptError, match='absent'):
    from_config(AugmentConfig(noise=f'folder:{tmp_path}/absent', noise_probability=0.5))
  with pytest.raises(LmsptError, match='noise'):
    AugmentConfig(noise_probability=0.5).check('data.augment')
