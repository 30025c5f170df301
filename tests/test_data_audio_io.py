"""Audio files in (formats, rates, channels, faults) and out."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from lmspt_jax.data.audio_io import AudioError, crop_mono, load_mono, open_audio, read_audio, to_mono_at, write_wav
from lmspt_jax.data.sources import ASSETS
from lmspt_jax.errors import LmsptError

SPEECH = ASSETS / 'speech_sample' / 'audio' / 'asterisk-agent-incorrect.flac'


@pytest.mark.parametrize(('suffix', 'channels', 'rate', 'least'), [
  ('wav', 8, 8_000, 0.999), ('flac', 8, 8_000, 0.999), ('ogg', 8, 8_000, 0.9), ('mp3', 2, 8_000, 0.9),
  ('mp3', 1, 44_100, 0.99), ('ogg', 2, 48_000, 0.9), ('wav', 1, 22_050, 0.999)])
def test_formats_rates_and_channels(tmp_path, suffix, channels, rate, least):
  speech, _ = soundfile.read(SPEECH, dtype='float32')
  path = tmp_path / f'speech.{suffix}'
  source = to_mono_at(speech, 16_000, rate)
  soundfile.write(path, np.repeat(source[:, None], channels, axis=1), rate)
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
  with open_audio(path, name='speech') as file:  # the middle alone equals the middle of everything
    assert np.abs(crop_mono(file, 9_001, 8_000, 16_000, name='speech') - loaded[9_001:17_001]).max() < 1e-5


def test_resampled_length_is_exact():
  for length in (1, 7, 999, 16_000):
    for a, b in ((16_000, 24_000), (44_100, 16_000), (48_000, 16_000), (16_000, 16_000), (8_000, 22_050)):
      assert len(to_mono_at(np.ones(length, np.float32), a, b)) == -(-length * b // a)
  tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
  expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
  assert np.abs(to_mono_at(tone, 44_100, 16_000) - expected)[200:-200].max() < 1e-4
  assert np.allclose(to_mono_at(np.array([[1.0, 0.0], [0.5, -0.5]]), 16_000, 16_000), [0.5, 0.0])


def bad_files(folder):
  (folder / 'text.wav').write_text('this is no audio at all')
  (folder / 'nothing.wav').write_bytes(b'')
  (folder / 'headerless.raw').write_bytes(bytes(1000))
  soundfile.write(folder / 'empty.wav', np.zeros(0), 16_000)
  soundfile.write(folder / 'nan.wav', np.array([0.1, np.nan]), 16_000, subtype='FLOAT')
  soundfile.write(folder / 'inf.wav', np.array([0.1, np.inf]), 16_000, subtype='DOUBLE')
  soundfile.write(folder / 'slow.wav', np.ones(10), 10)
  (folder / 'cut.flac').write_bytes(SPEECH.read_bytes()[:30_000])
  promising = bytearray(SPEECH.read_bytes())
  promising[22:26] = (200_000).to_bytes(4, 'big')  # samples, by its header
  (folder / 'promising.flac').write_bytes(promising)
  (folder / 'folder.wav').mkdir()


@pytest.mark.parametrize(('name', 'reason', 'words'), [
  ('absent.wav', 'missing', 'no such file'), ('folder.wav', 'undecodable', 'is a directory'),
  ('text.wav', 'undecodable', 'not audio'), ('nothing.wav', 'empty', 'is empty'),
  ('headerless.raw', 'undecodable', 'not audio'), ('empty.wav', 'empty', 'no samples'),
  ('nan.wav', 'non-finite', 'NaN or infinite'), ('inf.wav', 'non-finite', 'NaN or infinite'),
  ('slow.wav', 'bad rate', '10 Hz'), ('cut.flac', 'undecodable', 'damaged'),
  ('promising.flac', 'undecodable', 'damaged')])
def test_faults_are_one_line(tmp_path, name, reason, words):
  bad_files(tmp_path)
  with pytest.raises(AudioError, match=words) as error:
    load_mono(tmp_path / name, 16_000)
  assert isinstance(error.value, LmsptError) and '\n' not in str(error.value)
  assert str(error.value).startswith(str(tmp_path / name))
  assert error.value.reason == reason


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
