"""webdataset: sources, local and in stores: pairs of audio and text, broken and hostile tars. Real speech."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from _object_store import s3, serve_folder, serve_gcs, upload

from lmspt_jax.config import DataConfig
from lmspt_jax.data.audio_io import write_wav
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.pipeline import training_batches
from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.sources import open_source, webdataset
from lmspt_jax.data.sources.folder import ASSETS
from lmspt_jax.data.storage import remote
from lmspt_jax.errors import LmsptError

SPEECH = open_source('package:speech_sample')
FIELDS = ('text', 'split', 'language', 'speaker', 'license')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(remote, '_WAIT', 0.01)
  return tmp_path / 'cache'


def header(name: str, size: int, format: int = tarfile.PAX_FORMAT, **fields) -> bytes:
  info = tarfile.TarInfo(name)
  info.size = size
  for field, value in fields.items():
    setattr(info, field, value)
  return info.tobuf(format)


def member(name: str, content: bytes, **fields) -> bytes:
  """A member as it stands in a tar."""
  return header(name, len(content), **fields) + content + bytes(-len(content) % 512)


END = bytes(1024)


def metadata(utterance) -> bytes:
  return json.dumps({'id': utterance.id, **{name: getattr(utterance, name) for name in FIELDS}}).encode()


def pairs(rows, **fields) -> bytes:
  """The members of some of the sample's utterances, with their metadata as json."""
  parts = []
  for row in rows:
    key = f'{row:06d}'
    parts += [member(f'{key}.json', metadata(SPEECH[row]), **fields),
              member(f'{key}.flac', SPEECH[row].encoded(), **fields)]
  return b''.join(parts)


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
  """The sample in four tars."""
  folder = tmp_path_factory.mktemp('tars')
  for number in range(4):
    (folder / f'{number:02d}.tar').write_bytes(pairs(range(number, len(SPEECH), 4)) + END)
  return folder


def opened(folder, content: bytes):
  """A source of one sound tar, with metadata, and one of the given content."""
  (folder / 'sound.tar').write_bytes(pairs([0, 1]) + END)
  return opened_alone(folder, content, '*')


def opened_alone(folder, content: bytes, name='0'):
  (folder / '0.tar').write_bytes(content)
  return open_source(f'webdataset:{folder}/{name}.tar')


def contents(source) -> list[tuple]:
  """(labels, hash of the audio's bytes) of every utterance."""
  return [(*(getattr(utterance, name) for name in ('id', *FIELDS)), hashlib.sha256(utterance.encoded()).hexdigest())
          for utterance in map(source.__getitem__, range(len(source)))]


def faults(source) -> list[tuple[str, str]]:
  assert all('\n' not in fault.message and fault.shard in fault.message for fault in source.shard_faults)
  return [(os.path.basename(fault.shard), fault.reason) for fault in source.shard_faults]


# ---------------------------------------------------------------- what is in a tar


def test_the_same_utterances_as_a_folder(tars):
  source = open_source(f'webdataset:{tars}/{{00..03}}.tar')
  assert contents(source) == contents(SPEECH) and source.index.fingerprint() == SPEECH.index.fingerprint()
  assert source.shard_faults == () and source.root == str(tars)
  assert source.shard(0).startswith(str(tars)) and source.name(0) == f'{source.shard(0)}:{source[0].id}'
  with source[5].open() as file, SPEECH[5].open() as other:
    assert np.array_equal(file.read(8000), other.read(8000))
  assert contents(open_source(f'webdataset:{tars}/*.tar', 'valid')) == contents(
    open_source('package:speech_sample', 'valid'))


def test_the_same_training_batches_as_a_folder(tars):
  assert batches(f'webdataset:{tars}/*.tar') == batches('package:speech_sample')


def batches(uri: str, workers: int = 0) -> list[str]:
  config = DataConfig(train=uri, held_out=uri, batch_size=4, num_workers=workers)
  with training_batches(config, sample_rate=16_000, crop_samples=32_000, seed=1) as iterator:
    return [hashlib.sha256(b''.join(batch[key].tobytes() for key in ('audio', 'num_samples', 'index'))).hexdigest()
            for batch in (next(iterator) for _ in range(5))]


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar_and_long_names(tmp_path, format):
  folder = 'long/' * (30 if format == tarfile.USTAR_FORMAT else 60)
  name = folder + ('é' if format == tarfile.PAX_FORMAT else 'e')
  audio = member(f'{name}.flac', SPEECH[0].encoded(), format=format)
  text = member(f'{name}.TXT', b' said \n', format=format)
  more = member('short.flac', SPEECH[1].encoded(), format=format)
  source = opened_alone(tmp_path, member('folder', b'', type=tarfile.DIRTYPE) + audio + text + more + END)
  assert set(source.index.table.column('id').to_pylist()) == {name, 'short'}
  row = source.index.table.column('id').to_pylist().index(name)
  assert source[row].text == 'said' and source[row].encoded() == SPEECH[0].encoded()
  assert faults(source) == []


