"""Every metric against its package by hand, on equal recordings, on rising noise, and where it is undefined."""

from __future__ import annotations

from pathlib import Path

import jiwer
import numpy as np
import pesq
import pycodec2
import pystoi
import pytest
import pyworld
import scipy.stats
import soundfile
from speechmos import dnsmos
from whisper_normalizer.english import EnglishTextNormalizer

from lmspt_jax.audio.mel import mel_filters
from lmspt_jax.errors import LmsptError
from lmspt_jax.evaluation import baselines
from lmspt_jax.measures import names, pitch, quality, signal, speaker, statistics, tokens, words
from lmspt_jax.measures.spectral import MEL_BINS, MEL_WINDOWS, STFT_WINDOWS, spectral_distances
from lmspt_jax.measures.undefined import Undefined

SAMPLE = Path(__file__).parents[1] / 'lmspt_jax/assets/speech_sample'
NAMES = ('asterisk-agent-incorrect', 'asterisk-vm-tocallback', 'librivox-austen-0890')
SNRS = (20, 0)  # dB


def _speech(name):
  return soundfile.read(SAMPLE / f'audio/{name}.flac', dtype='float32')[0][:48_000]


def _noisy(audio_N, decibels):
  noise_N = np.random.default_rng(0).standard_normal(len(audio_N)).astype(np.float32)
  return audio_N + noise_N * np.float32(np.sqrt(np.mean(audio_N**2) / np.mean(noise_N**2) / 10 ** (decibels / 10)))


@pytest.fixture(scope='module')
def speech():
  """Three utterances of two speakers, 3 s at most, float32 at 16 kHz."""
  return [_speech(name) for name in NAMES]


def _measured(original_N, decoded_N):
  tracks = [pitch.pitch_track(audio_N) for audio_N in (original_N, decoded_N)]
  mel, stft = spectral_distances(original_N, decoded_N)
  return {
      'pesq': signal.pesq_wide_band(original_N, decoded_N),
      'stoi': signal.short_time_intelligibility(original_N, decoded_N),
      'si_sdr': signal.si_sdr(original_N, decoded_N), 'mel': mel, 'stft': stft,
      'pitch_error': pitch.pitch_error(*tracks), 'voicing_f1': pitch.voicing_f1(*tracks),
      'speaker': float(speaker.speaker_embedding(original_N) @ speaker.speaker_embedding(decoded_N)),
      **quality.dnsmos_scores(decoded_N)}


@pytest.fixture(scope='module')
def measured(speech):
  """[SNR][utterance] -> metrics; the first SNR is none."""
  return [[_measured(audio_N, audio_N if snr is None else _noisy(audio_N, snr)) for audio_N in speech[:2]]
          for snr in (None, *SNRS)]


def test_each_is_its_package(speech, measured):
  original_N, decoded_N = speech[1], _noisy(speech[1], 20)
  found = measured[1 + SNRS.index(20)][1]
  assert found['pesq'] == pesq.pesq(16_000, original_N, decoded_N, 'wb')
  assert found['stoi'] == pystoi.stoi(original_N, decoded_N, 16_000)
  by_hand = dnsmos.run(np.clip(decoded_N, -1, 1), 16_000)
  assert [found[name] for name in ('dnsmos', 'dnsmos_speech', 'dnsmos_background', 'dnsmos_p808')] == [
      by_hand[name] for name in ('ovrl_mos', 'sig_mos', 'bak_mos', 'p808_mos')]
  truth_T, heard_T = (pyworld.stonemask(audio_N, *pyworld.dio(audio_N, 16_000), 16_000)
                      for audio_N in (original_N.astype(np.float64), decoded_N.astype(np.float64)))
  both_T = (truth_T > 0) & (heard_T > 0)
  assert found['pitch_error'] == pytest.approx(np.abs(1200 * np.log2(heard_T[both_T] / truth_T[both_T])).mean())
  recall, precision = both_T.sum() / (truth_T > 0).sum(), both_T.sum() / (heard_T > 0).sum()
  assert found['voicing_f1'] == pytest.approx(2 * recall * precision / (recall + precision))
  assert found['si_sdr'] == pytest.approx(20, abs=0.2)  # noise is nearly orthogonal to speech


