"""Audio files whose headers lie, and files that are no audio: each is read right or is one AudioError."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from _audio_files import SPEECH, VARIABLE, encode, speech

from lmspt_jax.data.audio_io import crop_mono, open_audio, read_audio, read_range, to_mono_at
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError


@pytest.fixture(scope='module')
def long_speech():
  return speech()


# ---------------------------------------------------------------- lying headers


def with_tag(data: bytes, factor: float) -> bytes:
  """An mp3 whose Xing tag counts `factor` times the frames there are."""
  place = data.index(b'Xing') + 8
  count = struct.unpack('>I', data[place:place + 4])[0]
  return data[:place] + struct.pack('>I', int(count * factor)) + data[place + 4:]


def without_tag(data: bytes) -> bytes:
  """An mp3 from its second frame on."""
  return data[data.index(data[:2], 100):]


def with_total(data: bytes, total: int) -> bytes:
  """A FLAC whose header counts `total` samples."""
  fields = int.from_bytes(data[18:26], 'big')
  return data[:18] + (fields >> 36 << 36 | total).to_bytes(8, 'big') + data[26:]


def with_size(data: bytes, size: int, riff: int | None = None) -> bytes:
  """A WAV whose data chunk says `size`, and whose RIFF chunk says `riff`."""
  place = data.index(b'data') + 4
  data = data[:place] + struct.pack('<I', size) + data[place + 4:]
  return data if riff is None else data[:4] + struct.pack('<I', riff) + data[8:]


def crop_of(data, start, length=16_000):
  with open_audio(data, name='x') as file:
    return read_range(file, start, start + length, name='x')


def test_mp3_that_promises_more_is_truncated_where_it_ends(long_speech):
  good = encode(long_speech, 24_000, 'MP3', **VARIABLE)
  audio = read_audio(good, name='x')[0]
  for data, end in ((with_tag(good, 3), len(audio)), (good[:len(good) // 2], len(audio) // 2)):
    with open_audio(data, name='x') as file:
      assert file.frames > 1.9 * end
    for start in (0, 100_000, int(0.9 * end) - 16_000):
      assert np.abs(crop_of(data, start) - audio[start:start + 16_000]).max() < 1e-6
    for start in (int(1.1 * end), int(1.9 * end) - 16_000):
      with pytest.raises(AudioError, match='cut short') as error:
        crop_of(data, start)
      assert error.value.reason == 'truncated'
    with pytest.raises(AudioError, match='cut short'):
      read_audio(data, name='x')
    with open_audio(data, name='x') as file, pytest.raises(AudioError, match='cut short'):
      crop_mono(file, 2 * (int(1.05 * end)), 1_000, 48_000, name='x')


def test_mp3_that_promises_less_is_as_long_as_it_says(long_speech):
  good = encode(long_speech, 24_000, 'MP3', **VARIABLE)
  audio = read_audio(good, name='x')[0]
  less = read_audio(with_tag(good, 1 / 3), name='x')[0]
  assert len(less) == pytest.approx(len(audio) / 3, abs=2_000) and np.abs(less - audio[:len(less)]).max() < 1e-6
  assert np.abs(crop_of(with_tag(good, 1 / 3), 200_000) - audio[200_000:216_000]).max() < 1e-6


@pytest.mark.parametrize(('rate', 'channels'), [(16_000, 1), (24_000, 1), (24_000, 2), (44_100, 1), (48_000, 2)])
def test_mp3_without_a_tag_has_its_frames_counted(long_speech, rate, channels):
  source = to_mono_at(long_speech, 16_000, rate)
  good = encode(np.repeat(source[:, None], channels, axis=1), rate, 'MP3', **VARIABLE)
  audio = read_audio(good, name='x')[0]
  data = without_tag(good)
  with soundfile.SoundFile(io.BytesIO(data)) as guess:
    assert abs(guess.frames - len(audio)) > 20_000  # what libsndfile makes of it
  found = read_audio(data, name='x')[0]
  assert 0 <= len(found) - len(audio) < 4_000
  lag = next(n for n in range(4_000) if np.allclose(found[n:n + 90_000], audio[:90_000], atol=1e-3))
  assert np.abs(found[lag:lag + len(audio)] - audio)[4_000:-4_000].max() < 1e-5
  for start in (0, len(found) // 2, len(found) - 16_000):
    assert np.abs(crop_of(data, start) - found[start:start + 16_000]).max() < 1e-6
  with open_audio(data[:len(data) // 2], name='x') as cut:  # promises nothing: is as long as it is
    assert len(read_range(cut, 0, 1 << 30, name='x')) == cut.frames == pytest.approx(len(audio) / 2, rel=0.2)


def test_mp3_between_tags_and_garbage(long_speech):
  good = encode(long_speech, 24_000, 'MP3', **VARIABLE)
  audio = read_audio(good, name='x')[0]
  size = 300_000
  picture = b'ID3\x04\0\0' + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(range(240)) * (size // 240)
  garbage = np.random.default_rng(0).bytes(5_000)
  for data in (picture + good, good + b'TAG' + bytes(125), good + garbage, good + bytes(9_000)):
    assert np.abs(read_audio(data, name='x')[0] - audio).max() < 1e-6
    assert np.abs(crop_of(data, 300_000) - audio[300_000:316_000]).max() < 1e-6
  plain = read_audio(without_tag(good), name='x')[0]
  for data in (picture + without_tag(good), without_tag(good) + b'TAG' + bytes(125), without_tag(good) + garbage,
               without_tag(good) + b'APETAGEX' + bytes(100_000)):
    assert np.abs(read_audio(data, name='x')[0] - plain).max() < 1e-6


def test_flac_with_another_length_in_its_header(long_speech):
  good = encode(long_speech, 16_000, 'FLAC')
  audio = read_audio(good, name='x')[0]
  assert np.array_equal(read_audio(with_total(good, 0), name='x')[0], audio)  # written to a pipe
  assert np.array_equal(crop_of(with_total(good, 0), 700_000), audio[700_000:716_000])
  assert np.array_equal(read_audio(with_total(good, 400_000), name='x')[0], audio[:400_000])
  for data, end in ((with_total(good, 3_000_000), len(audio)), (good[:len(good) // 2], 400_000)):
    assert np.array_equal(crop_of(data, 300_000), audio[300_000:316_000])
    for start in (end - 8_000, end + 100_000):
      with pytest.raises(AudioError, match='cut short') as error:
        crop_of(data, max(start, end + 80_000) if end < len(audio) else start)
      assert error.value.reason == 'truncated'
    with pytest.raises(AudioError, match='cut short'):
      read_audio(data, name='x')
  broken = good[:len(good) // 2] + bytes(3_000) + good[len(good) // 2 + 3_000:]
  with pytest.raises(AudioError, match='damaged') as error:
    read_audio(broken, name='x')
  assert error.value.reason == 'undecodable'
  assert np.array_equal(crop_of(broken, 900_000), audio[900_000:916_000])


@pytest.mark.parametrize('kind', ['WAV', 'WAVEX', 'RF64', 'AIFF'])
def test_wav_and_aiff_that_end_early_are_truncated(tmp_path, long_speech, kind):
  data = encode(long_speech, 16_000, kind, 'PCM_16')
  path = tmp_path / 'cut'
  for end in (len(data) // 2, len(data) - 2):
    path.write_bytes(data[:end])
    for source in (path, data[:end]):
      with pytest.raises(AudioError, match='bytes are not there') as error:
        open_audio(source, name='x')
      assert error.value.reason == 'truncated'
  assert len(read_audio(data + b'garbage' * 999, name='x')[0]) == len(long_speech)


def test_wav_written_to_a_pipe(long_speech):
  data = encode(long_speech, 16_000, 'WAV', 'PCM_16')
  audio = read_audio(data, name='x')[0]
  for size, riff in ((0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFFF), (0x80000000, 0)):
    assert np.array_equal(read_audio(with_size(data, size, riff), name='x')[0], audio)
    assert np.array_equal(crop_of(with_size(data, size, riff), 500_000), audio[500_000:516_000])
  with pytest.raises(AudioError, match='bytes are not there'):
    open_audio(with_size(data, len(data) * 2), name='x')
  with pytest.raises(AudioError, match='no samples'):
    open_audio(with_size(data, 0), name='x')  # the RIFF chunk has its length, so this one is meant
  assert np.array_equal(read_audio(with_size(data, 400_000), name='x')[0], audio[:200_000])


def test_ogg_cut_short_is_as_long_as_it_is(long_speech):
  good = encode(long_speech, 16_000, 'OGG', 'VORBIS')
  audio = read_audio(good, name='x')[0]
  cut = read_audio(good[:len(good) // 2], name='x')[0]
  assert 0.3 * len(audio) < len(cut) < 0.6 * len(audio) and np.array_equal(cut, audio[:len(cut)])
  assert np.array_equal(read_audio(good + b'garbage' * 99, name='x')[0], audio)


# ---------------------------------------------------------------- faults


def bad_files(folder):
  speech = SPEECH.read_bytes()
  (folder / 'text.wav').write_text('this is no audio at all')
  (folder / 'text.mp3').write_text('A text by the name of mp3, a few lines of it.\n' * 200)
  (folder / 'garbage.flac').write_bytes(np.random.default_rng(0).bytes(50_000))
  (folder / 'garbage.mp3').write_bytes(np.random.default_rng(1).bytes(50_000))
  (folder / 'syncs.mp3').write_bytes(b'\xff\xfb\x90\x00' + np.random.default_rng(2).bytes(50_000))
  for suffix in ('wav', 'flac', 'mp3', 'ogg', 'raw'):
    (folder / f'nothing.{suffix}').write_bytes(b'')
  (folder / 'headerless.raw').write_bytes(bytes(1000))
  (folder / 'header.flac').write_bytes(speech[:60])
  (folder / 'header.wav').write_bytes(encode(np.ones(100), 16_000, 'WAV')[:30])
  soundfile.write(folder / 'empty.wav', np.zeros(0), 16_000)
  soundfile.write(folder / 'nan.wav', np.array([0.1, np.nan]), 16_000, subtype='FLOAT')
  soundfile.write(folder / 'inf.wav', np.array([0.1, np.inf]), 16_000, subtype='DOUBLE')
  soundfile.write(folder / 'slow.wav', np.ones(10), 10)
  wav = encode(np.ones(100), 16_000, 'WAV')
  (folder / 'fast.wav').write_bytes(wav[:24] + struct.pack('<I', 3_000_000_000) + wav[28:])
  (folder / 'quick.wav').write_bytes(wav[:24] + struct.pack('<I', 2_000_000) + wav[28:])
  (folder / 'still.wav').write_bytes(wav[:24] + struct.pack('<I', 0) + wav[28:])
  (folder / 'wide.wav').write_bytes(wav[:22] + struct.pack('<H', 60_000) + wav[24:])
  (folder / 'crowd.wav').write_bytes(encode(np.ones((100, 100)), 16_000, 'WAV'))
  (folder / 'none.wav').write_bytes(wav[:22] + struct.pack('<H', 0) + wav[24:])
  (folder / 'cut.flac').write_bytes(speech[:30_000])
  (folder / 'promising.flac').write_bytes(with_total(speech, 200_000))
  (folder / 'endless.flac').write_bytes(with_total(speech, (1 << 36) - 1))
  (folder / 'folder.wav').mkdir()


@pytest.mark.parametrize(('name', 'reason', 'words'), [
  ('absent.wav', 'missing', 'no such file'), ('folder.wav', 'undecodable', 'is a directory'),
  ('text.wav', 'undecodable', 'not audio'), ('text.mp3', 'undecodable', 'not audio'),
  ('garbage.flac', 'undecodable', 'not audio'), ('garbage.mp3', 'undecodable', 'not audio'),
  ('syncs.mp3', 'undecodable', 'frames do not follow'),
  ('nothing.wav', 'empty', 'is empty'), ('nothing.flac', 'empty', 'is empty'),
  ('nothing.mp3', 'empty', 'is empty'), ('nothing.ogg', 'empty', 'is empty'), ('nothing.raw', 'empty', 'is empty'),
  ('headerless.raw', 'undecodable', 'not audio'), ('header.flac', 'undecodable', 'not audio'),
  ('header.wav', 'undecodable', 'not audio'), ('empty.wav', 'empty', 'no samples'),
  ('nan.wav', 'non-finite', 'NaN or infinite'), ('inf.wav', 'non-finite', 'NaN or infinite'),
  ('slow.wav', 'bad rate', '10 Hz'), ('quick.wav', 'bad rate', '2000000 Hz'),
  ('fast.wav', 'undecodable', 'not audio'), ('still.wav', 'undecodable', 'not audio'),
  ('wide.wav', 'undecodable', 'not audio'), ('crowd.wav', 'too large', '100 channels'),
  ('none.wav', 'undecodable', 'not audio'),
  ('cut.flac', 'truncated', 'cut short'), ('promising.flac', 'truncated', 'cut short, 82478 of 200000'),
  ('endless.flac', 'too large', 'at most')])
def test_faults_are_one_line(tmp_path, name, reason, words, capfd):
  bad_files(tmp_path)
  for source in (tmp_path / name, (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else None):
    if source is None:
      continue
    called = str(tmp_path / name)
    with pytest.raises(AudioError, match=words) as error:
      read_audio(source, name=called)
    assert isinstance(error.value, LmsptError) and '\n' not in str(error.value)
    assert str(error.value).startswith(called)
    assert error.value.reason == reason
  assert capfd.readouterr() == ('', '')