def test_a_tar_written_by_gnu_tar(tmp_path):
  for row in range(4):
    key = tmp_path / 'in' / ('x' * 90) / ('y' * 60) / f'{row}'
    key.parent.mkdir(parents=True, exist_ok=True)
    key.with_suffix('.flac').write_bytes(SPEECH[row].encoded())
    key.with_suffix('.json').write_bytes(metadata(SPEECH[row]))
  for format in ('gnu', 'posix', 'ustar'):
    out = tmp_path / f'{format}.tar'
    subprocess.run(['tar', f'--format={format}', '-C', tmp_path / 'in', '-cf', out, '.'], check=True)
    source = open_source(f'webdataset:{out}')
    assert contents(source) == sorted(contents(SPEECH.select([0, 1, 2, 3])), key=lambda row: (row[2], row[0]))
    assert source.shard_faults == ()


def test_a_member_past_8_gigabytes(tmp_path):
  """Its size is in base 256; the tar has a hole where its bytes would be."""
  size = 9 << 30
  start = header('big.wav', size, format=tarfile.GNU_FORMAT)
  with open(tmp_path / 'big.tar', 'wb') as file:
    file.write(start)
    file.seek(len(start) + size)
    file.write(member('small.flac', SPEECH[0].encoded()) + END)
  source = open_source(f'webdataset:{tmp_path}/big.tar')
  rows = {source.index.value(row, 'id'): row for row in range(2)}
  assert source.index.value(rows['big'], 'size') == size
  assert source[rows['small']].encoded() == SPEECH[0].encoded()
  with pytest.raises(AudioError, match='so cut it up') as caught:
    source[rows['big']].encoded()
  assert caught.value.reason == 'too large'


def test_kinds_of_audio_and_text(tmp_path):
  write_wav(tmp_path / 'x.wav', SPEECH[1].load(16_000), 16_000)
  emilia = {'id': 'EN_B00000_S00000_W000000', 'wav': 'EN_B00000/x.mp3', 'text': ' Hm.', 'duration': 3.25,
            'speaker': 'EN_B00000_S00000', 'language': 'en', 'dnsmos': 3.2927}
  source = opened_alone(tmp_path, b''.join([
    member('EN_B00000/e.mp3', b'mp3'), member('EN_B00000/e.json', json.dumps(emilia).encode()),
    member('b.wav', (tmp_path / 'x.wav').read_bytes()), member('b.lab', b'lab'), member('b.txt', b'said'),
    member('b.json', b'{"speaker": 84}'), member('b.png', b'?'),
    member('c.original.txt', b'?'), member('c.normalized.txt', b'normal'), member('c.flac', SPEECH[0].encoded()),
    member('d.opus', b'opus'), member('README.md', b'?'), member('.hidden.flac', b'?'), member('._d.flac', b'?'),
    member('f.json', b'{"text": "no audio"}')]) + END)
  found = {source[row].id: source[row] for row in range(len(source))}
  assert set(found) == {'EN_B00000_S00000_W000000', 'b', 'c', 'd'}
  assert (found['b'].text, found['b'].speaker, found['c'].text, found['d'].text) == ('said', '84', 'normal', '')
  with found['b'].open() as file:
    assert file.format == 'WAV'
  first = found['EN_B00000_S00000_W000000']
  assert (first.text, first.language, first.speaker) == (' Hm.', 'en', 'EN_B00000_S00000')
  row = source.index.table.column('id').to_pylist().index(first.id)
  assert source.index.value(row, 'seconds') == 3.25 and source.index.value(row, 'dnsmos') == 3.2927
  assert faults(source) == []


