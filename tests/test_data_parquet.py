"""parquet: sources: layouts, ids and splits, bounded reading of row groups, stores, and damaged files. Real speech."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _object_store
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _corpus_formats import as_in_a_worker, audio_table, utterances, write_parquet

from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import open_source, parquet
from lmspt_jax.errors import LmsptError

SPEECH = utterances(12)
AUDIO = {utterance.id: utterance.encoded() for utterance in SPEECH}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def server():
  server = _object_store.s3()
  server.failures = 0
  server.forget()
  return server


def write(table, path: Path, **options) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(table, path, **options)
  return f'parquet:{path}'


def everything(source):
  return {source[i].id: source[i].encoded() for i in range(len(source))}


def one_line(error) -> str:
  assert '\n' not in str(error.value)
  return str(error.value)


def fails(source, position) -> AudioError:
  with pytest.raises(AudioError) as error:
    source[position]
  one_line(error)
  return error.value


# ---------------------------------------------------------------- layouts


def test_what_datasets_writes(tmp_path):
  import datasets
  datasets.disable_progress_bars()
  for split, part in (('train', SPEECH[:8]), ('validation', SPEECH[8:])):
    rows = datasets.Dataset.from_dict({
      'audio': [{'bytes': utterance.encoded(), 'path': f'{utterance.id}.flac'} for utterance in part],
      'sentence': [utterance.text for utterance in part], 'locale': ['de', *['en'] * (len(part) - 1)],
      'client_id': list(range(len(part))), 'dnsmos': [3.5] * len(part), 'words': [['not', 'text']] * len(part)})
    rows = rows.cast_column('audio', datasets.Audio()).cast_column('locale', datasets.Value('string'))
    rows = rows.cast_column('client_id', datasets.ClassLabel(names=[f'speaker {i}' for i in range(len(part))]))
    rows.to_parquet(tmp_path / 'data' / f'{split}-00000-of-00001.parquet', batch_size=3)
  source = open_source(f'parquet:{tmp_path}/data/*.parquet')
  assert source.index.counts('split') == {'train': 8, 'validation': 4} and everything(source) == AUDIO
  assert source.index.counts('language') == {'de': 2, 'en': 10} and source.index.number_columns == ['seconds', 'dnsmos']
  first = open_source(f'parquet:{tmp_path}/data/*.parquet', 'train')[0]
  assert (first.id, first.text, first.speaker) == (SPEECH[0].id, SPEECH[0].text, 'speaker 0')
  assert first.name == 'train-00000-of-00001.parquet:0' and np.isnan(source.index.value(0, 'seconds'))
  assert first.load(16_000).tobytes() == SPEECH[0].load(16_000).tobytes()


@pytest.mark.parametrize('options', [
  {'compression': 'none', 'use_dictionary': False}, {'compression': 'zstd', 'data_page_version': '2.0'},
  {'write_statistics': False, 'write_page_checksum': True}, {'version': '1.0', 'row_group_size': 5}])
def test_what_pyarrow_writes(tmp_path, options):
  source = open_source(write(audio_table(SPEECH), tmp_path / 'a.parquet', **options))
  assert everything(source) == AUDIO
  assert [source.index.labels(i) for i in range(12)] == [
    {name: getattr(utterance, name) for name in source.index.labels(0)} for utterance in SPEECH]


@pytest.mark.parametrize('kind', ['audio', 'bytes', 'large', 'only struct', 'audio of two structs'])
def test_columns_of_audio(tmp_path, kind):
  data = pa.array([utterance.encoded() for utterance in SPEECH])
  struct = pa.StructArray.from_arrays([data], ['bytes'])
  columns = {'audio': {'audio': data, 'other': pa.nulls(12, pa.binary())}, 'bytes': {'bytes': data},
             'large': {'audio': data.cast(pa.large_binary())}, 'only struct': {'recording': struct},
             'audio of two structs': {'noise': pa.array([{'bytes': b'x'}] * 12), 'audio': struct}}[kind]
  source = open_source(write(pa.table({'id': [u.id for u in SPEECH], **columns}), tmp_path / 'a.parquet'))
  assert everything(source) == AUDIO


def test_files_without_audio_are_refused_in_one_line(tmp_path):
  table = audio_table(SPEECH)
  two = {name: table['audio'] for name in ('first', 'second')}
  paths = pa.array([{'bytes': None, 'path': '/there/a.flac'}] * 3, table['audio'].type)
  for columns, message in [
      ({'text': ['a']}, r'x\.parquet: no column of audio.* it has text \(string\)'),
      (two, r'no column of audio.* it has first \(struct<bytes: binary, path: string>\), second'),
      ({'audio': [[0.5, 0.5]]}, r'no column of audio.* it has audio \(list<'),
      ({'audio': paths}, r'x\.parquet: holds only the path of its audio, not the bytes; write the files again'),
      ({'audio': table['audio'][:1], 'text': pa.array([0.5])}, r'x\.parquet:0: text = 0\.5: must be text')]:
    uri = write(pa.table(columns), tmp_path / 'x.parquet')
    with pytest.raises(LmsptError, match=message) as error:
      open_source(uri)
    one_line(error)
  for uri in (f'parquet:{tmp_path}', f'parquet:{tmp_path}/*.pq'):
    with pytest.raises(LmsptError, match=r'no parquet files; write a pattern such as DIR/\*\.parquet'):
      open_source(uri)


def test_ids(tmp_path):
  table = audio_table(SPEECH).drop_columns(['id', 'split'])
  source = open_source(write(table, tmp_path / 'a.parquet'))
  assert {source[i].id for i in range(12)} == set(AUDIO)  # of the paths
  repeated = table.append_column('id', pa.array(['same'] * 12))
  assert everything(open_source(write(repeated, tmp_path / 'b.parquet'))) == AUDIO
  partly = table.append_column('id', pa.array([*list('abcdefghijk'), None]))
  assert everything(open_source(write(partly, tmp_path / 'e.parquet'))) == AUDIO
  unnamed = pa.table({'bytes': table['audio'].combine_chunks().field('bytes'), 'id': ['same'] * 12})
  source = open_source(write(unnamed, tmp_path / 'c.parquet'))
  assert {source[i].id for i in range(12)} == {f'c.parquet:{row}' for row in range(12)}
  shutil.copy(tmp_path / 'a.parquet', tmp_path / 'd.parquet')  # the same ids in two files
  source = open_source(f'parquet:{tmp_path}/[ad].parquet')
  assert {source[i].id for i in range(24)} == {f'{file}/{key}' for file in 'ad' for key in AUDIO}


def test_splits_by_the_names_of_files_and_folders(tmp_path):
  table = audio_table(SPEECH).drop_columns('split')
  for name in ('train-00000-of-00002.parquet', 'train-00001-of-00002-0123456789abcdef.parquet',
               'test/0000.parquet'):
    write(table.slice(len(name) % 8, 2), tmp_path / name)
  source = open_source(f'parquet:{tmp_path}/**/*.parquet')
  assert source.index.counts('split') == {'test': 2, 'train': 4}
  write(table, tmp_path / 'more.parquet')
  with pytest.raises(LmsptError, match='has no split, where others have one'):
    open_source(f'parquet:{tmp_path}/**/*.parquet')
  source = open_source(f'parquet:{tmp_path}/more.parquet')
  assert set(source.index.counts('split')) == {'train'}  # by the transcripts, as everywhere


# ---------------------------------------------------------------- reading


def test_large_row_groups_are_read_page_by_page(tmp_path, monkeypatch):
  uri = write(audio_table(SPEECH), tmp_path / 'a.parquet')
  monkeypatch.setattr(parquet, 'MAX_GROUP', 1000)
  monkeypatch.setattr(parquet._File, 'whole', lambda *_: pytest.fail('decoded a large row group'))
  assert everything(open_source(uri)) == AUDIO


def test_open_files_and_decoded_row_groups_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet, 'MAX_OPEN', 3)
  monkeypatch.setattr(parquet, 'MAX_DECODED', 200_000)
  pattern = write_parquet(SPEECH, tmp_path / 'data', count=12)
  source = open_source(f'parquet:{pattern}')
  most = 0
  for _ in range(2):
    assert everything(source) == AUDIO
    links = [os.readlink(path) for path in Path('/proc/self/fd').iterdir() if path.is_symlink() and path.exists()]
    most = max(most, sum(link.startswith(str(tmp_path / 'data')) for link in links))
  assert 1 <= most <= 3
  held = [values.nbytes for values in source._reader._groups.values()]
  assert sum(held) <= 200_000 or len(held) == 1


def test_a_row_group_is_decoded_once_while_it_is_held(tmp_path, monkeypatch):
  source = open_source(write(audio_table(SPEECH), tmp_path / 'a.parquet', row_group_size=4))
  decoded, whole = [], parquet._File.whole
  monkeypatch.setattr(parquet._File, 'whole', lambda file, group: decoded.append(group) or whole(file, group))
  with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: source[i % 12].encoded(), range(96)))
  assert found == [source[i % 12].encoded() for i in range(96)] and sorted(decoded) == [0, 1, 2]


def test_pickles_without_files(tmp_path):
  source = open_source(f'parquet:{write_parquet(SPEECH, tmp_path / "data")}', 'train')
  expected = everything(source)
  copy = as_in_a_worker(source)
  assert not copy._reader._files and everything(copy) == expected


def test_the_index_is_cached_and_follows_the_file(tmp_path, monkeypatch):
  uri = write(audio_table(SPEECH[:5]), tmp_path / 'a.parquet')
  assert len(open_source(uri)) == 5
  read = parquet._read_rows
  monkeypatch.setattr(parquet, '_read_rows', lambda *_: pytest.fail('read the columns again'))
  assert len(open_source(uri)) == 5
  monkeypatch.setattr(parquet, '_read_rows', read)
  write(audio_table(SPEECH), tmp_path / 'a.parquet')
  assert everything(open_source(uri)) == AUDIO


def test_a_store_is_read_by_row_group(tmp_path, server):
  write_parquet(SPEECH, tmp_path / 'data', count=1, row_group_size=4)
  size = (tmp_path / 'data' / '0000.parquet').stat().st_size
  bucket = _object_store.upload(tmp_path / 'data', 'parquet-groups')
  server.forget()
  source = open_source(f'parquet:{bucket}/*.parquet')
  assert len(source) == 12 and server.sent < size / 3  # no audio is fetched for the index
  server.forget()
  assert source[0].encoded() == AUDIO[source[0].id]
  assert len([request for request in server.requests if request[0] == 'GET']) <= 3 and server.sent < size / 2
  assert everything(source) == AUDIO and source.root == bucket
  server.forget()
  assert everything(as_in_a_worker(source)) == AUDIO and server.sent == 0  # from the cache on disk


def test_a_store_that_is_down_is_no_fault_of_the_file(tmp_path, server, monkeypatch):
  from lmspt_jax.data.storage import remote
  write_parquet(SPEECH, tmp_path / 'data', count=2)
  bucket = _object_store.upload(tmp_path / 'data', 'parquet-down')
  source = open_source(f'parquet:{bucket}/0001.parquet')
  monkeypatch.setattr(remote, '_WAIT', 0.01)
  server.failures = 1000
  assert fails(source, 0).reason == 'unreachable'
  server.failures = 0
  assert source[0].encoded() == AUDIO[source[0].id]  # and it does not stay that way
  server.failures = 1000
  with pytest.raises(AudioError) as error:
    open_source(f'parquet:{bucket}/{{0000..0001}}.parquet')  # the second one is known already
  assert error.value.reason == 'unreachable'


# ---------------------------------------------------------------- damage


def test_broken_files_are_listed_and_the_others_used(tmp_path):
  folder = tmp_path / 'data'
  write_parquet(SPEECH, folder, count=4)
  whole = (folder / '0001.parquet').read_bytes()
  (folder / '0001.parquet').write_bytes(whole[:len(whole) // 2])
  (folder / '0002.parquet').write_text('this is no parquet')
  (folder / '0003.parquet').unlink()
  source = open_source(f'parquet:{folder}/{{0000..0003}}.parquet')
  assert set(everything(source)) == {utterance.id for utterance in SPEECH[::4]}
  assert [(fault.shard, fault.reason) for fault in source.shard_faults] == [
    ('0001.parquet', 'truncated'), ('0002.parquet', 'truncated'), ('0003.parquet', 'missing')]
  assert all('\n' not in fault.message and fault.shard in fault.message for fault in source.shard_faults)
  (folder / '0001.parquet').write_bytes(whole)  # no fault is remembered
  assert len(open_source(f'parquet:{folder}/*1.parquet')) == 3
  with pytest.raises(AudioError, match=r'0002\.parquet: not a whole parquet file') as error:
    open_source(f'parquet:{folder}/0002.parquet')
  one_line(error)


def test_rows_without_audio_and_damaged_pages_are_faults_of_their_utterances(tmp_path):
  table = audio_table(SPEECH)
  audio = table['audio'].to_pylist()
  audio[2], audio[3] = {'bytes': None, 'path': 'elsewhere.flac'}, None
  table = table.set_column(table.column_names.index('audio'), 'audio', pa.array(audio, table['audio'].type))
  path = tmp_path / 'a.parquet'
  uri = write(table, path, row_group_size=6, write_page_checksum=True)
  source = open_source(uri)
  for position in (2, 3):
    fault = fails(source, position)
    assert fault.reason == 'missing' and str(fault).startswith(f'a.parquet:{position}: holds only the path')
  data = bytearray(path.read_bytes())
  start = data.find(AUDIO[SPEECH[8].id][100:200])
  data[start:start + 50] = bytes(50)
  path.write_bytes(data)
  source = open_source(uri)  # the index does not read audio
  assert [source[i].encoded() for i in (0, 1, 4, 5)] == [AUDIO[SPEECH[i].id] for i in (0, 1, 4, 5)]
  for position in range(6, 12):
    fault = fails(source, position)
    assert fault.reason == 'corrupt record' and str(fault).startswith(f'a.parquet:{position}: damaged row group (')
  path.unlink()
  assert fails(as_in_a_worker(source), 0).reason == 'missing'


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  uri = write(audio_table(SPEECH), tmp_path / 'a.parquet')
  source = open_source(uri)
  write(audio_table(SPEECH[:5]), tmp_path / 'a.parquet')
  assert fails(source, 11).reason == 'corrupt record'


def test_short_recordings_are_no_missing_ones(tmp_path):
  short = pa.array([{'bytes': None, 'path': 'a.wav'}, {'bytes': b'RIFF', 'path': 'b.wav'}])
  source = open_source(write(pa.table({'audio': short}), tmp_path / 'a.parquet'))
  assert fails(source, 0).reason == 'missing' and source[1].encoded() == b'RIFF'


def test_any_damage_to_the_footer_and_the_columns_is_a_fault(tmp_path):
  path = tmp_path / 'a.parquet'
  uri = write(audio_table(SPEECH[:4]), path, row_group_size=2)
  whole, draw = path.read_bytes(), np.random.default_rng(0)
  footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], 'little')
  changes = [{place: (whole[place] + 1) % 256} for place in range(footer, footer + 150)]  # the schema
  changes += [{draw.integers(footer, len(whole)): draw.integers(256), draw.integers(1000): draw.integers(256)}
              for _ in range(100)]  # also the first columns, which begin the file
  outcomes = []
  for change in changes:
    data = bytearray(whole)
    for place, value in change.items():
      data[place] = value
    path.write_bytes(data)
    try:
      source = open_source(uri)
      outcomes.append('opened')
      for position in range(len(source)):
        source[position]
    except LmsptError as error:
      assert '\n' not in str(error)
      outcomes.append('refused')
  assert outcomes.count('opened') > 20 and outcomes.count('refused') > 20


def test_text_that_is_not_utf8_is_a_fault_of_the_file(tmp_path):
  write(audio_table(SPEECH[:4]), tmp_path / 'good.parquet')
  path = tmp_path / 'latin.parquet'
  text = pa.array(['Gr**e'] * 4)
  write(audio_table(SPEECH[4:8]).set_column(1, 'text', text), path, compression='none', use_dictionary=False)
  path.write_bytes(path.read_bytes().replace(b'Gr**e', b'Gr\xfc\xdfe'))
  source = open_source(f'parquet:{tmp_path}/*.parquet')
  fault, = source.shard_faults
  assert len(source) == 4 and (fault.shard, fault.reason) == ('latin.parquet', 'corrupt record')