def test_spectral_distances_are_the_definition_s(speech):
  """Written out in numpy, on the recording with zeros after it."""
  original_N, decoded_N = speech[0], _noisy(speech[0], 15)

  def magnitude_TF(audio_N, window):
    padded = np.concatenate([audio_N[1:window // 2 + 1][::-1], audio_N, np.zeros(4096)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::window // 4]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return np.abs(np.fft.rfft(frames[:len(audio_N) // (window // 4) + 1] * hann))

  def distance(x, y):
    return np.mean(np.abs(2 * np.log10(np.maximum(x, 1e-5)) - 2 * np.log10(np.maximum(y, 1e-5))) + np.abs(x - y))

  mel = sum(distance(*(magnitude_TF(audio_N, window) @ mel_filters(16_000, window, bins)
                       for audio_N in (original_N, decoded_N)))
            for bins, window in zip(MEL_BINS, MEL_WINDOWS, strict=True))
  stft = sum(distance(*(np.maximum(magnitude_TF(audio_N, window), 1e-5) for audio_N in (original_N, decoded_N)))
             for window in STFT_WINDOWS)
  assert spectral_distances(original_N, decoded_N) == pytest.approx((mel, stft), rel=1e-4)


def test_equal_recordings_are_perfect(measured):
  for found in measured[0]:
    assert found['pesq'] == pytest.approx(4.644, abs=1e-3)
    assert found['stoi'] == pytest.approx(1, abs=1e-6) and found['speaker'] == pytest.approx(1, abs=1e-6)
    assert found['si_sdr'] == 100 and found['voicing_f1'] == 1
    assert found['mel'] == found['stft'] == found['pitch_error'] == 0


@pytest.mark.parametrize('name', ['pesq', 'stoi', 'si_sdr', 'mel', 'stft', 'pitch_error', 'voicing_f1', 'speaker',
                                  'dnsmos', 'dnsmos_background', 'dnsmos_p808'])
def test_noise_orders_it(measured, name):
  worse = 1 if name in ('mel', 'stft', 'pitch_error') else -1
  means = [np.mean([found[name] for found in level]) for level in measured]
  assert (np.diff(means) * worse > 0).all(), means


def test_words_are_jiwer_s_after_whisper_s_normaliser():
  reference, heard = 'Mr. Smith paid twenty dollars, okay?', 'mister smith paid $30 o.k. then'
  found = words.text_errors(reference, heard)
  normalise = EnglishTextNormalizer()
  assert found.word_errors / found.words == jiwer.wer(normalise(reference), normalise(heard))
  assert found.character_errors / found.characters == jiwer.cer(normalise(reference), normalise(heard))
  kept = [wanted for kind, wanted, _ in found.aligned if kind != 'insert']
  assert ' '.join(kept) == found.reference
  assert words.text_errors(reference, reference.upper()).word_errors == 0
  assert words.text_errors(reference, '').word_errors == found.words
  assert words.text_errors('日本語です', '日本語だ', 'ja').words == 5
  with pytest.raises(Undefined, match='no transcript'):
    words.text_errors('[laughter]', 'something')


def test_two_speakers_are_told_apart(speech):
  ours, other, reader = map(speaker.speaker_embedding, speech)
  assert ours @ other > 0.75 > ours @ reader
  assert ours @ other > other @ reader
  # Its four largest, as the package has them too (tests/parity/test_speaker_parity.py).
  assert np.argsort(-ours)[:4].tolist() == [243, 10, 2, 210]
  np.testing.assert_allclose(ours[[243, 10, 2, 210]], [0.2710, 0.2191, 0.2101, 0.1964], atol=1e-4)


def test_silence_and_moments_are_undefined(speech):
  silent_N, moment_N = np.zeros(16_000, np.float32), speech[0][:1600]
  for measure in (signal.pesq_wide_band, signal.short_time_intelligibility, signal.si_sdr):
    with pytest.raises(Undefined):
      measure(silent_N, silent_N)
  for measure in (signal.pesq_wide_band, signal.short_time_intelligibility):
    with pytest.raises(Undefined):
      measure(moment_N, moment_N)
  for measure in (quality.dnsmos_scores, speaker.speaker_embedding):
    with pytest.raises(Undefined):
      measure(silent_N)
  with pytest.raises(Undefined, match='30 s'):
    signal.pesq_wide_band(np.tile(speech[0], 20), np.tile(speech[0], 20))
  track_T, unvoiced_T = np.array([0, 100.0]), np.zeros(2)
  with pytest.raises(Undefined, match='original'):
    pitch.voicing_f1(unvoiced_T, track_T)
  assert pitch.voicing_f1(track_T, unvoiced_T) == 0
  with pytest.raises(Undefined, match='both'):
    pitch.pitch_error(track_T, unvoiced_T)
  assert spectral_distances(moment_N, moment_N) == (0, 0)


def test_missing_packages_are_named(monkeypatch):
  names.check_packages(names.METRICS, also=('matplotlib',))
  find = names.importlib.util.find_spec
  monkeypatch.setattr(names.importlib.util, 'find_spec', lambda name: None if name in ('pesq', 'jiwer') else find(name))
  names.check_packages(['mel_distance', 'dnsmos'])  # which need neither
  with pytest.raises(LmsptError, match=r"needs jiwer, pesq: pip install 'lmspt_jax\[evaluate\]'"):
    names.check_packages(['stoi', 'cer', 'mel_distance'])


def test_intervals_are_the_percentile_bootstrap_s():
  rng = np.random.default_rng(1)
  words_U = rng.integers(3, 20, 60)
  errors_U = rng.binomial(words_U, 0.2)
  found = statistics.ratio(errors_U, words_U, missing=4)
  expected = scipy.stats.bootstrap((errors_U, words_U), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True,
                                   method='percentile', n_resamples=5000, rng=0).confidence_interval
  assert found.value == errors_U.sum() / words_U.sum() and (found.count, found.missing) == (60, 4)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
  assert statistics.ratio(errors_U, words_U) == statistics.ratio(errors_U, words_U)  # the same draws again
  alone = statistics.mean([3.0])
  assert (alone.value, alone.low, alone.high, alone.count) == (3, None, None, 1)
  assert statistics.mean([], missing=7) == statistics.Figure(None, None, None, 0, 7)


def test_a_paired_test_sees_what_the_pairs_say():
  rng = np.random.default_rng(2)
  hardness_U, ones_U = 10 * rng.random(8), np.ones(8)
  found = statistics.compare(hardness_U + 0.1 + 0.01 * rng.random(8), hardness_U, ones_U)
  assert found.p == 2 / 2**8 and 0.1 < found.difference.low < found.difference.high < 0.11
  assert statistics.compare(hardness_U, hardness_U, ones_U).p == 1
  many_U = rng.standard_normal(200)
  assert statistics.compare(many_U, rng.standard_normal(200), np.ones(200)).p > 0.01
  assert statistics.compare(many_U[:1], many_U[1:2], np.ones(1)).p is None


def test_token_statistics_by_hand():
  ids = [np.array([[0, 0, 1, 1], [3, 3, 3, 3]]), np.array([[0, 1], [3, 3]])]
  first, second = tokens.codebook_statistics(ids, (4, 8), 25.0)
  assert first['usage']['value'] == 0.5 and first['entropy']['value'] == 1 and first['perplexity']['value'] == 2
  assert first['bitrate']['value'] == 25 and first['nominal_bitrate'] == 50 and first['frames'] == 6
  assert first['repeat_rate']['value'] == 2 / 4  # 0 0, 1 1 of 0 0, 0 1, 1 1, 0 1
  assert first['distinct_2']['value'] == 3 and first['distinct_3']['value'] == 2
  assert first['entropy_2']['value'] == pytest.approx(1.5 - 1)
  assert second['entropy']['value'] == 0 and second['repeat_rate']['value'] == 1 and second['usage']['value'] == 1 / 8
  figures = [figure for figure in first.values() if isinstance(figure, dict)]
  assert all(figure['low'] <= figure['value'] <= figure['high'] for figure in figures)


def test_baselines_are_in_step_and_of_the_bitrate_asked_for(speech):
  audio_N = np.concatenate(speech)
  scores = []
  for codec, bitrate in ((baselines.codec2, 700), (baselines.codec2, 1200), (baselines.opus, 6000),
                         (baselines.opus, 12_000)):
    decoded_N, bits = codec(audio_N, bitrate)
    assert decoded_N.shape == audio_N.shape and decoded_N.dtype == np.float32
    assert bits / (len(audio_N) / 16_000) == pytest.approx(bitrate, rel=0.03)  # packets alone
    # A vocoder keeps no waveform that could be in step, but it keeps the spectrum over time.
    nearness = [_likeness(audio_N, np.roll(decoded_N, shift)) for shift in (-160, -80, 0, 80, 160)]
    assert np.argmax(nearness) == 2, (codec, bitrate, nearness)
    scores.append(signal.short_time_intelligibility(audio_N, decoded_N))
  assert 0.5 < scores[0] and scores == sorted(scores)
  narrow_N = baselines.narrowed(audio_N)
  spectrum_F = np.abs(np.fft.rfft(narrow_N)) ** 2
  assert narrow_N.shape == audio_N.shape and spectrum_F[len(spectrum_F) * 9 // 16:].sum() < 1e-3 * spectrum_F.sum()


def _likeness(*recordings):
  """Correlation of log mel spectrograms below 4 kHz, a frame every 2 ms."""
  filters_FM = mel_filters(16_000, 512, 40)[:, :26]
  logs = [np.log(np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(audio_N, 512)[::32] * np.hanning(512)))**2
                 @ filters_FM + 1e-5).ravel() for audio_N in recordings]
  return np.corrcoef(*logs)[0, 1]


def test_codec2_gives_the_same_whatever_came_before_and_counts_all_its_bits(speech):
  audio_N = speech[0]
  first_N, _ = baselines.codec2(audio_N, 700)
  baselines.codec2(speech[1], 700)
  assert np.array_equal(baselines.codec2(audio_N, 700)[0], first_N)
  assert baselines.codec2(audio_N[:0], 700)[0].shape == (0,)
  # A frame of 28 bits fills 4 bytes but for its last 4 bits, which carry nothing.
  frame = pycodec2.Codec2(700).encode(np.round(speech[0][8000:16_000:2][:320] * 32767).astype(np.int16))
  assert len(frame) == 4 and pycodec2.Codec2(700).bits_per_frame() == 28 and frame[3] & 0b1111 == 0