def test_keys_that_are_used_in_every_tar(tmp_path):
  for number in range(2):
    (tmp_path / f'part{number}.tar').write_bytes(member('000.flac', SPEECH[number].encoded()) + END)
  source = open_source(f'webdataset:{tmp_path}/part{{0,1}}.tar')
  assert {source[row].id for row in range(2)} == {'part0/000', 'part1/000'}


# ---------------------------------------------------------------- broken and hostile tars


def test_a_truncated_tar_gives_what_lies_before_the_break(tmp_path):
  whole = pairs(range(2, 8))
  for cut, kept in ((len(whole) + 512, 6), (len(whole) - 1000, 5), (len(whole), 6), (700, 0)):
    content = whole[:cut] + bytes(max(0, cut - len(whole)))
    source = opened(tmp_path, content)
    if cut > len(whole):  # one empty block will do
      assert faults(source) == []
    else:
      assert faults(source) == [('0.tar', 'truncated')]
      assert f'cut short after {cut} bytes; fetch it again' in source.shard_faults[0].message
    assert len(source) == 2 + kept
    assert {row[0] for row in contents(source)} == {SPEECH[row].id for row in [0, 1, *range(2, 2 + kept)]}


def test_audio_before_a_break_with_its_text_behind_it_is_left_out(tmp_path):
  content = pairs([2]) + member('000003.flac', SPEECH[3].encoded()) + member('000003.json', metadata(SPEECH[3]))
  source = opened(tmp_path, content[:-700])
  assert [row[0] for row in contents(source)] == sorted(SPEECH[row].id for row in range(3))


def test_a_damaged_header_ends_the_tar(tmp_path):
  broken = bytearray(pairs([2]) + member('x.flac', b'x') + pairs([3]) + END)
  broken[len(pairs([2])) + 3] ^= 1  # the name, so that the checksum is wrong
  source = opened(tmp_path, bytes(broken))
  assert faults(source) == [('0.tar', 'undecodable')] and len(source) == 3
  assert f'damaged at byte {len(pairs([2]))} (bad checksum)' in source.shard_faults[0].message


def negative() -> bytes:
  """A header with a size of -512 and a right checksum."""
  block = bytearray(header('x.flac', 0, format=tarfile.GNU_FORMAT))
  block[124:136] = b'\xff' * 10 + b'\xfe\x00'
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


@pytest.mark.parametrize('content, reason', [
    (negative() + bytes(2048), 'undecodable'),
    (header('x.flac', 1 << 40, format=tarfile.GNU_FORMAT) + bytes(1024), 'truncated'),
    (header('x.flac', 1 << 70, format=tarfile.GNU_FORMAT) + bytes(1024), 'truncated'),
    (header('x.flac', 10, pax_headers={'size': '9' * 4000}) + bytes(1024), 'undecodable'),
    (header('x.flac', 10, pax_headers={'size': '-1'}) + bytes(1024), 'undecodable'),
    (member('x', b'99999999 path=y\n', type=tarfile.XHDTYPE) + member('x.flac', b'x') + END, 'undecodable'),
    (member('x', b'path=y', type=tarfile.XHDTYPE) + member('x.flac', b'x') + END, 'undecodable'),
    (member('x', b'0 a=b\n', type=tarfile.XHDTYPE) + member('x.flac', b'x') + END, 'undecodable'),
    (header('x', 5 << 20, type=tarfile.XHDTYPE) + bytes(6 << 20), 'undecodable'),
    (header('x', 5 << 20, type=tarfile.GNUTYPE_LONGNAME) + bytes(6 << 20), 'undecodable'),
    (header('x.flac', 512, type=tarfile.GNUTYPE_SPARSE) + bytes(1024), 'undecodable'),
    (b'<html>no such bucket</html>' * 100, 'undecodable'),
    (b'', 'truncated'),
    (bytes(100), 'truncated'),
])
def test_lying_headers(tmp_path, content, reason):
  source = opened(tmp_path, pairs([2]) + content if len(content) > 100 else content)
  assert faults(source) == [('0.tar', reason)]
  assert len(source) == (3 if len(content) > 100 else 2)


