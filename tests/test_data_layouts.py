"""librispeech:, vctk: and emilia: sources on miniature trees of real speech."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import soundfile
from _corpus_formats import samples_of, utterances

from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError

SPEECH = utterances(4)


def put(path: Path, content: bytes | str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


def rows(source) -> list[tuple]:
  names = ('id', 'text', 'language', 'speaker', 'split', 'license')
  return [tuple(source.index.labels(i)[name] for name in names) for i in range(len(source))]


def is_speech(source) -> bool:
  """Whether every utterance is one of the sample's, the one with its text if it has a text."""
  known = {utterance.text.lower(): utterance.load(16_000).tobytes() for utterance in SPEECH}
  return all(source[i].load(16_000).tobytes() in ([known[source[i].text.lower()]] if source[i].text else known.values())
             for i in range(len(source)))


def refused(uri: str, message: str) -> None:
  with pytest.raises(LmsptError, match=message) as error:
    open_source(uri)
  assert '\n' not in str(error.value)


def write_wav(path: Path, utterance) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, samples_of(utterance), 16_000)


# ---------------------------------------------------------------- LibriSpeech and LibriTTS


def write_librispeech(root: Path) -> Path:
  put(root / 'SPEAKERS.TXT', ';ID | SEX')
  for subset, speaker, chapter, found in [('dev-clean', 84, 121, SPEECH[:2]), ('train-clean-100', 103, 7, SPEECH[2:3]),
                                          ('train-clean-100', 1034, 8, SPEECH[3:])]:
    folder = root / subset / f'{speaker}' / f'{chapter}'
    lines = []
    for number, utterance in enumerate(found):
      put(folder / f'{speaker}-{chapter}-{number:04d}.flac', utterance.encoded())
      lines.append(f'{speaker}-{chapter}-{number:04d} {utterance.text.upper()}\n')
    put(folder / f'{speaker}-{chapter}.trans.txt', ''.join(lines))
  return root


def test_librispeech(tmp_path):
  root = write_librispeech(tmp_path / 'LibriSpeech')
  source = open_source(f'librispeech:{root}')
  assert rows(source) == [
    ('84-121-0000', SPEECH[0].text.upper(), 'en', '84', 'dev-clean', 'CC-BY-4.0'),
    ('84-121-0001', SPEECH[1].text.upper(), 'en', '84', 'dev-clean', 'CC-BY-4.0'),
    ('103-7-0000', SPEECH[2].text.upper(), 'en', '103', 'train-clean-100', 'CC-BY-4.0'),
    ('1034-8-0000', SPEECH[3].text.upper(), 'en', '1034', 'train-clean-100', 'CC-BY-4.0')]
  assert is_speech(source) and source.name(0) == source.shard(0) == 'dev-clean/84/121/84-121-0000.flac'
  assert len(open_source(f'librispeech:{tmp_path}', 'train-clean-100')) == 2  # the folder above
  subset = open_source(f'librispeech:{root / "dev-clean"}')
  assert rows(subset) == rows(source)[:2] and is_speech(subset)


def test_librispeech_with_a_recording_missing(tmp_path):
  root = write_librispeech(tmp_path)
  (root / 'dev-clean' / '84' / '121' / '84-121-0001.flac').unlink()
  source = open_source(f'librispeech:{root}', 'dev-clean')
  assert len(source) == 2
  with pytest.raises(AudioError, match=r'^dev-clean/84/121/84-121-0001\.flac: no such file') as error:
    source[1].open()
  assert error.value.reason == 'missing'


def test_libritts(tmp_path):
  folder = tmp_path / 'LibriTTS' / 'dev-clean' / '84' / '121'
  for number, utterance in enumerate(SPEECH):
    write_wav(folder / f'84_121_{number:06d}_000000.wav', utterance)
    put(folder / f'84_121_{number:06d}_000000.original.txt', 'Not this one.')
    if number:
      put(folder / f'84_121_{number:06d}_000000.normalized.txt', f'{utterance.text}\n')
  put(folder / '84_121.trans.tsv', 'x\ty')
  source = open_source(f'librispeech:{tmp_path / "LibriTTS"}')
  assert rows(source) == [
    (f'84_121_{number:06d}_000000', SPEECH[number].text if number else '', 'en', '84', 'dev-clean', 'CC-BY-4.0')
    for number in range(4)] and is_speech(source)


# ---------------------------------------------------------------- VCTK


def test_vctk(tmp_path):
  for number, utterance in enumerate(SPEECH):
    speaker = f'p22{number // 2}'
    key = f'{speaker}_{number:03d}'
    for microphone in ('mic1', 'mic2'):
      put(tmp_path / 'wav48_silence_trimmed' / speaker / f'{key}_{microphone}.flac', utterance.encoded())
    if number:
      put(tmp_path / 'txt' / speaker / f'{key}.txt', f' {utterance.text} \n')
  put(tmp_path / 'speaker-info.txt', 'ID AGE GENDER')
  source = open_source(f'vctk:{tmp_path}')
  assert sorted(rows(source)) == [
    (f'p22{number // 2}_{number:03d}', SPEECH[number].text if number else '', 'en', f'p22{number // 2}', split,
     'CC-BY-4.0') for number, split in enumerate(['train', *(utterance.split for utterance in SPEECH[1:])])]
  assert is_speech(source) and all(source.name(i).endswith('_mic1.flac') for i in range(4))


