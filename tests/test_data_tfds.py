"""tfds: sources, without TensorFlow: LibriSpeech by name, kinds of features, the index, and damage. Real speech."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from _corpus_formats import (
  as_in_a_worker,
  build_tfds,
  metadata_of,
  samples_of,
  say_audio,
  utterances,
  write_tfds,
  write_tfds_librispeech,
)

from lmspt_jax.data.audio_io import Pcm
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.sources import tfds as tfds_source
from lmspt_jax.errors import LmsptError

SPEECH = [*utterances()[:6], *utterances()[-4:]]  # of train and of valid
BY_ID = {utterance.id: utterance for utterance in SPEECH}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  """The project's own dataset: 3 shards of train, 3 of valid."""
  return write_tfds(SPEECH, tmp_path_factory.mktemp('corpus'), num_shards=3)


@pytest.fixture
def copied(corpus, tmp_path) -> Path:
  return Path(shutil.copytree(corpus, tmp_path / 'copied' / '1.0.0'))


def shard_of(folder: Path, split: str, number: int = 0) -> Path:
  return sorted(folder.glob(f'*-{split}.array_record-*'))[number]


def refused(uri: str, message: str) -> None:
  with pytest.raises(LmsptError, match=message) as error:
    open_source(uri)
  assert '\n' not in str(error.value)


def fault(source, position: int) -> AudioError:
  with pytest.raises(AudioError) as error:
    source[position]
  assert '\n' not in str(error.value)
  return error.value


def tensor(dtype, shape=(None,), encoding='none'):
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


# ---------------------------------------------------------------- datasets


def test_librispeech_by_name(tmp_path):
  for lazy, version in ((False, '2.1.1'), (True, '2.1.2')):
    assert write_tfds_librispeech(SPEECH, tmp_path / 'tfds', lazy_decode=lazy).name == version
  samples, encoded = open_source('tfds:librispeech'), open_source('tfds:librispeech/lazy_decode')
  assert samples.index.counts('split') == {'dev_clean': 4, 'train_clean100': 6}
  assert [samples.index.labels(i) for i in range(10)] == [encoded.index.labels(i) for i in range(10)]
  assert np.array_equal(samples.index.numbers('seconds'), encoded.index.numbers('seconds'))
  train = open_source('tfds:librispeech/default:2.*.*', 'train_clean100')
  assert len(train) == 6
  for position in range(6):
    utterance = train[position]
    original = SPEECH[int(utterance.id[-4:])]
    assert utterance.text == original.text.upper() and utterance.speaker == utterance.id[:3]
    assert (utterance.language, utterance.license) == ('en', 'CC-BY-4.0')
    assert utterance.content.samples.dtype == np.int16 and utterance.content.sample_rate == 16_000
    assert utterance.load(16_000).tobytes() == original.load(16_000).tobytes()
    assert utterance.name == f'librispeech-train_clean100.array_record-00000-of-00001:{utterance.name.split(":")[1]}'
  assert {encoded[i].content for i in range(10)} == {utterance.encoded() for utterance in SPEECH}
  refused('tfds:librispeech:3.0.0', 'not prepared in')
  refused('tfds:librispeech/other', r'run "tfds build librispeech/other --file_format=array_record"')


def test_converted_and_older_datasets(tmp_path):
  folder = write_tfds_librispeech(SPEECH[:2], tmp_path)
  path = folder / 'features.json'
  content = json.loads(path.read_text())
  del content['featuresDict']['features']['speech']['audio']['encoding']  # older ones have none
  path.write_text(json.dumps(content))
  path = folder / 'dataset_info.json'  # what "tfds convert_format" leaves in the folder of a tfrecord dataset
  path.write_text(json.dumps({**json.loads(path.read_text()), 'fileFormat': 'tfrecord',
                              'alternativeFileFormats': ['array_record']}))
  source = open_source(f'tfds:{folder}')
  assert not source.shard_faults and {source[i].load(16_000).tobytes() for i in range(2)} == {
    utterance.load(16_000).tobytes() for utterance in SPEECH[:2]}