def test_hostile_members_are_left_out_and_named(tmp_path):
  speech = SPEECH[3].encoded()
  (tmp_path / 'tars').mkdir()
  inside = tmp_path / 'tars'
  hostile = [member(name, speech) for name in ('../../evil.flac', '/evil/a.flac', 'a/../../evil.flac', 'a\\evil.flac')]
  hostile += [member('evil.flac', speech, pax_headers={'path': '../../pax.flac'}),
              member('link.flac', b'', type=tarfile.SYMTYPE, linkname='/etc/passwd'),
              header('hard.flac', 5000, type=tarfile.LNKTYPE, linkname='000000.flac'),
              member('null.flac', b'', type=tarfile.CHRTYPE), member('pipe.flac', b'', type=tarfile.FIFOTYPE),
              member('hole.flac', speech, pax_headers={'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'})]
  before = sorted(tmp_path.rglob('*'))
  source = opened(inside, pairs([2]) + b''.join(hostile) + pairs([3]) + END)
  assert {row[0] for row in contents(source)} == {SPEECH[row].id for row in range(4)}
  assert faults(source) == [('0.tar', 'corrupt record')]
  assert f"'../../evil.flac' is a name that leads out of the tar and {len(hostile) - 1} more: left out" in (
    source.shard_faults[0].message)
  new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob('*')) - set(before)}
  assert new == {'tars', 'cache'} and sorted(path.name for path in inside.iterdir()) == ['0.tar', 'sound.tar']
  assert not list(tmp_path.rglob('*.flac')) and not (tmp_path.parent / 'evil.flac').exists()


@pytest.mark.parametrize('text', [
    b'[1]', b'3', b'{"id": ', b'\xff\xfe', b'[' * 100_000, b'{"text": ["list"]}', b'{"split": "a b"}', b'1' * 10_000,
    b'{"text": "\\ud800"}', b' ' * (2 << 20) + b'{}',
])
def test_metadata_that_is_none(tmp_path, text):
  source = opened(tmp_path, member('x.flac', SPEECH[2].encoded()) + member('x.json', text) + pairs([3]) + END)
  assert [row[0] for row in contents(source)] == sorted([SPEECH[row].id for row in (0, 1, 3)])
  assert faults(source) == [('0.tar', 'corrupt record')]
  assert f'{tmp_path}/0.tar:x.json' in source.shard_faults[0].message
  assert len(source.shard_faults[0].message) < 400


def test_metadata_with_ever_new_names(tmp_path):
  """Each name of a number is a column of the index, so a few thousand files could fill the memory."""
  texts = [json.dumps({'dnsmos': 3, **{f'{row}-{number}': 1 for number in range(60)}}).encode() for row in range(9)]
  parts = [member(f'{row}.flac', b'x') + member(f'{row}.json', text) for row, text in enumerate(texts)]
  source = opened_alone(tmp_path, b''.join(parts) + END)
  assert len(source) == 9 and not source.shard_faults
  assert len(source.index.number_columns) == 65 and 'dnsmos' in source.index.number_columns


def test_a_transcript_that_is_not_text(tmp_path):
  source = opened(tmp_path, member('x.flac', SPEECH[2].encoded()) + member('x.txt', b'\xe9t\xe9') + END)
  assert len(source) == 2 and '0.tar:x.txt: not UTF-8 text' in source.shard_faults[0].message


def test_names_that_are_not_unicode(tmp_path):
  block = bytearray(header('eee.flac', 0, format=tarfile.USTAR_FORMAT))
  block[0:3] = b'\xe9t\xe9'
  block[124:135] = b'%011o' % len(SPEECH[2].encoded())
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  data = SPEECH[2].encoded()
  source = opened_alone(tmp_path, bytes(block) + data + bytes(-len(data) % 512) + END)
  assert [row[0] for row in contents(source)] == ['été'] and faults(source) == []


def test_duplicates_are_left_out_and_named(tmp_path):
  again = member('000002.flac', SPEECH[5].encoded()) + member('000002.mp3', b'mp3')
  same_id = member('x.flac', SPEECH[4].encoded()) + member('x.json', metadata(SPEECH[3]))
  source = opened(tmp_path, pairs([2, 3]) + again + same_id + END)
  assert {row[0]: row[-1] for row in contents(source)} == {
    SPEECH[row].id: hashlib.sha256(SPEECH[row].encoded()).hexdigest() for row in range(4)}
  assert faults(source) == [('0.tar', 'corrupt record')]
  assert "0.tar:000002.flac: a second recording of '000002' and 2 more: left out" in source.shard_faults[0].message


