"""`prepare` (deterministic, resumable, honest about faults), manifests, and the record format."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

import msgpack
import numpy as np
import pytest
import soundfile

from lmspt_jax.cli import prepare as prepare_command
from lmspt_jax.data import prepare as prepare_module
from lmspt_jax.data.dataset_info import load_info
from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.records import Record, RecordError, pack, unpack
from lmspt_jax.data.sources import ASSETS, open_source
from lmspt_jax.errors import LmsptError

SAMPLE = ASSETS / 'speech_sample'


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def small_folder(folder, count=12, manifest=True):
  """The first utterances of the sample, two of them as wav."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()[:count]]
  (folder / 'audio').mkdir(parents=True)
  for number, row in enumerate(rows):
    if number in (3, 5):
      audio, rate = soundfile.read(SAMPLE / row['path'], dtype='int16')
      row['path'] = row['path'].replace('.flac', '.wav')
      soundfile.write(folder / row['path'], audio, rate)
    else:
      shutil.copy(SAMPLE / row['path'], folder / row['path'])
    row['split'] = 'test' if number % 4 == 0 else 'train'
  if manifest:
    write_manifest(folder, rows)
  return rows


def write_manifest(folder, rows):
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


# ---------------------------------------------------------------- prepare


def test_same_bytes_for_any_workers_and_reruns(tmp_path):
  source = 'package:speech_sample'
  info = prepare(source, tmp_path / 'a', num_shards=4, num_workers=1, progress=False)
  prepare(source, tmp_path / 'b', num_shards=4, num_workers=5, progress=False)
  first = files(tmp_path / 'a')
  assert first == files(tmp_path / 'b')
  prepare(source, tmp_path / 'a', num_shards=4, progress=False)
  assert files(tmp_path / 'a') == first
  assert load_info(tmp_path / 'a') == info
  prepare(source, tmp_path / 'b', num_shards=1, progress=False)  # the shards of the earlier cut go
  assert sorted(name for name in files(tmp_path / 'b') if name.endswith('.arrayrecord')) == [
    'train-00000-of-00001.arrayrecord', 'valid-00000-of-00001.arrayrecord']


def test_a_killed_run_is_finished_by_the_next(tmp_path, monkeypatch):
  small_folder(tmp_path / 'in')
  source = f'folder:{tmp_path / "in"}'
  prepare(source, tmp_path / 'whole', num_shards=3, progress=False)
  made = []
  original = prepare_module.to_record

  def dies_after(limit):
    def to_record(utterance):
      if len(made) == limit:
        raise KeyboardInterrupt
      made.append(utterance.id)
      return original(utterance)
    return to_record

  monkeypatch.setattr(prepare_module, 'to_record', dies_after(8))
  with pytest.raises(KeyboardInterrupt):
    prepare(source, tmp_path / 'half', num_shards=3, num_workers=1, progress=False)
  assert not (tmp_path / 'half' / 'dataset.json').exists()
  kept = [path for path in (tmp_path / 'half').glob('*.arrayrecord')]
  assert 0 < len(kept) < 6
  times = {path: path.stat().st_mtime_ns for path in kept}
  monkeypatch.setattr(prepare_module, 'to_record', dies_after(-1))
  made.clear()
  prepare(source, tmp_path / 'half', num_shards=3, num_workers=1, progress=False)
  assert files(tmp_path / 'half') == files(tmp_path / 'whole')
  assert {path: path.stat().st_mtime_ns for path in kept} == times and 0 < len(made) < 12
  # A shard that was damaged since, and a file that was edited, are made again.
  kept[0].write_bytes(b'x' * kept[0].stat().st_size)
  prepare(source, tmp_path / 'half', num_shards=3, progress=False)
  assert files(tmp_path / 'half') == files(tmp_path / 'whole')


