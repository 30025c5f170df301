"""What `prepare` does to audio: long recordings cut at pauses, resampling, channels."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
from _small_corpus import SAMPLE

from lmspt_jax.data.audio_io import load_mono, to_mono_at
from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError

RATE = 16_000


def speech(count: int) -> list[np.ndarray]:
  """int16 [N] each: the first utterances of the sample."""
  paths = [json.loads(line)['path'] for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()[:count]]
  return [soundfile.read(SAMPLE / path, dtype='int16')[0] for path in paths]


def prepared(folder, out, **options):
  return prepare(f'folder:{folder}', out, num_workers=1, progress=False, **options), open_source(f'arrayrecord:{out}')


def pieces(source, key):
  """The audio of ID/0000, ID/0001, ... as int16 [N, channels], in that order."""
  found = {source[index].id: source[index] for index in range(len(source))}
  names = sorted(name for name in found if name.startswith(f'{key}/'))
  assert names == [f'{key}/{number:04d}' for number in range(len(names))]
  assert all(found[name].text == '' and found[name].speaker == 'someone' for name in names)
  return [np.rint(found[name].decode()[0] * 32768).astype(np.int16) for name in names]


def write_long(folder, audio, name='talk.wav', rate=RATE, **options):
  folder.mkdir()
  soundfile.write(folder / name, audio, rate, **options)
  row = {'id': 'talk', 'path': name, 'text': 'all that is said', 'speaker': 'someone', 'split': 'train'}
  (folder / 'manifest.jsonl').write_text(json.dumps(row) + '\n')


@pytest.mark.parametrize('channels', [1, 2])
@pytest.mark.parametrize('room', ['silent', 'humming', 'gated'])
def test_long_recordings_are_cut_in_their_pauses(tmp_path, channels, room):
  """Utterances with pauses of 1 s between them, longer than any inside them, each piece 20 s at most."""
  pause, parts, pauses, position = np.zeros(RATE, np.int16), [], [], 0
  for utterance in speech(24):
    if room == 'gated':  # each has a gap in it, shorter than the pauses, but dead silent as they are not
      utterance = np.concatenate([utterance[:RATE], np.zeros(int(0.8 * RATE), np.int16), utterance[RATE:]])
    parts += [utterance, pause]
    pauses.append((position + len(utterance), position + len(utterance) + len(pause)))
    position += len(utterance) + len(pause)
  audio = np.concatenate(parts)
  hum = np.rint(12 * np.sin(2 * np.pi * 50 / RATE * np.arange(len(audio)))).astype(np.int16)  # at -72 dBFS
  for start, stop in {'silent': [], 'humming': [(0, len(audio))], 'gated': pauses}[room]:
    audio[start:stop] += hum[start:stop]
  audio = np.repeat(audio[:, None], channels, axis=1)
  write_long(tmp_path / 'in', audio)
  info, source = prepared(tmp_path / 'in', tmp_path / 'out', max_seconds=20)
  found = pieces(source, 'talk')
  assert np.array_equal(np.concatenate(found), audio)  # no sample is lost
  assert len(found) >= len(audio) / RATE / 20 and all(5 * RATE <= len(piece) <= 20 * RATE for piece in found)
  for cut in np.cumsum([len(piece) for piece in found])[:-1]:
    assert any(start <= cut <= stop for start, stop in pauses), f'cut at {cut / RATE} s'
  assert info.hours == pytest.approx(len(audio) / RATE / 3600, abs=1e-6)
  whole, source = prepared(tmp_path / 'in', tmp_path / 'whole', max_seconds=1000)
  assert source[0].id == 'talk' and source[0].text == 'all that is said' and whole.utterances == 1


def test_without_pauses_the_quietest_moment_is_cut(tmp_path):
  audio = np.concatenate(speech(12)).astype(np.float32) / 32768
  loud = audio.reshape(-1)[:len(audio) // 800 * 800].reshape(-1, 800)
  loud = loud[np.sqrt((loud ** 2).mean(axis=1)) > 0.05].reshape(-1)
  dip = 15 * RATE  # the one moment of 0.1 s that is a little quieter, within the second half of the first 20 s
  loud[dip:dip + RATE // 10] *= 0.3
  write_long(tmp_path / 'in', loud[:26 * RATE])
  _, source = prepared(tmp_path / 'in', tmp_path / 'out', max_seconds=20)
  first, second = pieces(source, 'talk')
  assert len(first) + len(second) == len(loud[:26 * RATE])
  assert dip - RATE // 20 <= len(first) <= dip + RATE // 10 + RATE // 20


def test_a_long_recording_in_any_format_and_blocks(tmp_path):
  """An hour would be read in blocks; here the same minutes as FLAC, mp3 and resampled wav give as much audio."""
  audio = np.concatenate(speech(40))
  for name, rate, options in [('talk.flac', RATE, {}), ('talk.mp3', RATE, {}), ('talk.wav', 44_100, {})]:
    sound = to_mono_at(audio / np.float32(32768), RATE, rate)
    write_long(tmp_path / name, sound, name, rate, **options)
    info, source = prepared(tmp_path / name, tmp_path / f'out-{name}', max_seconds=30, sample_rate=RATE)
    found = pieces(source, 'talk')
    assert max(map(len, found)) <= 30 * RATE and info.sample_rates == {'16000': len(found)}
    assert sum(map(len, found)) == len(load_mono(tmp_path / name / name, RATE))


def test_a_fault_late_in_a_long_recording_takes_all_of_it(tmp_path, monkeypatch):
  audio = np.concatenate(speech(24)).astype(np.float32) / 32768
  write_long(tmp_path / 'in', audio, subtype='FLOAT')
  soundfile.write(tmp_path / 'in' / 'good.wav', audio[:2 * RATE], RATE)
  late = np.tile(audio, 4)  # longer than what is decoded at a time: pieces of it are there when the fault is met
  late[-5] = np.nan
  soundfile.write(tmp_path / 'in' / 'late.wav', late, RATE, subtype='FLOAT')
  silence = np.concatenate([audio[:12 * RATE], np.zeros(40 * RATE, np.float32), audio[:12 * RATE]])
  soundfile.write(tmp_path / 'in' / 'silence.wav', silence, RATE)
  soundfile.write(tmp_path / 'in' / 'silent.wav', 0 * silence, RATE)
  with open(tmp_path / 'in' / 'manifest.jsonl', 'a') as file:
    for name in ('good', 'late', 'silence', 'silent'):
      file.write(json.dumps({'path': f'{name}.wav', 'split': 'train'}) + '\n')
  (tmp_path / 'out' / 'train-00000-of-00001.arrayrecord').mkdir(parents=True)  # the shard can't be written
  with pytest.raises(LmsptError, match='can\'t be written'):
    prepared(tmp_path / 'in', tmp_path / 'out', max_seconds=10)
  (tmp_path / 'out' / 'train-00000-of-00001.arrayrecord').rmdir()
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out' / '.prepare' / 'parts').iterdir()}
  monkeypatch.setattr(shutil, 'rmtree', lambda path: None)
  info, source = prepared(tmp_path / 'in', tmp_path / 'out', max_seconds=10)
  assert {path: path.stat().st_mtime_ns for path in times} == times  # parts with a fault are whole parts too
  ids = {source[index].id for index in range(len(source))}
  assert len(pieces(source, 'talk')) > 5 and 'good' in ids
  assert not any(key.startswith(('late', 'silent')) for key in ids)
  assert info.faults['non-finite']['names'] == ['late.wav']
  silent = info.faults['silent']['names']  # a piece of silence is left out, what is around it is not
  assert silent[-1] == 'silent.wav' and len(silent) > 2
  assert all(name.startswith('silence.wav/') and name.replace('.wav', '') not in ids for name in silent[:-1])
  assert any(key.startswith('silence/') for key in ids)


def test_ids_of_pieces_never_meet_ids_of_recordings(tmp_path):
  write_long(tmp_path / 'in', np.concatenate(speech(10)))
  soundfile.write(tmp_path / 'in' / 'short.wav', speech(1)[0], RATE)
  with open(tmp_path / 'in' / 'manifest.jsonl', 'a') as file:
    file.write(json.dumps({'id': 'talk/0001', 'path': 'short.wav', 'split': 'train'}) + '\n')
  with pytest.raises(LmsptError, match="id 'talk/0001' is used twice, by a recording and by a piece"):
    prepared(tmp_path / 'in', tmp_path / 'out', max_seconds=10)


def test_resampling_and_channels(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  sound = speech(1)[0]
  rates = {'a.wav': 8_000, 'b.flac': 24_000, 'c.wav': 48_000, 'd.flac': RATE}
  for name, rate in rates.items():
    audio = to_mono_at(sound / np.float32(32768), RATE, rate)
    options = {'compression_level': 0} if name == 'b.flac' else {}  # other bytes than encoding it again would give
    soundfile.write(folder / name, audio, rate, **options)
  soundfile.write(folder / 'eight.wav', np.repeat(sound[:, None], 8, axis=1), RATE)
  gains = np.linspace(0.1, 1, 12)
  soundfile.write(folder / 'twelve.wav', sound[:, None] / 32768 * gains, RATE, subtype='FLOAT')
  info, source = prepared(folder, tmp_path / 'out', sample_rate=24_000)
  assert info.sample_rates == {'24000': 6}
  found = {source[index].id: source[index] for index in range(len(source))}
  for name, rate in rates.items():
    audio, new_rate = found[name[0]].decode()
    expected = load_mono(folder / name, 24_000)
    assert (new_rate, len(audio)) == (24_000, -(-soundfile.info(folder / name).frames * 24_000 // rate))
    assert np.abs(audio[:, 0] - expected).max() < 1e-4  # the step of 16 bits is 3e-5
  assert found['b'].encoded() == (folder / 'b.flac').read_bytes()  # needs no change
  _, source = prepared(folder, tmp_path / 'kept')
  found = {source[index].id: source[index].decode() for index in range(len(source))}
  assert found['eight'][0].shape == (len(sound), 8) and found['twelve'][0].shape == (len(sound), 1)
  assert np.abs(found['twelve'][0][:, 0] - sound / 32768 * gains.mean()).max() < 1e-6  # 24 bits, as it was float
  assert {key: rate for key, (_, rate) in found.items()} == {
    'a': 8_000, 'b': 24_000, 'c': 48_000, 'd': RATE, 'eight': RATE, 'twelve': RATE}