def test_an_empty_member_is_a_fault_of_that_utterance(tmp_path):
  source = opened_alone(tmp_path, member('x.flac', b'') + member('y.flac', SPEECH[2].encoded()) + END)
  row = source.index.table.column('id').to_pylist().index('x')
  with pytest.raises(AudioError, match=r'0\.tar:x: the file is empty; give it audio or remove it') as caught:
    _ = source[row]
  assert caught.value.reason == 'empty' and faults(source) == []


@pytest.mark.parametrize('mode', ['gz', 'bz2', 'xz'])
def test_compressed_tars_are_refused_in_one_line(tmp_path, mode):
  with tarfile.open(tmp_path / f'a.tar.{mode}', f'w:{mode}') as file:
    file.addfile(tarfile.TarInfo('x.flac'), io.BytesIO())
  with tarfile.open(tmp_path / 'renamed.tar', f'w:{mode}') as file:
    file.add(ASSETS / 'speech_sample' / 'manifest.jsonl')
  (tmp_path / 'tiny.tar').write_bytes((tmp_path / f'a.tar.{mode}').read_bytes())
  for name in (f'a.tar.{mode}', 'renamed.tar', 'tiny.tar'):
    with pytest.raises(LmsptError, match=f'{name}: is compressed, so .*; unpack it') as caught:
      open_source(f'webdataset:{tmp_path}/{name}')
    assert '\n' not in str(caught.value)


def test_nothing_that_can_be_used(tmp_path):
  with pytest.raises(LmsptError, match=r'no tars; write a pattern such as DIR/\{000\.\.099\}\.tar'):
    open_source(f'webdataset:{tmp_path}/*.tar')
  with pytest.raises(LmsptError, match=r'no tars; write a pattern'):
    open_source(f'webdataset:{tmp_path}')
  with pytest.raises(LmsptError, match=r'none of its 1 tars can be used, .*none\.tar: can\'t be read \(No such file'):
    open_source(f'webdataset:{tmp_path}/none.tar')
  for number in range(2):
    (tmp_path / f'{number}.tar').write_bytes(pairs([2, 3])[:-1000])
  with pytest.raises(LmsptError, match=r'none of its 2 tars can be used, .*0\.tar: cut short after'):
    open_source(f'webdataset:{tmp_path}/{{0,1}}.tar')
  (tmp_path / '0.tar').write_bytes(member('../x.flac', SPEECH[0].encoded()) + END)
  with pytest.raises(LmsptError, match=r'none of its 1 tars can be used, .* leads out of the tar: left out'):
    open_source(f'webdataset:{tmp_path}/0.tar')
  (tmp_path / '0.tar').write_bytes(END)
  with pytest.raises(LmsptError, match='no utterances'):
    open_source(f'webdataset:{tmp_path}/0.tar')


def test_a_missing_tar_of_a_list(tars, tmp_path):
  source = open_source(f'webdataset:{tars}/{{00..05}}.tar')
  assert faults(source) == [('04.tar', 'missing'), ('05.tar', 'missing')] and len(source) == len(SPEECH)


# ---------------------------------------------------------------- the index


def index_files(cache: Path) -> dict[str, int]:
  return {path.name: path.stat().st_mtime_ns for path in (cache / 'index').iterdir()}


def test_a_new_tar_is_the_only_one_that_is_indexed(tars, tmp_path, cache):
  for number in range(3):
    (tmp_path / f'{number}.tar').write_bytes((tars / f'0{number}.tar').read_bytes())
  first = open_source(f'webdataset:{tmp_path}/*.tar')
  before = index_files(cache)
  assert sum(name.startswith('tar-') for name in before) == 3
  assert contents(open_source(f'webdataset:{tmp_path}/*.tar')) == contents(first) and index_files(cache) == before
  (tmp_path / '3.tar').write_bytes((tars / '03.tar').read_bytes())
  assert contents(open_source(f'webdataset:{tmp_path}/*.tar')) == contents(SPEECH)
  after = index_files(cache)
  assert sum(name.startswith('tar-') for name in set(after) - set(before)) == 1
  assert before.items() <= after.items()
  (tmp_path / '0.tar').write_bytes(pairs([0]) + END)  # changed: indexed again
  assert len(open_source(f'webdataset:{tmp_path}/*.tar')) == len(SPEECH) - 15