def test_shards_hold_what_the_folder_holds(tmp_path):
  rows = small_folder(tmp_path / 'in')
  (tmp_path / 'in' / 'LICENSE.txt').write_text('terms')
  (tmp_path / 'in' / 'ATTRIBUTION.md').write_text('names')
  info = prepare(f'folder:{tmp_path / "in"}', tmp_path / 'out', num_shards=2, progress=False)
  assert {name: total['utterances'] for name, total in info.splits.items()} == {'test': 3, 'train': 9}
  assert (info.utterances, info.num_faults, info.sample_rates) == (12, 0, {'16000': 12})
  assert info.hours == pytest.approx(sum(row['seconds'] for row in rows) / 3600, rel=1e-3)
  assert info.licenses['CC-BY-SA-3.0']['utterances'] == 12 and info.languages['en']['utterances'] == 12
  assert (tmp_path / 'out' / 'LICENSE.txt').read_text() == 'terms' and (tmp_path / 'out' / 'ATTRIBUTION.md').is_file()
  for split in ('', 'test', 'train'):
    folder = open_source(f'folder:{tmp_path / "in"}', split)
    shards = open_source(f'arrayrecord:{tmp_path / "out"}', split)
    assert len(folder) == len(shards)
    for index in range(len(folder)):
      a, b = folder[index], shards[index]
      assert dataclasses.replace(a, name='', content=b'') == dataclasses.replace(b, name='', content=b'')
      assert b.open().format == 'FLAC'
      assert np.array_equal(a.decode()[0], b.decode()[0]) and a.decode()[1] == b.decode()[1]
  again = prepare(f'arrayrecord:{tmp_path / "out"}', tmp_path / 'again', num_shards=2, progress=False)
  assert again.shards == info.shards