def test_older_vctk(tmp_path):
  for number, utterance in enumerate(SPEECH):
    write_wav(tmp_path / 'VCTK-Corpus' / 'wav48' / 'p225' / f'p225_{number:03d}.wav', utterance)
    put(tmp_path / 'VCTK-Corpus' / 'txt' / 'p225' / f'p225_{number:03d}.txt', utterance.text)
  source = open_source(f'vctk:{tmp_path}')
  assert sorted(source.index.table.column('text').to_pylist()) == sorted(utterance.text for utterance in SPEECH)
  assert [row[3] for row in rows(source)] == ['p225'] * 4 and is_speech(source)
  assert rows(open_source(f'vctk:{tmp_path / "VCTK-Corpus"}')) == rows(source)


# ---------------------------------------------------------------- Emilia


def emilia_object(number: int, **more) -> dict:
  return {'text': SPEECH[number].text, 'duration': 5.5, 'speaker': f'EN_B00000_S0000{number // 2}', 'language': 'en',
          'dnsmos': 3.25 + number, **more}


EMILIA = [('EN_B00000_S00000_W000000', 'EN_B00000_S00000'), ('EN_B00000_S00000_W000001', 'EN_B00000_S00000'),
          ('EN_B00000_S00001_W000002', 'EN_B00000_S00001'), ('EN_B00000_S00001_W000003', 'EN_B00000_S00001')]


def check_emilia(source) -> None:
  found = sorted(rows(source))
  assert [(row[0], row[1], row[2], row[3], row[5]) for row in found] == [
    (key, SPEECH[number].text, 'en', speaker, 'CC-BY-NC-4.0') for number, (key, speaker) in enumerate(EMILIA)]
  assert source.index.number_columns == ['seconds', 'dnsmos'] and set(source.index.numbers('seconds')) == {5.5}
  assert sorted(source.index.numbers('dnsmos')) == [3.25, 4.25, 5.25, 6.25]
  for position in range(4):
    audio, original = source[position].load(16_000), SPEECH[int(source[position].id[-1])].load(16_000)
    assert math.isclose(len(audio), len(original), rel_tol=0.05) and abs(audio).max() > 0.1


def test_emilia_pairs(tmp_path):
  for number, (key, _) in enumerate(EMILIA):
    folder = tmp_path / 'EN' / f'EN-B{number // 2:06d}'
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f'{key}.mp3', samples_of(SPEECH[number]), 16_000)
    put(folder / f'{key}.json', json.dumps(emilia_object(number, _id=key, wav='a/path/of/old.mp3', phone_count=31)
                                           if number else emilia_object(number)))
  source = open_source(f'emilia:{tmp_path}')
  assert source.index.number_columns == ['seconds', 'dnsmos', 'phone_count']
  source.index.table = source.index.table.drop_columns('phone_count')
  check_emilia(source)


def test_emilia_by_jsonl(tmp_path):
  lines = []
  for number, (key, speaker) in enumerate(EMILIA):
    path = f'EN_B00000/{speaker}/mp3/{key}.mp3'
    (tmp_path / 'EN' / path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(tmp_path / 'EN' / path, samples_of(SPEECH[number]), 16_000)
    lines.append(json.dumps(emilia_object(number, id=key, wav=path)) + '\n')
  put(tmp_path / 'EN' / 'EN_B00000.jsonl', ''.join(lines))
  check_emilia(open_source(f'emilia:{tmp_path}'))
  assert open_source(f'emilia:{tmp_path / "EN"}').name(0).startswith('EN_B00000/')


@pytest.mark.parametrize(('line', 'message'), [
  ('{"wav": "../outside.mp3"}', r"EN/b\.jsonl:2: wav = '\.\./outside\.mp3': must be a path under the folder"),
  ('{"wav": "/etc/hosts"}', 'must be a path under'), ('{"wav": 3}', 'wav = 3: must be a path'),
  ('{"text": "none"}', 'wav = None: must be a path'), ('{"wav":', r'EN/b\.jsonl:2: not JSON'),
  ('[1]', 'must be a JSON object'), ('{"wav": "a.mp3", "language": 1.5}', r'EN/b\.jsonl:2: language = 1\.5'),
  ('{"wav": "a.mp3", "id": "first"}', r"first' is used 2 times; ids must differ")])
def test_bad_lines_of_emilia_are_named(tmp_path, line, message):
  put(tmp_path / 'EN' / 'b.jsonl', f'{{"wav": "a.mp3", "id": "first"}}\n{line}\n')
  refused(f'emilia:{tmp_path}', message)


# ---------------------------------------------------------------- what is none of them


@pytest.mark.parametrize(('kind', 'wanted'), [
  ('librispeech', r'looked for SPEAKER/CHAPTER/\*\.trans\.txt or SPEAKER/CHAPTER/\*\.normalized\.txt'),
  ('vctk', r'looked for wav48_silence_trimmed/SPEAKER/\*_mic1\.flac or wav48/SPEAKER/\*\.wav'),
  ('emilia', r'looked for NAME\.mp3 beside NAME\.json, or \*\.jsonl with "wav"; its tars are webdataset:PATTERN')])
def test_other_folders_are_refused_in_one_line(tmp_path, kind, wanted):
  put(tmp_path / 'audio' / 'a.flac', SPEECH[0].encoded())
  refused(f'{kind}:{tmp_path}', f'not the layout of that corpus; {wanted}')
  refused(f'{kind}:{tmp_path}/absent', r'no folder .*absent.*; check the path')
  refused(f'{kind}:s3://bucket/corpus', 'is read from a local disk only; copy it, or run "lmspt prepare" where it is')


def test_texts_that_are_not_utf8_are_named(tmp_path):
  write_librispeech(tmp_path)
  put(tmp_path / 'dev-clean' / '84' / '121' / '84-121.trans.txt', b'84-121-0000 GR\xdc\xdfE')
  refused(f'librispeech:{tmp_path}', r"dev-clean/84/121/84-121\.trans\.txt: can't be read .*; it must be UTF-8 text")