def test_two_thousand_tars(tmp_path, monkeypatch):
  """Few open and mapped files while they are indexed, and opening them again takes no time."""
  mapped, assemble = [], webdataset.assemble

  def counting(tables, *, name):
    mapped.append(Path('/proc/self/maps').read_text().count('/tar-'))
    return assemble(tables, name=name)

  monkeypatch.setattr(webdataset, 'assemble', counting)
  for number in range(2000):
    (tmp_path / f'{number:04d}.tar').write_bytes(member(f'{number}.flac', b'fLaC') + END)
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 40, limit[1]))
  try:
    assert len(open_source(f'webdataset:{tmp_path}/{{0000..1999}}.tar')) == 2000
    before = time.monotonic()
    source = open_source(f'webdataset:{tmp_path}/{{0000..1999}}.tar')
    assert time.monotonic() - before < 0.5 and len(mapped) == 1 and mapped[0] < 10
    for row in range(2000):
      with source[row].content.open(name='x') as file:
        assert file.read() == b'fLaC'
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_audio_is_not_read_for_the_index(tmp_path):
  size = 1 << 20
  (tmp_path / '0.tar').write_bytes(
    b''.join(member(f'{row}.wav', bytes(size)) + member(f'{row}.json', b'{}') for row in range(20)) + END)
  before = int(Path('/proc/self/io').read_text().split()[1])
  assert len(open_source(f'webdataset:{tmp_path}/0.tar')) == 20
  assert int(Path('/proc/self/io').read_text().split()[1]) - before < size
  server = serve_folder(tmp_path)
  assert len(open_source(f'webdataset:{server.url}/0.tar')) == 20
  assert server.sent < size and len(server.requests) <= 22
  server.close()


# ---------------------------------------------------------------- stores


@pytest.fixture(scope='module')
def stored(tars, tmp_path_factory):
  """URLs of the sample in a bucket: as tars, as a folder, as shards."""
  shards = tmp_path_factory.mktemp('shards')
  prepare('package:speech_sample', shards, num_shards=3)
  return {'webdataset': upload(tars, 'tars'), 'folder': upload(ASSETS / 'speech_sample', 'folder'),
          'arrayrecord': upload(shards, 'shards'), 'shards': f'arrayrecord:{shards}'}


def uris(stored) -> dict[str, tuple[str, str]]:
  """Kind -> (in the bucket, here)."""
  return {'webdataset': (f'webdataset:{stored["webdataset"]}/{{00..03}}.tar', 'package:speech_sample'),
          'folder': (f'folder:{stored["folder"]}', 'package:speech_sample'),
          'arrayrecord': (f'arrayrecord:{stored["arrayrecord"]}', stored['shards'])}


@pytest.mark.parametrize('kind', ['webdataset', 'folder', 'arrayrecord'])
def test_a_bucket_gives_what_local_files_give(stored, kind):
  there, here = uris(stored)[kind]
  s3().forget()
  source = open_source(there)
  assert source.shard_faults == ()
  assert contents(source) == contents(open_source(here))
  s3().forget()
  contents(source)
  assert s3().requests == []  # all of it is cached
  assert batches(there) == batches('package:speech_sample')


def test_worker_processes_read_from_a_bucket(stored):
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    for there, here in uris(stored).values():
      assert pool.apply(contents, (open_source(there),)) == contents(open_source(here))


def test_training_with_workers_reads_from_a_bucket(stored):
  assert batches(uris(stored)['webdataset'][0], workers=2) == batches('package:speech_sample')


@pytest.mark.parametrize('workers', [0, 1])
def test_requests_overlap(tars, workers):
  """A store answers after tens of milliseconds, so a process that waits for each answer would starve the devices."""
  server = serve_folder(tars)
  source = open_source(f'webdataset:{server.url}/{{00..03}}.tar')
  answer, lock, under_way, most = server.answer, threading.Lock(), 0, 0

  def slowly(*request):
    nonlocal under_way, most
    with lock:
      under_way += 1
      most = max(most, under_way)
    time.sleep(0.02)
    with lock:
      under_way -= 1
    return answer(*request)
  server.answer = slowly
  assert batches(source.uri, workers=workers) == batches('package:speech_sample')
  assert most > 3


def test_a_pattern_in_a_bucket(stored):
  source = open_source(f'webdataset:{stored["webdataset"]}/*.tar')
  assert contents(source) == contents(SPEECH) and source.root == stored['webdataset']
  assert faults(open_source(f'webdataset:{stored["webdataset"]}/{{03..04}}.tar')) == [('04.tar', 'missing')]