def test_faults_are_skipped_and_counted_by_reason(tmp_path, capsys):
  folder = tmp_path / 'in'
  rows = small_folder(folder)
  audio = folder / 'audio'
  soundfile.write(audio / 'silent.wav', np.zeros(8000), 16_000)
  soundfile.write(audio / 'empty.wav', np.zeros(0), 16_000)
  soundfile.write(audio / 'nan.wav', np.array([0.1, np.nan, 0.2]), 16_000, subtype='FLOAT')
  (audio / 'text.flac').write_text('this is no audio')
  whole = (SAMPLE / rows[0]['path']).read_bytes()
  (audio / 'cut.flac').write_bytes(whole[:len(whole) // 2])
  bad = ['silent.wav', 'empty.wav', 'nan.wav', 'text.flac', 'cut.flac', 'absent.wav']
  write_manifest(folder, [*rows, *({'path': f'audio/{name}', 'split': 'train'} for name in bad)])
  parser = argparse.ArgumentParser()
  prepare_command.add_arguments(parser)
  assert prepare_command.run(parser.parse_args(['--source', f'folder:{folder}', '--out', str(tmp_path / 'out')])) == 0
  assert 'left out, silent: 1 (e.g. audio/silent.wav)' in capsys.readouterr().out
  info = load_info(tmp_path / 'out')
  assert info.utterances == 12 and info.num_faults == 6
  found = {name: reason for reason, entry in info.faults.items() for name in entry['names']}
  assert found.pop('audio/cut.flac') in ('truncated', 'undecodable')
  assert found == {'audio/silent.wav': 'silent', 'audio/empty.wav': 'empty', 'audio/nan.wav': 'non-finite',
                   'audio/text.flac': 'undecodable', 'audio/absent.wav': 'missing'}


def test_prepare_refuses_in_one_line(tmp_path):
  silent = tmp_path / 'silent'
  silent.mkdir()
  soundfile.write(silent / 'a.wav', np.zeros(8000), 16_000)
  (tmp_path / 'file').write_text('')
  cases = [
    (f'folder:{silent}', 'out', {}, r'none of its 1 utterances can be used; silent: 1 \(e\.g\. a\.wav\)'),
    ('package:speech_sample', 'file/out', {}, "file/out.*can't be written"),
    ('package:speech_sample', 'out', {'num_shards': 0}, 'num_shards = 0'),
    (f'folder:{silent}', 'silent', {}, 'is where the source is'),
    (f'folder:{tmp_path / "absent"}', 'out', {}, 'no folder'),
    ('floder:x', 'out', {}, "unknown kind 'floder', did you mean 'folder'"),
    ('tfds:librispeech', 'out', {}, 'known: arrayrecord, folder, package'),
  ]
  for source, out, options, message in cases:
    with pytest.raises(LmsptError, match=message) as error:
      prepare(source, tmp_path / out, progress=False, **options)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- manifests and records


@pytest.mark.parametrize(('line', 'message'), [
  ('{"path": "../outside.wav"}', r"manifest\.jsonl:2: path = '\.\./outside\.wav': must be relative"),
  ('{"path": "/etc/hosts"}', 'must be relative'),
  ('{"path": ""}', 'must be relative'),
  ('{"path": 3}', 'path = 3: must be text'),
  ('[1]', 'must be one JSON object'),
  ('{"path":', 'not JSON'),
  ('{"path": "a.wav", "id": "first"}', "id 'first' was used before"),
  ('{"path": "a.wav", "split": "train"}', r'manifest\.jsonl:1: no split, where other lines have one'),
  ('{"path": "a.wav", "split": "../x"}', 'use up to 64 letters'),
])
def test_bad_manifests_name_the_line(tmp_path, line, message):
  (tmp_path / 'manifest.jsonl').write_text('{"path": "first.wav", "id": "first"}\n' + line + '\n')
  with pytest.raises(LmsptError, match=message):
    open_source(f'folder:{tmp_path}')


def test_folder_without_manifest(tmp_path):
  small_folder(tmp_path, manifest=False)
  source = open_source(f'folder:{tmp_path}')
  keys = [(source[i].split, source[i].id) for i in range(len(source))]
  assert len(source) == 12 and keys == sorted(keys)
  assert 'audio/asterisk-conf-invalid' in [key[1] for key in keys]
  shutil.copy(tmp_path / source.name(0), tmp_path / source[0].id.__add__('.ogg'))
  with pytest.raises(LmsptError, match='have the same id'):
    open_source(f'folder:{tmp_path}')
  with pytest.raises(LmsptError, match='no utterances; it needs wav'):
    (tmp_path / 'none').mkdir()
    open_source(f'folder:{tmp_path / "none"}')


def test_bad_dataset_json_is_named(tmp_path):
  prepare('package:speech_sample', tmp_path, progress=False)
  path = tmp_path / 'dataset.json'
  content = json.loads(path.read_text())
  content['shards'][0]['name'] = '../../train-00000-of-00001.arrayrecord'
  for text, message in [(json.dumps(content), 'bad name or size'), ('{', "can't be read as JSON"),
                        ('{}', 'not written by'), ('{"format": "lmspt-dataset", "version": 1}', 'fields are missing')]:
    path.write_text(text)
    with pytest.raises(LmsptError, match=message):
      open_source(f'arrayrecord:{tmp_path}')


def test_records_round_trip_and_limits():
  record = Record('a', b'fLaC', 16_000, 10, text='Grüße', language='de', speaker='s', license='CC0')
  data = pack(record)
  assert unpack(data, name='x') == record
  fields = msgpack.unpackb(data)
  damaged = [data[:-3], b'', b'\xc1', data + b'x', msgpack.packb([1]), msgpack.packb(fields | {'num_samples': -1}),
             msgpack.packb(fields | {'sample_rate': 1}), msgpack.packb(fields | {'audio': 'text'}),
             msgpack.packb(fields | {'audio': b''}), msgpack.packb(fields | {'text': 'x' * (2 << 20)}),
             msgpack.packb(fields | {'id': ''}), msgpack.packb({k: v for k, v in fields.items() if k != 'id'}),
             b'\xc6\xff\xff\xff\xff' + data, b'\x91' * 10_000 + b'\x90']
  for bad in damaged:
    with pytest.raises(RecordError, match=r'^shard:7: '):
      unpack(bad, name='shard:7')