def test_no_tensorflow_is_imported(tmp_path):
  program = '''
import sys
from pathlib import Path
from _corpus_formats import as_in_a_worker, utterances, write_tfds_librispeech
from lmspt_jax.data.sources import open_source
write_tfds_librispeech(utterances(3), Path(sys.argv[1]))
source = as_in_a_worker(open_source('tfds:librispeech'))
print('read', sum(len(source[i].load(16_000)) for i in range(3)))
print('loaded', [name for name in ('tensorflow', 'jax', 'flax', 'torch') if sys.modules.get(name)])
'''
  data_dir = tmp_path / 'tfds'
  here = Path(__file__).resolve().parent
  environment = {**os.environ, 'TFDS_DATA_DIR': str(data_dir), 'PYTHONPATH': f'{here.parent}{os.pathsep}{here}'}
  command = [sys.executable, '-c', program, str(data_dir)]
  result = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert result.returncode == 0, result.stderr
  expected = sum(len(samples_of(utterance)) for utterance in utterances(3))
  assert result.stdout.splitlines()[-2:] == [f'read {expected}', 'loaded []']


def test_the_builder_of_the_project(corpus):
  source = open_source(f'tfds:{corpus}')
  assert len(source) == 10
  for position in range(10):
    utterance = source[position]
    original = BY_ID[utterance.id]
    found = {**source.index.labels(position), 'seconds': source.index.value(position, 'seconds')}
    assert found == metadata_of(original)
    assert np.array_equal(utterance.decode()[0], original.decode()[0]) and utterance.decode()[1] == 16_000
  copy = as_in_a_worker(open_source(f'tfds:{corpus}', 'valid'))
  assert [copy[i].id for i in range(4)] == [utterance.id for utterance in SPEECH[6:]]


@pytest.mark.parametrize('audio', [False, True])
@pytest.mark.parametrize(('dtype', 'channels', 'encoding', 'kind'), [
  (np.int64, (), 'none', np.int16), (np.int16, (), 'zlib', np.int16), (np.float32, (), 'bytes', np.float32),
  (np.int32, (2,), 'none', np.int16)])
def test_kinds_of_samples(tmp_path, dtype, channels, encoding, kind, audio):
  def example(utterance):
    samples = samples_of(utterance)
    samples = (samples / np.float32(32768) if kind is np.float32 else samples).astype(dtype)
    return {'voice': np.stack([samples, samples], 1) if channels else samples}

  folder = build_tfds('kinds', {'voice': tensor(dtype, (None, *channels), encoding)}, example, SPEECH[:2], tmp_path,
                      num_shards=2, metadata={'sample_rate': 16_000})
  if audio:
    say_audio(folder, 'voice', channels, dtype=np.dtype(dtype).name, encoding=encoding.upper())
  source = open_source(f'tfds:{folder}')
  assert [source[i].id for i in range(2)] == ['train:0', 'train:1']  # the features have none
  found = {source[i].load(16_000).tobytes() for i in range(2)}
  assert found == {utterance.load(16_000).tobytes() for utterance in SPEECH[:2]}
  assert source[0].content.samples.dtype == kind


def test_labels_and_other_features(tmp_path):
  features = {'audio': tensor(np.int16), 'noise': tensor(np.int16), 'sample_rate': np.int32, 'lang': np.str_,
              'speaker': tfds.features.ClassLabel(names=['ann', 'bob']), 'snr': np.float32,
              'transcript': tfds.features.Sequence(tfds.features.Text()), 'license': tensor(np.str_, (2,)),
              'nested': {'text': tfds.features.Text()}}

  def example(utterance):
    return {'audio': samples_of(utterance), 'noise': np.zeros(3, np.int16), 'sample_rate': 8000, 'lang': 'en',
            'speaker': 'bob', 'snr': 20.5, 'transcript': ['a', 'b'], 'license': ['MIT', 'BSD'],
            'nested': {'text': 'no'}}

  source = open_source(f'tfds:{build_tfds("labelled", features, example, SPEECH[:1], tmp_path)}')
  utterance = source[0]
  assert (utterance.text, utterance.language, utterance.speaker, utterance.license) == ('', 'en', 'bob', '')
  assert source.index.number_columns == ['seconds', 'sample_rate', 'snr'] and source.index.value(0, 'snr') == 20.5
  assert isinstance(utterance.content, Pcm) and utterance.content.sample_rate == 8000
  assert source.index.value(0, 'seconds') == len(samples_of(SPEECH[0])) / 8000


