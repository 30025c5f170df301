"""Files that strangers may have written: the short form of benchmarks/fuzz_readers.py, and what it draws too seldom."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_readers import READERS, Plan, campaign, load_seeds, make_seeds

from lmspt_jax.config import ExperimentConfig, ModelConfig, from_dict, to_dict
from lmspt_jax.convert.safetensors_file import SafetensorsFile
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import MAX_MESSAGE, LmsptError, nearest, shown
from lmspt_jax.files import open_plain, parse_json, read_json, read_plain
from lmspt_jax.models.whisper_decoding import WhisperVocabulary

SLOW = 'run'


@pytest.fixture(scope='module')
def seeds(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('seeds')
  make_seeds(folder, list(READERS))
  return folder


@pytest.fixture
def valid(seeds, tmp_path):
  """(reader, variant) -> a folder of its valid files."""

  def copied(name: str, variant: int = 0) -> Path:
    shutil.copytree(seeds / name / str(variant), tmp_path / 'valid')
    READERS[name].read(tmp_path / 'valid')
    return tmp_path / 'valid'

  return copied


def refused(name: str, folder: Path, *words: str) -> str:
  """Reads a folder that must be refused in one line that holds all of `words`."""
  with pytest.raises(LmsptError) as error:
    READERS[name].read(folder)
  text = str(error.value)
  assert text.isprintable() and len(text) <= MAX_MESSAGE + 10 and all(word in text for word in words), text
  return text


# ---------------------------------------------------------------- at random


@pytest.mark.parametrize('readers, files', [(tuple(name for name in READERS if name != SLOW), 60), ((SLOW,), 20)],
                         ids=['all but runs', 'runs'])
def test_hostile_files_are_refused_in_one_line(seeds, readers, files):
  rows = list(campaign(seeds, Plan(readers, files, seed=1)))
  assert Counter(row['reader'] for row in rows) == dict.fromkeys(readers, files)
  assert [row for row in rows if row['faults']] == []
  for name in readers:  # or nothing would have been tested
    assert sum(row['result'] == 'refused' for row in rows if row['reader'] == name) > files / 5, name


def test_the_same_seed_gives_the_same_files(seeds, tmp_path):
  import random

  from fuzz_readers import change
  for name in ('codes', 'openai', 'webdataset', 'manifest.jsonl', 'hugging-face'):
    for number in range(20):
      for side in ('a', 'b'):
        (tmp_path / side).mkdir()
        change(READERS[name], load_seeds(seeds / name), tmp_path / side, random.Random(number))
      a, b = ({path.name: path.read_bytes() for path in (tmp_path / side).iterdir()
               if path.is_file() and path.stat().st_size < 1 << 30} for side in ('a', 'b'))
      assert a == b and a, (name, number)
      for side in ('a', 'b'):
        shutil.rmtree(tmp_path / side)


# ---------------------------------------------------------------- what else lies in a file's place

FILES = {
    'release': 'a.safetensors', 'export': 'config.json', 'hugging-face': 'model.safetensors',
    'ctranslate2': 'model.bin', 'openai': 'a.pt', 'vocabulary': 'tokenizer.json', 'codes': 'a.npz',
    'tokens': 'manifest.json',
    'run': 'checkpoints/3/record/data.json', 'dataset.json': 'dataset.json', 'manifest.jsonl': 'manifest.jsonl',
    'arrayrecord': 'index.parquet', 'webdataset': '000.tar', 'parquet': '0000.parquet'}


@pytest.mark.parametrize('name', READERS)
def test_only_plain_files_are_read_and_links_to_them(valid, name, tmp_path):
  """Hugging Face's cache keeps a snapshot's files as links to blobs; a pipe would be waited for without end."""
  folder = valid(name)
  path = folder / FILES[name]
  shutil.move(path, tmp_path / 'blob')
  path.symlink_to(tmp_path / 'blob')
  assert READERS[name].read(folder) == 0
  for make in (os.mkfifo, lambda p: p.symlink_to('/dev/zero'), lambda p: p.symlink_to(p.name), os.mkdir):
    path.unlink()
    make(path)
    refused(name, folder)
    if path.is_dir() and not path.is_symlink():
      path.rmdir()
      path.touch()


def test_an_index_names_no_file_outside_of_its_folder(valid, tmp_path):
  folder = valid('hugging-face', 1)
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  shutil.copy(folder / 'model-00001-of-00002.safetensors', tmp_path / 'outside.safetensors')
  for name in ('../outside.safetensors', str(tmp_path / 'outside.safetensors'), '..', '', 'a\0b', 3, ['a'], {'a': 1}):
    key = next(iter(index['weight_map']))
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {**index['weight_map'], key: name}}))
    refused('hugging-face', folder, 'model.safetensors.index.json: weight_map names')


# ---------------------------------------------------------------- sizes


def test_a_terabyte_with_nothing_in_it(valid):
  for name, path in FILES.items():
    folder = valid(name)
    with (folder / path).open('wb') as file:
      file.truncate(1 << 40)
    refused(name, folder)
    shutil.rmtree(folder)


def npy(header: str, data: bytes) -> bytes:
  return b'\x93NUMPY\1\0' + struct.pack('<H', len(header) + 1) + header.encode() + b'\n' + data


@pytest.mark.parametrize('header, word', [
    ("{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 4), }", 'has 16 bytes'),
    ("{'descr': '<i4', 'fortran_order': False, 'shape': (0, 999999999999999999), }", 'has 16 bytes'),
    ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 1), }", 'not a plain array'),
    ("{'descr': '<U999999999', 'fortran_order': False, 'shape': (), }", 'not a plain array'),
    ('-' * 9000 + '1', 'not a plain array'), ("__import__('os')", 'not a plain array')])
def test_headers_of_codes(valid, header, word):
  folder = valid('codes')
  with zipfile.ZipFile(folder / 'a.npz') as file:
    members = {name: file.read(name) for name in file.namelist()}
  with zipfile.ZipFile(folder / 'a.npz', 'w') as file:
    for name, data in {**members, 'ids.npy': npy(header, bytes(16))}.items():
      file.writestr(name, data)
  refused('codes', folder, 'a.npz: ids ', word)


def test_a_compressed_member_is_not_unpacked(valid):
  for name, path, member in (('codes', 'a.npz', 'ids.npy'), ('openai', 'a.pt', 'archive/data.pkl')):
    folder = valid(name)
    with zipfile.ZipFile(folder / path, 'w', zipfile.ZIP_DEFLATED) as file:
      for field in ('ids', 'num_samples', 'sample_rate', 'frame_rate', 'model_hash') if name == 'codes' else ():
        file.writestr(f'{field}.npy', bytes(1 << 20))
      if name == 'openai':
        file.writestr(member, bytes(1 << 20))
    refused(name, folder, f'member {member} is compressed')
    shutil.rmtree(folder)


def test_a_member_that_says_more_than_the_file_has(valid):
  folder = valid('openai')
  data = bytearray((folder / 'a.pt').read_bytes())
  entry = data.rindex(b'PK\1\2', 0, data.index(b'archive/data.pkl', data.index(b'PK\1\2')))
  data[entry + 20:entry + 28] = struct.pack('<II', 1 << 20, 1 << 20)
  (folder / 'a.pt').write_bytes(data)
  refused('openai', folder, 'archive/data.pkl says 1048576 bytes')


def test_two_members_of_one_name(valid):
  folder = valid('codes')
  with pytest.warns(UserWarning, match='Duplicate name'), zipfile.ZipFile(folder / 'a.npz', 'a') as file:
    file.writestr('ids.npy', b'')
  refused('codes', folder, 'two members of one name')


def rewritten(path: Path, change) -> None:
  """A file of JSON after `change` of its value."""
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize('change, words', [
    (lambda m: m.update(dilations=[1] * 16, encoder_strides=[2] * 16, decoder_rates=[2] * 16, latent_dim=8,
                        resynthesis_rates=[2] * 16, encoder_channels=1, decoder_channels=1 << 16,
                        resynthesis_channels=1 << 16), ['148 arrays, too few for 768 residual units']),
    (lambda m: m['semantic'].update(codebook_size=1 << 24), ['has shape (16,), by its config (16777216,)']),
    (lambda m: m['semantic'].update(codebook_size=1 << 60), ['model.semantic.codebook_size = 1152921504606846976']),
    (lambda m: m.update(encoder_strides=[4] * 5000), ['model.encoder_strides', 'at most 16']),
    (lambda m: m.update(sample_rate=0), ['model.sample_rate = 0']),
    (lambda m: m['semantic'].update(dropout=10**400), ['model.semantic.dropout = 1000'])])
def test_a_config_that_asks_for_more_than_its_checkpoint_has(valid, change, words):
  """The first took four minutes to be refused."""
  folder = valid('run')
  rewritten(folder / 'checkpoints/3/record/data.json', lambda record: change(record['config']['model']))
  refused('run', folder, *words)


@pytest.mark.parametrize('change, words', [
    (lambda r: r.pop('teacher_id'), ['teacher_id = None', 'delete it to go back']),
    (lambda r: r.update(config=[1]), ['config = [1]']), (lambda r: r.update(format='\x1b[31m'), ['checkpoint format'])])
def test_records_of_checkpoints(valid, change, words):
  folder = valid('run')
  rewritten(folder / 'checkpoints/3/record/data.json', change)
  refused('run', folder, *words)
  (folder / 'checkpoints/3/record/data.json').write_text('[]')
  refused('run', folder, 'checkpoint format None')


def test_arrays_that_their_files_could_not_hold(valid, monkeypatch):
  from lmspt_jax.checkpoint import saved
  folder = valid('run')
  monkeypatch.setattr(saved, '_MAX_RATIO', 0.1)
  refused('run', folder, 'which no training writes')


def test_metadata_of_checkpoints(valid):
  folder = valid('run')
  path = folder / 'checkpoints/3/_CHECKPOINT_METADATA'
  begun = folder / 'checkpoints/4.orbax-checkpoint-tmp'
  begun.mkdir()
  (begun / path.name).write_text('{')  # cut short by a kill
  READERS['run'].read(folder)
  for change in ({'init_timestamp_nsecs': 'x'}, {'commit_timestamp_nsecs': 10**30}):
    rewritten(path, lambda content, change=change: content.update(change))
    refused('run', folder, 'checkpoints: the _CHECKPOINT_METADATA of a checkpoint in it', 'delete that checkpoint')


def test_shapes_that_numpy_has_not(valid, tmp_path):
  folder = valid('release')
  data = (folder / 'a.safetensors').read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  name = next(key for key in header if header[key].get('shape') == [1])
  header[name]['shape'] = [1] * 1000
  text = json.dumps(header).encode()
  (folder / 'a.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + data[8 + size:])
  refused('release', folder, f'{name!r} has shape (1, 1, 1,')
  text = json.dumps({'a': {'dtype': 'F32', 'shape': [0, 1 << 62], 'data_offsets': [0, 0]}}).encode()
  (tmp_path / 'b.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)
  with pytest.raises(LmsptError, match=r"'a' has shape \(0, 4611686018427387904\)"):
    SafetensorsFile(tmp_path / 'b.safetensors').read('a')


# ---------------------------------------------------------------- vocabulary and data


@pytest.mark.parametrize('change, words', [
    (lambda c: c['model'].update(type=['BPE']), "a ['BPE'] vocabulary"),
    (lambda c: c['model'].pop('vocab'), 'no words'),
    (lambda c: c['model']['vocab'].update(a=True), 'are not 0, 1, 2'),
    (lambda c: c['model']['vocab'].update(x=10**30), 'are not 0, 1, 2'),
    (lambda c: c['model']['vocab'].update(aa=c['model']['vocab'].pop('a')), 'lacks words for single bytes'),
    (lambda c: c['model']['merges'].append(['th', 'q']), 'merges of other words'),
    (lambda c: c['model']['merges'].append('t h e'), 'merges of other words'),
    (lambda c: c['added_tokens'].append({'id': 1, 'content': ''}), 'without a text'),
    (lambda c: c['added_tokens'].append(c['added_tokens'][0]), 'twice'),
    (lambda c: c['added_tokens'][3].update(id=-1), 'do not follow its words'),
    (lambda c: c['added_tokens'].pop(), 'no token <|notimestamps|>')])
def test_vocabularies(valid, change, words):
  folder = valid('vocabulary')
  rewritten(folder / 'tokenizer.json', change)
  refused('vocabulary', folder, words)


def test_patterns_of_a_vocabulary_are_not_used(valid):
  """One of these takes any time for a text of a few letters."""
  folder = valid('vocabulary')
  pattern = {'Regex': '(a*)*(a*)*(a*)*\\1\\2\\3$'}
  rewritten(folder / 'tokenizer.json', lambda content: content.update(
      normalizer={'type': 'Replace', 'pattern': pattern, 'content': ''},
      pre_tokenizer={'type': 'Split', 'pattern': pattern, 'behavior': 'Isolated', 'invert': False}))
  plain = WhisperVocabulary.from_file(folder / 'tokenizer.json')
  assert plain.tokenizer.encode('a' * 2000 + '!').ids[-1] == plain.tokenizer.token_to_id('!')


@pytest.mark.parametrize('change, words', [
    (lambda c: c.update(faults=[]), 'faults = []: must be dict'),
    (lambda c: c.update(faults={'a': {}}), 'not counts'), (lambda c: c.update(utterances='4'), "utterances = '4'"),
    (lambda c: c.update(hours=float('nan')), 'nan hours'), (lambda c: c['languages'].update(en=7), 'languages holds 7'),
    (lambda c: c.update(shards=None), 'shards = None'),
    (lambda c: c.update(shards=[3]), '3 in place of an object'),
    (lambda c: c['shards'][0].update(records=float('nan')), 'records = nan: must be int'),
    (lambda c: c['shards'][0].update(bytes=10**30), 'bad name or size'),
    (lambda c: c['shards'][0].update(name='../' + c['shards'][0]['name']), 'bad name or size'),
    (lambda c: c['shards'].append(c['shards'][0]), 'lists a shard twice'),
    (lambda c: c.update(x=1), "unknown (['x'])")])
def test_descriptions_of_shards(valid, change, words):
  folder = valid('dataset.json')
  rewritten(folder / 'dataset.json', change)
  refused('dataset.json', folder, 'dataset.json: ', words)


def test_an_index_of_records_that_are_not_there(valid):
  folder = valid('arrayrecord')
  table = pq.read_table(folder / 'index.parquet')
  place = table.schema.get_field_index('position')
  for position in (-1, 4, 2**62):
    pq.write_table(table.set_column(place, 'position', pa.array([position] * len(table))), folder / 'index.parquet')
    refused('arrayrecord', folder, f'names record {position} of', 'which has 4')


def test_texts_that_are_none(valid):
  ends = pa.py_buffer(np.arange(5, dtype=np.int32))
  bad = pa.Array.from_buffers(pa.string(), 4, [None, ends, pa.py_buffer(b'\xff' * 4)])
  folder = valid('arrayrecord')
  table = pq.read_table(folder / 'index.parquet')
  pq.write_table(table.set_column(table.schema.get_field_index('text'), 'text', bad), folder / 'index.parquet')
  refused('arrayrecord', folder, "index.parquet: can't be read")
  shutil.rmtree(folder)
  folder = valid('parquet')
  path = folder / '0000.parquet'
  table = pq.read_table(path)
  pq.write_table(table.set_column(table.schema.get_field_index('text'), 'text', bad), path)
  refused('parquet', folder, 'damaged columns')


def test_columns_of_one_name_and_notes_that_are_nested(valid):
  folder = valid('parquet')
  path = folder / '0000.parquet'
  table = pq.read_table(path)
  pq.write_table(table.replace_schema_metadata({'huggingface': '[' * 100_000}), path)
  assert READERS['parquet'].read(folder) == 0
  pq.write_table(table.append_column('audio', table.column('audio')), path)
  refused('parquet', folder, 'two of its columns have one name')


def test_a_footer_that_says_more_rows_than_there_are(valid, monkeypatch):
  from lmspt_jax.data.sources import open_source, parquet
  folder = valid('parquet')
  source = open_source(f'parquet:{folder}/*.parquet')
  monkeypatch.setattr(parquet._File, 'whole', lambda self, group: pa.chunked_array([pa.array([], pa.binary())]))
  with pytest.raises(AudioError, match='damaged row group') as error:
    source[0]
  assert error.value.reason == 'corrupt record'


@pytest.mark.parametrize('body', [
    b'-5 a=b\n-5 c=d\n', b'0 a=b\n', b'3 a\n', b'+8 a=b\n\n', b'1_0 a=bcd\n', b'11 size=-1\n'])
def test_extended_headers_of_tars(valid, body):
  folder = valid('webdataset')
  header = tarfile.TarInfo('x')
  header.type, header.size = tarfile.XHDTYPE, len(body)
  path = folder / '000.tar'
  path.write_bytes(header.tobuf() + body + bytes(-len(body) % 512) + path.read_bytes())
  refused('webdataset', folder, '000.tar: damaged at byte 0')


# ---------------------------------------------------------------- code


class Payload:
  def __reduce__(self):
    return os.system, ('touch ran',)


def test_no_pickle_is_run_wherever_it_stands(valid, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    content = pickle.dumps({'dims': Payload(), 'model_state_dict': Payload()}, protocol)
    for name, path in FILES.items():
      folder = valid(name)
      (folder / path).write_bytes(content)
      refused(name, folder)
      shutil.rmtree(folder)
    folder = valid('openai')
    with zipfile.ZipFile(folder / 'a.pt', 'w') as file:
      file.writestr('archive/data.pkl', content)
    refused('openai', folder, 'nothing of it was run')
    shutil.rmtree(folder)
    folder = valid('codes')
    with zipfile.ZipFile(folder / 'a.npz', 'a') as file, pytest.warns(UserWarning, match='Duplicate'):
      file.writestr('ids.npy', npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }", content))
    refused('codes', folder)
    shutil.rmtree(folder)
  assert not list(tmp_path.rglob('ran'))


# ---------------------------------------------------------------- helpers that all readers share


def test_messages_are_one_line_of_what_a_terminal_shows():
  error = LmsptError('a\nb\r\n  c \x1b[31m \ud800 \u202e ' + 'x' * 5000 + ' way out')
  assert str(error).startswith(r'a b c \x1b[31m \ud800 \u202e xxx') and str(error).endswith('way out')
  for text in (str(error), str(LmsptError('\0' * 10_000))):
    assert len(text) < MAX_MESSAGE + 10 and text.isprintable()
  assert str(copy.copy(error)) == str(error)


def test_any_value_can_be_shown():
  deep, wide = [], ()
  for _ in range(100_000):
    deep = [deep]
  for _ in range(100):
    wide = (wide, wide)
  for value in (deep, wide, 10**5000, 'y' * (1 << 20), {'a': deep}, [wide] * 1000, float('nan')):
    assert 1 <= len(shown(value)) < 30_000
  assert shown((4, 5, 6, 8, 2)) == '(4, 5, 6, 8, 2)' and shown({'data': -1}) == "{'data': -1}"
  names = [f'name{i}' for i in range(100_000)]
  assert nearest('x' * (1 << 20), names) == f'known: {", ".join(sorted(names)[:40])} and 99960 more'


def test_plain_files(tmp_path):
  path = tmp_path / 'a.json'
  with pytest.raises(LmsptError, match='no such file'):
    open_plain(path)
  with pytest.raises(LmsptError, match="can't be read"):
    open_plain(f'{path}\0')
  path.write_text('{"a": [1, 2]}')
  assert read_json(path) == {'a': [1, 2]} and read_plain(path, 13) == path.read_bytes()
  with pytest.raises(LmsptError, match='more than 12 bytes'):
    read_json(path, 12)
  for text in ('', '[' * 100_000, '{"a":' * 100_000, b'\xff', b'{\0}', '1' * 5000, 'nul'):
    with pytest.raises(LmsptError, match=r'^here: not JSON'):
      parse_json(text, 'here')


@pytest.mark.parametrize('field, value', [
    ('sample_rate', 10**9), ('encoder_channels', 0), ('encoder_channels', -4), ('latent_dim', 1 << 40),
    ('dilations', (0,)), ('decoder_rates', (1 << 20,)), ('encoder_strides', (2,) * 17), ('resynthesis_channels', 0)])
def test_bounds_of_a_models_config(field, value):
  config = ExperimentConfig(model=from_dict(ModelConfig, {**to_dict(ModelConfig()), field: value}))
  with pytest.raises(LmsptError, match=rf'model\.{field} = '):
    config.check()


def test_no_more_array_than_a_weight_file_has_bytes(valid):
  folder = valid('hugging-face')
  rewritten(folder / 'config.json', lambda config: config.update(d_model=1_000_000, encoder_attention_heads=2))
  refused('hugging-face', folder, 'dimensions for', 'its configuration is not its own')


def test_a_weight_file_far_larger_than_its_dimensions(valid):
  folder = valid('ctranslate2')
  data = (folder / 'model.bin').read_bytes()
  count = data.index(b'WhisperSpec') + len('WhisperSpec\0') + 4
  number = int.from_bytes(data[count:count + 4], 'little')
  with (folder / 'model.bin').open('wb') as file:  # another variable of 4 GB with nothing in it: hashing takes seconds
    file.write(data[:count] + struct.pack('<I', number + 1) + struct.pack('<H', 2) + b'x\0'
               + struct.pack('<BIBI', 1, 1 << 30, 1, 1 << 30))
    file.seek(1 << 30, os.SEEK_CUR)
    file.write(data[count + 4:])
  refused('ctranslate2', folder, 'where a Whisper of its dimensions has')


def test_codes_keep_their_values(tmp_path):
  from lmspt_jax.inference.codes import Codes, read_codes, write_codes
  rng = np.random.default_rng(0)
  for ids in (rng.integers(0, 2**31 - 1, (3, 5)), rng.integers(0, 99, (5, 3)).T, np.zeros((1, 0), np.int32)):
    write_codes(tmp_path / 'a.npz', Codes(ids.astype(np.int32), 7, 24_000, 12.5, 'é'), 1 << 30)
    read = read_codes(tmp_path / 'a.npz')
    np.testing.assert_array_equal(read.ids, ids)
    assert (read.num_samples, read.sample_rate, read.frame_rate, read.model_hash) == (7, 24_000, 12.5, 'é')