def test_a_bucket_without_a_manifest(tmp_path):
  for name in ('a/1.flac', 'b c/2#.FLAC', '.hidden/3.flac', 'a/notes.txt'):
    (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'in' / name).write_bytes(SPEECH[0].encoded())
  url = upload(tmp_path / 'in', 'listing')
  source = open_source(f'folder:{url}/')
  assert contents(source) == contents(open_source(f'folder:{tmp_path}/in')) and len(source) == 2
  with pytest.raises(LmsptError, match='no utterances'):
    open_source(f'folder:{url}/none')
  (tmp_path / 'in' / 'manifest.jsonl').write_text('{"path": "b c/2#.FLAC", "text": "said", "split": "s"}\n')
  server = serve_folder(tmp_path / 'in')
  source = open_source(f'folder:{server.url}')
  assert [utterance[:3] for utterance in contents(source)] == [('b c/2#', 'said', 's')]
  (tmp_path / 'in' / 'manifest.jsonl').unlink()
  with pytest.raises(LmsptError, match=r'/a/manifest\.jsonl: no such file, and http has no listings'):
    open_source(f'folder:{server.url}/a')
  server.close()


def test_google_storage(tars, tmp_path, monkeypatch):
  (tmp_path / 'google').mkdir()
  (tmp_path / 'google' / 'tars').symlink_to(tars)
  (tmp_path / 'google' / 'sample').symlink_to(ASSETS / 'speech_sample')
  server = serve_gcs(tmp_path / 'google')
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', server.url)
  for uri in ('webdataset:gs://tars/*.tar', 'folder:gs://sample'):
    assert contents(open_source(uri)) == contents(SPEECH)
  server.forget()
  assert contents(open_source(uri)) == contents(SPEECH) and server.requests == []
  with pytest.raises(LmsptError, match=r'gs://tars/none\.tar: no such file; check the path'):
    open_source('webdataset:gs://tars/none.tar')
  server.close()


def test_a_missing_shard_and_info_in_a_bucket(stored, tmp_path):
  import boto3
  client = boto3.client('s3')
  with pytest.raises(LmsptError, match=r'^s3://tars/dataset\.json: no such file; write the shards with "lmspt prepare'):
    open_source('arrayrecord:s3://tars')
  client.create_bucket(Bucket='partial')
  for name in [entry['Key'] for entry in client.list_objects_v2(Bucket='shards')['Contents']][:-1]:
    client.copy_object(Bucket='partial', Key=name, CopySource={'Bucket': 'shards', 'Key': name})
  source = open_source('arrayrecord:s3://partial')
  assert [fault.reason for fault in source.shard_faults] == ['missing'] and len(source) == len(SPEECH)


def test_a_server_that_is_gone_stops_rather_than_leaves_tars_out(tars):
  server = serve_folder(tars)
  uri = f'webdataset:{server.url}/{{00..03}}.tar'
  source = open_source(uri)
  server.failures = 10_000
  with pytest.raises(AudioError) as caught:
    source[0].encoded()
  assert caught.value.reason == 'unreachable' and str(caught.value).startswith(f'{source.name(0)}: can\'t be reached')
  with pytest.raises(LmsptError, match="can't be reached"):
    open_source(uri.replace('03', '04'))
  server.failures = 0
  assert source[0].encoded() == SPEECH[0].encoded()
  server.close()


def test_training_waits_for_a_store_rather_than_skips_its_records(tars, monkeypatch):
  server = serve_folder(tars)
  uri = f'webdataset:{server.url}/{{00..03}}.tar'
  open_source(uri)
  monkeypatch.setenv('LMSPT_CACHE_GB', '0')
  monkeypatch.setattr('lmspt_jax.data.pipeline.PATIENCE', (0.0, 0.0))
  server.failures = 60  # more than one example's attempts
  assert batches(uri) == batches('package:speech_sample')
  assert server.failures == 0
  server.failures = 10_000
  with pytest.raises(LmsptError, match=r"can't be reached .* the same command goes on from the last checkpoint"):
    batches(uri)
  server.close()


def test_no_backend_is_loaded_for_local_files(tars):
  code = ('import sys\nfrom lmspt_jax.data.sources import open_source\n'
          f'open_source("webdataset:{tars}/*.tar")[0].encoded()\n'
          'print({"fsspec", "s3fs", "aiohttp", "botocore", "jax"} & set(sys.modules))')
  out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
  assert out.stdout == 'set()\n' and out.stderr == ''
