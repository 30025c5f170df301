"""Audio files in (formats, rates, channels, crops, stores) and out. Every file is made from the bundled speech."""

from __future__ import annotations

import io
import os
import threading

import numpy as np
import pytest
import soundfile
from _audio_files import CONSTANT, SPEECH, VARIABLE, encode, speech

from lmspt_jax.data.audio_io import (
  AudioError,
  Pcm,
  check_sound,
  crop_mono,
  load_mono,
  open_audio,
  read_audio,
  read_range,
  resampled_length,
  to_mono_at,
  write_wav,
)
from lmspt_jax.data.storage import FileRange
from lmspt_jax.data.storage.range_file import RangeFile
from lmspt_jax.errors import LmsptError


@pytest.fixture(scope='module')
def long_speech():
  return speech()


@pytest.mark.parametrize(('suffix', 'channels', 'rate', 'least'), [
  ('wav', 8, 8_000, 0.999), ('flac', 8, 192_000, 0.999), ('ogg', 8, 8_000, 0.9), ('mp3', 2, 8_000, 0.9),
  ('mp3', 1, 44_100, 0.99), ('ogg', 2, 48_000, 0.9), ('wav', 1, 22_050, 0.999)])
def test_formats_rates_and_channels(tmp_path, suffix, channels, rate, least):
  speech, _ = soundfile.read(SPEECH, dtype='float32')
  path = tmp_path / f'speech.{suffix}'
  source = to_mono_at(speech, 16_000, rate)
  path.write_bytes(encode(np.repeat(source[:, None], channels, axis=1), rate, suffix.upper()))
  audio, found = read_audio(path, name='speech')
  assert found == rate and audio.shape[1] == channels and audio.dtype == np.float32
  assert np.array_equal(read_audio(path.read_bytes(), name='speech')[0], audio)
  expected = to_mono_at(source, rate, 16_000)
  loaded = load_mono(path, 16_000)
  assert loaded.shape == (-(-len(audio) * 16_000 // rate),) and loaded.dtype == np.float32
  assert abs(len(loaded) - len(expected)) < 4_000  # mp3 pads
  length = min(len(loaded), len(expected))
  correlation = max(np.corrcoef(loaded[lag:length], expected[:length - lag])[0, 1] for lag in range(0, 3_000)
                    ) if suffix == 'mp3' else np.corrcoef(loaded[:length], expected[:length])[0, 1]
  assert correlation > least


FORMATS = {  # name -> rate, format, subtype, options, tolerance, share of the file that a crop of 4 s may read
  'wav': (16_000, 'WAV', 'PCM_16', {}, 1e-6, 0.08),
  'wav-float': (44_100, 'WAV', 'FLOAT', {}, 1e-6, 0.08),
  'wav-adpcm': (16_000, 'WAV', 'MS_ADPCM', {}, 1e-6, 0.1),
  'wav-gsm': (16_000, 'WAV', 'GSM610', {}, 1e-6, 1.1),  # can't seek
  'aiff': (24_000, 'AIFF', 'PCM_24', {}, 1e-6, 0.08),
  'flac': (16_000, 'FLAC', 'PCM_16', {}, 1e-6, 0.2),  # no seek table
  'flac-48': (48_000, 'FLAC', 'PCM_24', {}, 1e-6, 0.2),
  'vorbis-16': (16_000, 'OGG', 'VORBIS', {}, 1e-6, 0.8),  # ogg is read by pages
  'vorbis-44': (44_100, 'OGG', 'VORBIS', {}, 1e-6, 0.8),
  'opus-16': (16_000, 'OGG', 'OPUS', {}, 4e-3, 0.8),
  'opus-48': (48_000, 'OGG', 'OPUS', {}, 1e-6, 0.8),
  'mp3-16': (16_000, 'MP3', None, {}, 1e-6, 1.1),  # finds its frames one by one
  'mp3-24': (24_000, 'MP3', None, VARIABLE, 1e-6, 1.1),
  'mp3-24-cbr': (24_000, 'MP3', None, CONSTANT, 1e-6, 2.1),  # no tag: all frames are counted
  'mp3-48': (48_000, 'MP3', None, VARIABLE, 1e-6, 1.1),
}


class CountingFile(io.BytesIO):
  read_bytes = 0

  def readinto(self, buffer):
    count = super().readinto(buffer)
    self.read_bytes += count
    return count


@pytest.mark.parametrize('name', FORMATS)
def test_a_crop_equals_the_same_part_of_the_whole_and_decodes_little_more(long_speech, name, monkeypatch, capfd):
  rate, kind, subtype, options, tolerance, share = FORMATS[name]
  stereo = subtype not in ('GSM610', 'VORBIS', 'OPUS')
  source = to_mono_at(long_speech, 16_000, rate)
  data = encode(np.stack([source, source / 2], axis=1) if stereo else source, rate, kind, subtype, **options)
  audio, found = read_audio(data, name=name)
  assert found == rate and abs(len(audio) - len(source)) < 3_000
  whole = to_mono_at(audio, rate, 24_000)
  decoded = []
  read = soundfile.SoundFile.read
  monkeypatch.setattr(soundfile.SoundFile, 'read',
                      lambda file, count, **how: decoded.append(count) or read(file, count, **how))
  num_samples = 4 * 24_000
  starts = [0, 1, 9_001, len(whole) - num_samples, len(whole) - 50_000, len(whole) - 1]
  starts += np.random.default_rng(0).integers(0, len(whole) - num_samples, 12).tolist()
  for start in starts:
    decoded.clear()
    file = CountingFile(data)
    with open_audio(file, name=name) as opened:
      assert opened.frames == len(audio)
      decoded.clear()
      crop = crop_mono(opened, start, num_samples, 24_000, name=name)
    expected = whole[start:start + num_samples]
    assert crop.shape == expected.shape
    assert np.abs(crop - expected).max() <= tolerance
    if subtype != 'GSM610' and (subtype != 'VORBIS' or start * rate // 24_000 < len(audio) - (1 << 18)):
      assert sum(decoded) <= 4 * rate + 2_000 + (18_432 if kind == 'MP3' else 0)
    assert file.read_bytes <= share * len(data)
  if subtype != 'GSM610':
    with open_audio(data, name=name) as opened:  # one file read here and there
      for start in np.random.default_rng(1).integers(0, len(audio) - rate, 40).tolist():
        part = read_range(opened, start, start + rate, name=name)
        assert np.abs(part - audio[start:start + rate]).max() <= tolerance
  assert capfd.readouterr() == ('', '')


def test_what_others_write_to_stderr_while_mp3_is_decoded_arrives(long_speech, capfd):
  data = encode(long_speech, 16_000, 'MP3', **VARIABLE)
  stop = threading.Event()

  def write():
    while not stop.is_set():
      os.write(2, b'a line of ours\n')
      lines.append(1)

  lines = []
  writer = threading.Thread(target=write)
  writer.start()
  for start in range(100_000, 600_000, 50_000):
    with open_audio(data, name='x') as file:
      read_range(file, start, start + 5_000, name='x')
  stop.set()
  writer.join()
  assert capfd.readouterr().err == 'a line of ours\n' * len(lines)


def test_resampled_length_is_exact():
  for length in (1, 7, 999, 16_000):
    for a, b in ((16_000, 24_000), (44_100, 16_000), (48_000, 16_000), (16_000, 16_000), (8_000, 22_050)):
      assert len(to_mono_at(np.ones(length, np.float32), a, b)) == -(-length * b // a)
  tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
  expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
  assert np.abs(to_mono_at(tone, 44_100, 16_000) - expected)[200:-200].max() < 1e-4
  assert np.allclose(to_mono_at(np.array([[1.0, 0.0], [0.5, -0.5]]), 16_000, 16_000), [0.5, 0.0])


@pytest.mark.parametrize('kind', [np.int16, np.float32])
def test_samples_need_no_decoding(long_speech, kind):
  samples = (long_speech * 32768).astype(np.int16)
  samples = samples if kind is np.int16 else samples / np.float32(32768)
  whole = to_mono_at(read_audio(encode(long_speech, 16_000, 'WAV'), name='x')[0], 16_000, 24_000)
  with open_audio(Pcm(samples, 16_000), name='x') as file:
    assert file.frames == len(samples) and file.samplerate == 16_000
    crop = crop_mono(file, 300_001, 24_000, 24_000, name='x')
    assert np.abs(crop - whole[300_001:324_001]).max() < 1e-6
    part = read_range(file, 5, 10, name='x')
  part[:] = 2  # a copy
  assert np.abs(samples[5:10] / (32768 if kind is np.int16 else 1)).max() < 1
  with pytest.raises(AudioError, match='no samples'):
    open_audio(Pcm(samples[:0], 16_000), name='x')
  with pytest.raises(AudioError, match='10 Hz'):
    open_audio(Pcm(samples, 10), name='x')


@pytest.mark.parametrize('name', ['flac', 'mp3-24', 'vorbis-16'])
def test_a_part_of_a_file(tmp_path, long_speech, name):
  rate, kind, subtype, options, _, _ = FORMATS[name]
  data = encode(long_speech, rate, kind, subtype, **options)
  (tmp_path / 'shard').write_bytes(b'before' * 1000 + data + b'after' * 10_000)
  expected = read_audio(data, name='x')[0]
  content = FileRange(str(tmp_path / 'shard'), 6_000, len(data))
  with open_audio(content, name='x') as file:
    assert np.abs(read_range(file, 400_000, 440_000, name='x') - expected[400_000:440_000]).max() < 1e-6
  with pytest.raises(AudioError) as error:
    read_audio(FileRange(str(tmp_path / 'shard'), 6_000, len(data) * 9), name='member')
  assert error.value.reason == 'truncated' and '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['flac', 'mp3-24', 'vorbis-16'])
def test_what_a_store_says_is_the_error(long_speech, name):
  rate, kind, subtype, options, _, _ = FORMATS[name]
  data = encode(long_speech, rate, kind, subtype, **options)

  class Store:

    def __init__(self, limit, size=0):
      self.limit, self.size = limit, size or len(data)

    def open(self, *, name):
      return RangeFile(self.size, self.fetch, lambda: closed.append(self.limit))

    def fetch(self, start, stop):
      if stop > self.limit:
        raise AudioError(f'{name}: the store is gone; try again', 'unreachable')
      return (data + bytes(50_000))[start:stop]

  closed = []
  limits = [0, len(data) // 2, len(data) - 1, len(data)]
  for limit in limits[:-1]:
    with pytest.raises(AudioError, match='the store is gone') as error:
      read_audio(Store(limit), name=name)
    assert error.value.reason == 'unreachable'
  assert len(read_audio(Store(limits[-1]), name=name)[0]) > 900_000
  assert closed == limits
  if kind == 'OGG':  # its length is found at its end: a wrong one would move the crops
    with pytest.raises(AudioError, match='the store is gone'):
      open_audio(Store(len(data) + 50_000, 9 * len(data)), name=name)


def test_the_shortest_recording():
  for kind in ('WAV', 'FLAC', 'OGG', 'MP3'):
    data = encode(np.full(1, 0.5, np.float32), 16_000, kind)
    with open_audio(data, name='x') as file:
      crop = crop_mono(file, 0, 100_000, 24_000, name='x')
      assert len(crop) == resampled_length(file.frames, 16_000, 24_000) and np.isfinite(crop).all()


def test_silence_is_a_fault_of_a_whole_recording():
  quiet = np.full(16_000, 5e-5, np.float32)
  crop = load_silent(quiet)
  with pytest.raises(AudioError, match='silent') as error:
    check_sound(crop, len(crop), name='x')
  assert error.value.reason == 'silent'
  check_sound(crop, len(crop) + 1, name='x')  # a pause
  check_sound(load_silent(quiet * 4), len(crop), name='x')


def load_silent(audio):
  with open_audio(encode(audio, 16_000, 'WAV', 'FLOAT'), name='x') as file:
    return crop_mono(file, 0, 24_000, 24_000, name='x')


def test_write_wav_is_exact_clipped_and_atomic(tmp_path):
  speech, rate = read_audio(SPEECH, name='speech')
  path = tmp_path / 'out.wav'
  write_wav(path, speech, rate)
  assert np.array_equal(read_audio(path, name='out')[0], speech) and soundfile.info(path).subtype == 'PCM_16'
  write_wav(path, np.array([2.0, -2.0, 0.5]), rate)
  assert read_audio(path, name='out')[0][:, 0].tolist() == [32767 / 32768, -1.0, 0.5]
  before = path.read_bytes()
  with pytest.raises(LmsptError, match='NaN or infinite'):
    write_wav(path, np.array([np.nan]), rate)
  assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['out.wav']
  with pytest.raises(LmsptError, match=r"absent/out\.wav: can't be written"):
    write_wav(tmp_path / 'absent' / 'out.wav', speech, rate)
