"""STFT, mel and resampling: against excerpts of PyTorch's and librosa's output on real speech, and soxr's."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr

from lmspt_jax.audio import mel, resample, stft
from lmspt_jax.errors import LmsptError

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / 'lmspt_jax/assets/speech_sample/audio/asterisk-agent-incorrect.flac'


@pytest.fixture(scope='module')
def reference():
  """Made by tests/parity/make_whisper_fixtures.py."""
  with np.load(ROOT / 'tests/fixtures/audio_reference.npz', allow_pickle=False) as file:
    return dict(file)


@pytest.fixture(scope='module')
def speech(reference):
  audio, rate = soundfile.read(SPEECH, dtype='float32')
  assert rate == 16_000
  return audio[: int(reference['length'])]


def _excerpt(frames, middle):
  return np.concatenate([frames[:2], frames[middle], frames[-2:]])


@pytest.mark.parametrize('n_mels', [80, 128])
def test_log_mel_is_whispers(reference, speech, n_mels):
  ours = np.asarray(mel.log_mel_spectrogram(speech[None], n_mels))[0]
  assert ours.shape == (len(speech) // 160, n_mels)
  np.testing.assert_allclose(_excerpt(ours, slice(40, 46)), reference[f'log_mel_{n_mels}'], atol=1e-4)


def test_log_mel_floor_depends_on_batch_mates_only_when_asked(speech):
  quiet = np.stack([0.001 * speech, speech])
  alone = mel.log_mel_spectrogram(quiet[:1], 80)
  np.testing.assert_allclose(mel.log_mel_spectrogram(quiet, 80)[:1], alone, atol=1e-5)
  shared = mel.log_mel_spectrogram(quiet, 80, floor='batch')
  assert float(jnp.abs(shared[:1] - alone).max()) > 0.5
  np.testing.assert_allclose(shared[:1].min(), shared[1:].max() - 2.0, atol=1e-5)  # 8 of log10, scaled by 4
  with pytest.raises(ValueError, match='floor'):
    mel.log_mel_spectrogram(speech[None], 80, floor='none')


@pytest.mark.parametrize('setting', [(16_000, 400, 80), (16_000, 400, 128), (24_000, 256, 40), (24_000, 2048, 320)])
def test_mel_filters_are_librosas(reference, setting):
  key, n_mels = '{}_{}_{}'.format(*setting), setting[2]
  ours = mel.mel_filters(*setting)
  assert ours.shape == (setting[1] // 2 + 1, n_mels) and ours.dtype == np.float32 and not ours.flags.writeable
  np.testing.assert_allclose(
    ours[:, [0, 1, n_mels // 3, n_mels // 2, n_mels - 1]], reference[f'filters_{key}'], atol=1e-7
  )
  np.testing.assert_allclose(ours.sum(axis=0), reference[f'filter_sums_{key}'], atol=1e-6)


@pytest.mark.parametrize('padding', ['center', 'match_stride'])
@pytest.mark.parametrize('size', [256, 1024])
def test_stft_is_audiotools(reference, speech, size, padding):
  ours = np.asarray(stft.stft(speech[None], size, size // 4, padding))[0]
  assert len(ours) == reference[f'stft_count_{size}_{padding}']
  assert len(ours) == stft.num_frames(len(speech), size, size // 4, padding)
  excerpt = _excerpt(ours, slice(40, 42))[:, :: size // 64]
  np.testing.assert_allclose(excerpt, reference[f'stft_{size}_{padding}'], atol=1e-4)


@pytest.mark.parametrize('size', [32, 400, 2048])
def test_transform_by_product_equals_the_fast_one(speech, size):
  """Of real speech, and its gradient: the form for a TPU."""
  frames = stft.frame(speech[None], size, size // 4)[:, :200]
  expected, pull_expected = jax.vjp(jnp.fft.rfft, frames)
  found, pull_found = jax.vjp(stft.dft_by_product, frames)
  np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
  cotangent = jnp.exp(1j * jnp.angle(expected))
  expected, found = pull_expected(cotangent)[0], pull_found(cotangent)[0]
  np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_stft_refuses_what_it_cannot_pad(speech):
  with pytest.raises(ValueError, match='too short'):
    stft.stft(speech[None, :128], 256, 64)
  with pytest.raises(ValueError, match='wants hop = fft_size'):
    stft.stft(speech[None], 256, 128, 'match_stride')
  with pytest.raises(ValueError, match='unknown padding'):
    stft.stft(speech[None], 256, 64, 'same')


def test_gradients_are_finite_on_silence_and_match_differences(speech):
  @jax.jit
  def loss(x_BN):
    return jnp.mean(mel.log_mel_spectrogram(resample.resample(x_BN, 24_000, 16_000), 80) ** 2)

  assert np.isfinite(jax.grad(loss)(jnp.zeros((1, 4800)))).all()
  x_BN = speech[None, 8000:12_800]
  direction = x_BN * np.linspace(-1, 1, x_BN.shape[1], dtype=np.float32)  # smooth even where the logarithm is steep
  slope = float(jnp.vdot(jax.grad(loss)(x_BN), direction))
  step = 1e-2
  measured = float(loss(x_BN + step * direction) - loss(x_BN - step * direction)) / (2 * step)
  assert slope == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(('from_rate', 'to_rate'), [(24_000, 16_000), (16_000, 24_000), (16_000, 11_025)])
def test_resampling_agrees_with_soxr_below_the_cutoff(from_rate, to_rate):
  audio, _ = soundfile.read(SPEECH, dtype='float32')  # its real rate does not matter here
  ours = np.asarray(resample.resample(audio[None], from_rate, to_rate))[0]
  assert len(ours) == -(-len(audio) * to_rate // from_rate)
  theirs = soxr.resample(audio, from_rate, to_rate, 'VHQ')
  length = min(len(ours), len(theirs))
  spectrum, error = np.abs(np.fft.rfft(theirs[:length])), np.abs(np.fft.rfft(ours[:length] - theirs[:length]))
  passed = np.fft.rfftfreq(length, 1 / to_rate) < 0.85 * min(from_rate, to_rate) / 2
  assert np.linalg.norm(error[passed]) < 1e-4 * np.linalg.norm(spectrum[passed])  # -80 dB


def test_resampling_is_local_and_keeps_a_constant():
  out = np.asarray(resample.resample(jnp.ones((1, 2400)), 24_000, 16_000))
  np.testing.assert_allclose(out[0, 100:-100], 1.0, atol=1e-6)
  long = np.random.default_rng(0).standard_normal((2, 9000)).astype(np.float32)
  whole, part = (resample.resample(x, 24_000, 16_000) for x in (long, long[:, :6000]))
  np.testing.assert_allclose(whole[:, :3950], part[:, :3950], atol=1e-5)


def test_resampling_refuses_rates_without_a_common_factor():
  with pytest.raises(LmsptError, match='44099 and 16000 Hz share only the factor 1') as error:
    resample.resample(jnp.zeros((1, 100)), 44_099, 16_000)
  assert '\n' not in str(error.value)