# ---------------------------------------------------------------- the index and open files


def test_the_index_is_cached_by_shard(copied, tmp_path, monkeypatch):
  first = open_source(f'tfds:{copied}')
  read, example = [], tfds_source._Reader.example
  monkeypatch.setattr(tfds_source._Reader, 'example', lambda *args: read.append(args[1]) or example(*args))
  again = open_source(f'tfds:{copied}')
  assert not read and again.index.table.equals(first.index.table)
  touched = shard_of(copied, 'valid')
  os.utime(touched, ns=(1, 1))
  assert open_source(f'tfds:{copied}').index.table.equals(first.index.table)
  assert set(read) == {touched.name}


def test_open_shards_are_bounded(corpus, monkeypatch):
  monkeypatch.setattr(tfds_source, 'MAX_OPEN', 2)
  source = open_source(f'tfds:{corpus}')
  for _ in range(2):
    for position in range(10):
      assert source[position].load(16_000).size
  links = [os.readlink(path) for path in Path('/proc/self/fd').iterdir() if path.is_symlink() and path.exists()]
  assert 1 <= sum(link.startswith(str(corpus)) for link in links) <= 2


# ---------------------------------------------------------------- damage


def test_broken_shards_are_listed_and_the_others_used(copied):
  cut, gone = shard_of(copied, 'train'), shard_of(copied, 'valid', 1)
  count = {path.name: len([1 for i in range(10) if source.shard(i) == path.name])
           for source in [open_source(f'tfds:{copied}')] for path in (cut, gone)}
  whole = cut.read_bytes()
  cut.write_bytes(whole[:len(whole) // 2])
  gone.unlink()
  source = open_source(f'tfds:{copied}')
  assert len(source) == 10 - sum(count.values()) and all(count.values())
  assert all(source[i].load(16_000).size for i in range(len(source)))
  assert [(fault.shard, fault.reason) for fault in source.shard_faults] == [
    (cut.name, 'corrupt record'), (gone.name, 'missing')]
  assert all('\n' not in fault.message and fault.shard in fault.message for fault in source.shard_faults)
  cut.write_bytes(whole)  # no fault is remembered
  assert len(open_source(f'tfds:{copied}')) == 10 - count[gone.name]
  for path in copied.glob('*.array_record-*'):
    path.write_bytes(b'nothing of use')
  refused(f'tfds:{copied}', r'none of its \d examples can be read; prepare it again')


def test_damaged_examples_are_faults_of_their_utterances(copied):
  path = shard_of(copied, 'train')
  source = open_source(f'tfds:{copied}')
  rows = [i for i in range(10) if source.shard(i) == path.name]
  bad, = (i for i in rows if source.name(i) == f'{path.name}:0')
  assert len(rows) == 2
  data = bytearray(path.read_bytes())
  data[len(data) // 4:len(data) // 4 + 100] = bytes(100)
  path.write_bytes(data)
  expected = fault(source, bad)  # by an index that is older than the damage
  assert expected.reason == 'corrupt record' and str(expected).startswith(f'{path.name}:0: damaged example (')
  source = open_source(f'tfds:{copied}')
  assert len(source) == 10 and not source.shard_faults
  bad, = (i for i in range(10) if source.name(i) == f'{path.name}:0')
  assert str(fault(source, bad)) == str(expected)
  assert all(source[i].load(16_000).size for i in range(10) if i != bad)
  path.unlink()
  assert fault(as_in_a_worker(source), bad).reason == 'missing'


def test_samples_that_cannot_be_used(tmp_path):
  samples = iter([np.array([0, 40_000, 5]), np.zeros(0, np.int64), np.array([1, 2, 3])])
  features = {'audio': tensor(np.int64), 'rate_of': np.int32}
  folder = build_tfds('unusable', features, lambda _: {'audio': next(samples), 'rate_of': 1}, SPEECH[:3], tmp_path,
                      metadata={'sample_rate': 16_000})
  source = open_source(f'tfds:{folder}')
  found = {}
  for position in range(3):
    try:
      found[len(source[position].content.samples)] = 'used'
    except AudioError as error:
      found[error.reason] = str(error).partition(': ')[2]
  assert found == {3: 'used', 'empty': 'holds no samples; remove it',
                   'undecodable': 'samples beyond 16 bits, of unknown full scale; prepare it with lazy_decode'}
  assert np.isnan(source.index.numbers('seconds')).sum() == 2


def test_what_cannot_be_read_is_refused_in_one_line(copied, tmp_path, monkeypatch):
  refused('tfds:no_such_set', r'not prepared in .*/tfds; run "tfds build no_such_set --file_format=array_record"')
  refused(f'tfds:{tmp_path}/absent/1.0.0', r'no folder with features\.json')
  def edited(file, old, new):
    folder = Path(shutil.copytree(copied, tmp_path / f'edited-{len(list(tmp_path.iterdir()))}'))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return f'tfds:{folder}'

  refused(edited('dataset_info.json', '"array_record"', '"tfrecord"'),
          r'prepared as tfrecord, which has no random access; run "tfds convert_format --dataset_version_dir=')
  refused(edited('dataset_info.json', '{', '['), r"dataset_info\.json or features\.json can't be read")
  refused(edited('features.json', '{', ''), r"dataset_info\.json or features\.json can't be read")
  refused(edited('features.json', '"int16"', '"bool"'), 'has no feature of audio; it must have one')
  refused(edited('metadata.json', 'sample_rate', 'rate_of'), "feature 'speech' has no sample rate; add sample_rate to")
  monkeypatch.setenv('TFDS_DATA_DIR', 's3://bucket/tfds')
  refused('tfds:librispeech', r"TFDS_DATA_DIR = s3://bucket/tfds: examples can't be read from a store; copy the folder")

  two = {name: tensor(np.int16) for name in ('left', 'right')}
  folder = build_tfds('two', two, lambda utterance: dict.fromkeys(two, samples_of(utterance)), SPEECH[:1], tmp_path)
  refused(f'tfds:{folder}', 'has several features of audio, left, right; it must have one')
  latin = {'speech': tensor(np.int16), 'text': np.str_}
  folder = build_tfds('latin', latin, lambda utterance: {'speech': samples_of(utterance), 'text': b'Gr\xfc\xdfe'},
                      SPEECH[:1], tmp_path, metadata={'sample_rate': 16_000})
  refused(f'tfds:{folder}', r'latin-train\.array_record-00000-of-00001:0: feature text is not UTF-8')


def test_modules_that_features_json_names_are_not_imported(copied, tmp_path, monkeypatch):
  (tmp_path / 'of_a_stranger.py').write_text('raise SystemExit("imported")\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  path = copied / 'features.json'
  text = path.read_text()
  for known in ('tensor_feature.Tensor', 'text_feature.Text', 'features_dict.FeaturesDict'):
    assert f'tensorflow_datasets.core.features.{known}' in text
    path.write_text(text.replace(f'tensorflow_datasets.core.features.{known}', 'of_a_stranger.Feature'))
    assert len(open_source(f'tfds:{copied}')) == 10


def test_features_json_is_what_tfds_writes_for_its_own_librispeech(tmp_path):
  """As TFDS 4.9.10 with TensorFlow 2.21 writes it: the fake dataset of these tests must not drift from that."""
  folder = write_tfds_librispeech(SPEECH[:1], tmp_path)
  features = json.loads((folder / 'features.json').read_text())['featuresDict']['features']
  assert features['speech'] == {
    'pythonClassName': 'tensorflow_datasets.core.features.audio_feature.Audio',
    'audio': {'dtype': 'int16', 'encoding': 'NONE', 'fileFormat': 'flac', 'sampleRate': '16000',
              'shape': {'dimensions': ['-1']}}}
  scalar = 'tensorflow_datasets.core.features.tensor_feature.Tensor'
  for name, kind in (('id', 'string'), ('speaker_id', 'int64'), ('chapter_id', 'int64')):
    assert features[name] == {'pythonClassName': scalar, 'tensor': {'dtype': kind, 'encoding': 'none', 'shape': {}}}
  assert features['text'] == {'pythonClassName': 'tensorflow_datasets.core.features.text_feature.Text', 'text': {}}
