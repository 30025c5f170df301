"""`prepare` (deterministic, resumable, honest about faults), manifests, and the record format."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree

import msgpack
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from _small_corpus import SAMPLE, children, files, signalled_prepare, small_folder, write_manifest

from lmspt_jax.cli import prepare as prepare_command
from lmspt_jax.data.dataset_info import load_info
from lmspt_jax.data.prepare import parts, prepare
from lmspt_jax.data.records import Record, RecordError, pack, unpack
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError

SPEECH = 'package:speech_sample'


# ---------------------------------------------------------------- the same bytes, whatever happens


def test_same_bytes_for_any_workers_and_reruns(tmp_path):
  info = prepare(SPEECH, tmp_path / 'a', num_shards=4, num_workers=1, progress=False)
  prepare(SPEECH, tmp_path / 'b', num_shards=4, num_workers=2, progress=False)
  first = files(tmp_path / 'a')
  assert {'dataset.json', 'index.parquet', 'durations.svg', '.prepare/done.json'} < first.keys()
  assert first == files(tmp_path / 'b')
  assert [len(shard.sha256) for shard in info.shards] == 8 * [64]
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').iterdir() if path.is_file()}
  assert prepare(SPEECH, tmp_path / 'a', num_shards=4, progress=False) == info == load_info(tmp_path / 'a')
  assert {path: path.stat().st_mtime_ns for path in times} == times  # all was there
  (tmp_path / 'b' / 'other-00000-of-00001.arrayrecord').write_text('not ours')
  prepare(SPEECH, tmp_path / 'b', num_shards=1, num_workers=1, progress=False)  # the shards of the earlier cut go
  assert sorted(name for name in files(tmp_path / 'b') if name.endswith('.arrayrecord')) == [
    'other-00000-of-00001.arrayrecord', 'train-00000-of-00001.arrayrecord', 'valid-00000-of-00001.arrayrecord']


def test_shards_are_cut_to_a_size(tmp_path):
  info = prepare(SPEECH, tmp_path, shard_mb=1, num_workers=1, progress=False)
  sizes = collections.defaultdict(list)
  for shard in info.shards:
    sizes[shard.split].append(shard.bytes / 2 ** 20)
  assert len(sizes['train']) > 3 and all(0.6 < size < 1.6 for size in sizes['train'])
  order = [unpack_all(tmp_path, shard.name) for shard in info.shards if shard.split == 'train']
  ids = [record.id for shard in order for record in shard]
  assert ids != sorted(ids) and len(set(ids)) == 54  # shuffled, each once
  whole = prepare(SPEECH, tmp_path, num_shards=1, num_workers=1, progress=False)
  assert [record.id for record in unpack_all(tmp_path, whole.shards[0].name)] == ids  # in the same order


def unpack_all(folder, name):
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(str(folder / name))
  return [unpack(data, name=name) for data in reader.read_all()]


@pytest.mark.parametrize(('after', 'count', 'workers'), [('parts/*.arrow', 9, 2), ('shards/*.arrow', 5, 1)])
def test_a_killed_run_is_finished_by_the_next(tmp_path, monkeypatch, after, count, workers):
  prepare(SPEECH, tmp_path / 'whole', num_shards=25, num_workers=1, sample_rate=22_050, progress=False)
  status, _ = signalled_prepare(tmp_path / 'half', f'--source={SPEECH}', '--num_shards=25', '--sample_rate=22050',
                              '--runner=local', f'--num_workers={workers}', after=after, count=count,
                              how=signal.SIGKILL)
  assert status == -signal.SIGKILL and not (tmp_path / 'half' / 'dataset.json').exists()
  with pytest.raises(LmsptError, match='no such file'):
    open_source(f'arrayrecord:{tmp_path / "half"}')
  state = tmp_path / 'half' / '.prepare'
  kept = {path: path.stat().st_mtime_ns for path in (tmp_path / 'half').glob('*.arrayrecord')
          if (state / 'shards' / f'{path.name}.arrow').exists()}
  num_parts = len(list((state / 'parts').glob('[0-9]*.arrow')))
  assert 0 < num_parts < 64 if after.startswith('parts') else 0 < len(kept) < 35
  made = []
  original = parts.to_records

  def to_records(utterance, **options):
    made.append(utterance.id)
    return original(utterance, **options)
  monkeypatch.setattr(parts, 'to_records', to_records)
  prepare(SPEECH, tmp_path / 'half', num_shards=25, num_workers=1, sample_rate=22_050, progress=False)
  assert len(made) == len(set(made)) == 64 - num_parts  # a part is one utterance here
  assert {path: path.stat().st_mtime_ns for path in kept} == kept
  assert files(tmp_path / 'half') == files(tmp_path / 'whole')


def test_interrupted_from_the_keyboard(tmp_path):
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', '--runner=local', '--num_workers=2',
                                   '--sample_rate=22050', after='parts/*.arrow', count=3, how=signal.SIGINT)
  assert status == 130 and 'Traceback' not in errors
  assert errors.splitlines()[-1] == 'lmspt: interrupted'


def test_workers_leave_an_interrupt_to_the_process_that_started_them(tmp_path):
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', '--runner=local', '--num_workers=2',
                                     '--sample_rate=22050', after='parts/*.arrow', count=3, how=signal.SIGINT,
                                     whom=children)
  assert status == 0 and 'Traceback' not in errors


def test_a_worker_that_dies_is_one_line(tmp_path):
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', '--runner=local', '--num_workers=2',
                                     '--sample_rate=22050', after='parts/*.arrow', count=3, how=signal.SIGKILL,
                                     whom=lambda pid: children(pid)[-1:])
  assert status == 1 and errors.splitlines()[-1].startswith('lmspt: error: a worker process died: if memory ran out')


def test_what_changed_is_made_again(tmp_path):
  rows = small_folder(tmp_path / 'in')
  source, out = f'folder:{tmp_path / "in"}', tmp_path / 'out'
  info = prepare(source, out, num_shards=3, num_workers=1, progress=False)
  whole = files(out)
  for damaged in (info.shards[1].name, 'index.parquet', 'dataset.json'):
    kept = {path: path.stat().st_mtime_ns for path in out.glob('*.arrayrecord') if path.name != damaged}
    (out / damaged).write_bytes(b'x' * len(whole[damaged]))
    prepare(source, out, num_shards=3, num_workers=1, progress=False)
    assert files(out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
  shutil.copy(tmp_path / 'in' / rows[1]['path'], tmp_path / 'in' / rows[0]['path'])
  edited = prepare(source, out, num_shards=3, num_workers=1, progress=False)
  assert edited.hours != info.hours
  prepare(source, tmp_path / 'fresh', num_shards=3, num_workers=1, progress=False)
  assert files(tmp_path / 'fresh') == files(out)
  other = prepare(source, out, num_shards=3, num_workers=1, sample_rate=8_000, progress=False)
  assert other.sample_rates == {'8000': 12}
  shorter = prepare(source, out, num_shards=3, num_workers=1, sample_rate=8_000, max_seconds=2, progress=False)
  assert shorter.utterances > 12


# ---------------------------------------------------------------- what comes out


def test_shards_hold_what_the_folder_holds(tmp_path):
  rows = small_folder(tmp_path / 'in')
  (tmp_path / 'in' / 'LICENSE.txt').write_text('terms')
  (tmp_path / 'in' / 'license_text').write_text('more terms')
  (tmp_path / 'in' / 'ATTRIBUTION.md').write_text('names')
  (tmp_path / 'in' / 'licences').mkdir()
  info = prepare(f'folder:{tmp_path / "in"}', tmp_path / 'out', num_shards=2, num_workers=1, progress=False)
  assert {name: total['utterances'] for name, total in info.splits.items()} == {'test': 3, 'train': 9}
  assert (info.utterances, info.num_faults, info.sample_rates) == (12, 0, {'16000': 12})
  assert (tmp_path / 'out' / 'LICENSE.txt').read_text() == 'terms' and (tmp_path / 'out' / 'ATTRIBUTION.md').is_file()
  assert set(info.files) == {'ATTRIBUTION.md', 'LICENSE.txt', 'license_text', 'durations.svg', 'index.parquet'}
  for split in ('', 'test', 'train'):
    folder = open_source(f'folder:{tmp_path / "in"}', split)
    shards = open_source(f'arrayrecord:{tmp_path / "out"}', split)
    assert len(folder) == len(shards)
    for index in range(len(folder)):
      a, b = folder[index], shards[index]
      assert dataclasses.replace(a, name='', content=b'') == dataclasses.replace(b, name='', content=b'')
      assert b.open().format == 'FLAC'
      assert b.encoded() == a.encoded() or a.name.endswith('.wav')  # FLAC is kept byte for byte
      assert np.array_equal(a.decode()[0], b.decode()[0]) and a.decode()[1] == b.decode()[1]
  assert shards.index.numbers('seconds').sum() == pytest.approx(
    sum(row['seconds'] for row in rows if row['split'] == 'train'), rel=1e-3)
  again = prepare(f'arrayrecord:{tmp_path / "out"}', tmp_path / 'again', num_shards=2, num_workers=1, progress=False)
  assert again.shards == info.shards


def test_statistics(tmp_path):
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()]
  info = prepare(SPEECH, tmp_path, num_workers=1, progress=False)
  frames = {row['id']: soundfile.info(SAMPLE / row['path']).frames for row in rows}
  assert info.hours == pytest.approx(sum(frames.values()) / 16_000 / 3600, abs=1e-6)
  for totals, field in ((info.speakers, 'speaker'), (info.languages, 'language'), (info.licenses, 'license')):
    assert {name: total['utterances'] for name, total in totals.items()} == collections.Counter(
      row[field] for row in rows)
    for name, total in totals.items():
      seconds = sum(frames[row['id']] for row in rows if row[field] == name) / 16_000
      assert total['hours'] == pytest.approx(seconds / 3600, abs=1e-6)
  assert info.licenses['CC-BY-SA-3.0']['attribution'] == (
    '59 utterances of package:speech_sample, licence CC-BY-SA-3.0 (https://creativecommons.org/licenses/by-sa/3.0/); '
    'see ATTRIBUTION.md, LICENSE.asterisk, LICENSE.pocketsphinx')
  width = info.durations['bin_seconds']
  expected = collections.Counter(int(count / 16_000 // width) for count in frames.values())
  assert width == 0.5 and info.durations['utterances'] == [expected[bar] for bar in range(max(expected) + 1)]
  picture = xml.etree.ElementTree.parse(tmp_path / 'durations.svg')
  titles = [title.text for title in picture.iter('{http://www.w3.org/2000/svg}title')]
  assert [int(title.rpartition(' ')[2]) for title in titles] == info.durations['utterances']
  table = pq.read_table(tmp_path / 'index.parquet')
  assert {row['id']: round(row['seconds'] * 16_000) for row in table.to_pylist()} == frames


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
  speech, _ = soundfile.read(SAMPLE / rows[0]['path'])
  soundfile.write(audio / 'fast.wav', speech, 700_000)  # a rate that FLAC can't hold
  bad = ['silent.wav', 'empty.wav', 'nan.wav', 'text.flac', 'cut.flac', 'absent.wav', 'fast.wav']
  write_manifest(folder, [*rows, *({'path': f'audio/{name}', 'split': 'train'} for name in bad)])
  parser = argparse.ArgumentParser()
  prepare_command.add_arguments(parser)
  assert prepare_command.run(parser.parse_args(['--source', f'folder:{folder}', '--out', str(tmp_path / 'out'),
                                                '--runner=local', '--num_workers=1'])) == 0
  assert 'left out, silent: 1 (e.g. audio/silent.wav)' in capsys.readouterr().out
  info = load_info(tmp_path / 'out')
  assert info.utterances == 12 and info.num_faults == 7
  found = {name: reason for reason, entry in info.faults.items() for name in entry['names']}
  assert found.pop('audio/cut.flac') in ('truncated', 'undecodable')
  assert found == {'audio/silent.wav': 'silent', 'audio/empty.wav': 'empty', 'audio/nan.wav': 'non-finite',
                   'audio/text.flac': 'undecodable', 'audio/absent.wav': 'missing', 'audio/fast.wav': 'bad rate'}


def test_a_missing_shard_of_the_source_is_a_fault(tmp_path):
  info = prepare(SPEECH, tmp_path / 'in', num_shards=4, num_workers=1, progress=False)
  (tmp_path / 'in' / info.shards[2].name).unlink()
  found = prepare(f'arrayrecord:{tmp_path / "in"}', tmp_path / 'out', num_workers=1, progress=False)
  assert found.utterances == 64 - info.shards[2].records == 64 - found.faults['missing']['count']
  assert {name.partition(':')[0] for name in found.faults['missing']['names']} == {info.shards[2].name}


def test_hostile_names(tmp_path):
  rows = small_folder(tmp_path / 'in', 4)
  names = ['../../up', 'line\nbreak\0zero', '-rf', '\u202egnirts']
  numbers = {'part': 1.5, 'offset': 2.5, 'digest': 3.5, 'length': 4.5, 'sample_rate': 1, 'score:x': 6.5, 'high': 7.5}
  write_manifest(tmp_path / 'in', [{**row, 'id': name, 'text': '</svg>', 'speaker': name, 'split': '..', **numbers}
                                   for row, name in zip(rows, names, strict=True)])
  prepare(f'folder:{tmp_path / "in"}', tmp_path / 'out', num_workers=1, progress=False)
  assert sorted(files(tmp_path)) == sorted(f'in/{name}' for name in files(tmp_path / 'in')) + [
    f'out/{name}' for name in sorted(files(tmp_path / 'out'))]  # nothing was written elsewhere
  assert '..-00000-of-00001.arrayrecord' in files(tmp_path / 'out')
  source = open_source(f'arrayrecord:{tmp_path / "out"}')
  assert {source[index].id for index in range(4)} == set(names)
  assert all(source[index].speaker == source[index].id for index in range(4))
  for name, number in {**numbers, 'sample_rate': 16_000}.items():  # what is known better is corrected
    assert source.index.numbers(name).tolist() == [number] * 4


def test_prepare_needs_no_jax(tmp_path):
  """Nor orbax nor Beam: it runs where they are not, or are of another version."""
  code = ('import sys; from lmspt_jax.data.prepare import prepare\n'
          f'prepare({SPEECH!r}, {str(tmp_path)!r}, num_workers=1)\n'
          'print([m for m in ("jax", "flax", "orbax", "grain", "apache_beam") if m in sys.modules])')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert result.stdout.splitlines()[-1] == '[]'


# ---------------------------------------------------------------- refusals


def test_prepare_refuses_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)  # as where it is not installed
  silent = tmp_path / 'silent'
  silent.mkdir()
  soundfile.write(silent / 'a.wav', np.zeros(8000), 16_000)
  (tmp_path / 'file').write_text('')
  cases = [
    (f'folder:{silent}', 'out', {}, r'nothing in it can be used; silent: 1 \(e\.g\. a\.wav\)'),
    (SPEECH, 'file/out', {}, "file/out.*can't be written"),
    (SPEECH, 'out', {'num_shards': 0}, 'num_shards = 0'),
    (SPEECH, 'out', {'shard_mb': 0}, 'shard_mb = 0'),
    (SPEECH, 'out', {'num_workers': 0}, 'num_workers = 0'),
    (SPEECH, 'out', {'max_seconds': float('nan')}, 'max_seconds = nan'),
    (SPEECH, 'out', {'sample_rate': 10}, 'sample_rate = 10: use 1000 to'),
    (SPEECH, 'out', {'runner': 'direct'}, r"Beam is not installed; pip install -e '\.\[prepare\]'.*--runner=local"),
    (SPEECH, 'out', {'beam_options': ['--region=r']}, '--region=r: is for Beam'),
    (f'folder:{silent}', 'silent', {}, 'is where the source is'),
    (f'folder:{tmp_path / "absent"}', 'out', {}, 'no folder'),
    ('floder:x', 'out', {}, "unknown kind 'floder', did you mean 'folder'"),
  ]
  for source, out, options, message in cases:
    with pytest.raises(LmsptError, match=message) as error:
      prepare(source, tmp_path / out, progress=False, **{'num_workers': 1, **options})
    assert '\n' not in str(error.value)
  with pytest.raises(LmsptError, match=r'--out=s3://bucket/x: must be a local folder; write there and copy it'):
    prepare(SPEECH, 's3://bucket/x')


def test_a_full_disk_is_one_line_from_any_process(tmp_path):
  prepare(SPEECH, tmp_path / 'out', num_shards=2, num_workers=1, progress=False)
  (tmp_path / 'out' / 'train-00000-of-00001.arrayrecord').mkdir()  # a name that can't be taken, as a full disk can't
  for workers in (1, 2):
    with pytest.raises(LmsptError, match=r"/train-00000-of-00001\.arrayrecord: can't be written") as error:
      prepare(SPEECH, tmp_path / 'out', num_shards=1, num_workers=workers, progress=False)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out' / 'dataset.json').exists()  # it described other shards


# ---------------------------------------------------------------- manifests and records


@pytest.mark.parametrize(('line', 'message'), [
  ('{"path": "../outside.wav"}', r"manifest\.jsonl:2: path = '\.\./outside\.wav': must be relative"),
  ('{"path": "/etc/hosts"}', 'must be relative'),
  ('{"path": ""}', 'must be relative'),
  ('{"path": 3}', 'path = 3: must be relative'),
  ('[1]', 'must be one JSON object'),
  ('{"path":', 'not JSON'),
  ('{"path": "a.wav", "id": "first"}', "id 'first' was used before"),
  ('{"path": "a.wav", "split": "train"}', r"manifest\.jsonl: 'first' has no split, where others have one"),
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
  prepare(SPEECH, tmp_path, num_workers=1, progress=False)
  path = tmp_path / 'dataset.json'
  content = json.loads(path.read_text())
  content['shards'][0]['name'] = '../../train-00000-of-00001.arrayrecord'
  for text, message in [(json.dumps(content), 'bad name or size'), ('{', 'not JSON'),
                        ('{}', 'not written by'), ('{"format": "lmspt-dataset", "version": 2}', 'fields are missing'),
                        ('{"format": "lmspt-dataset", "version": 1}', 'another version of the format')]:
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
