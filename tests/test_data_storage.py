"""Bytes of local files and of stores: patterns, parts, retries, the bounded cache. Servers on loopback, real speech."""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from _object_store import s3, serve_folder, upload

from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import crop_mono, open_audio
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.storage import FileRange, file_cache, remote
from lmspt_jax.errors import LmsptError

RATE = 16_000


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
  monkeypatch.setattr(remote, '_WAIT', 0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / 'cache'
  monkeypatch.setenv('LMSPT_CACHE', str(folder))
  return folder / 'files'


@pytest.fixture
def server(tmp_path):
  (tmp_path / 'served').mkdir()
  running = serve_folder(tmp_path / 'served')
  running.folder = tmp_path / 'served'
  yield running
  if not running.gone:
    running.close()


@functools.cache
def half_an_hour() -> tuple[bytes, np.ndarray]:
  """FLAC bytes and int16 samples of the sample's utterances, over and over."""
  source = open_source('package:speech_sample')
  speech = np.concatenate([source[row].load(RATE) for row in range(len(source))])
  audio = (np.resize(speech, 1800 * RATE) * 32767).astype(np.int16)
  buffer = io.BytesIO()
  soundfile.write(buffer, audio, RATE, format='FLAC', subtype='PCM_16')
  return buffer.getvalue(), audio


@pytest.fixture(scope='module', autouse=True)
def forget_long_recording():
  yield
  half_an_hour.cache_clear()


def within(content: bytes) -> tuple[bytes, int]:
  """A file that has `content` somewhere inside, and where."""
  return b'before' * 1000 + content + b'after' * 1000, 6000


def bytes_read() -> int:
  """By this process, from files, so far."""
  return int(Path('/proc/self/io').read_text().split()[1])


def total(folder: Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file() and path.name != '.used')


def reason(call, *given, **named) -> str:
  with pytest.raises(AudioError) as caught:
    call(*given, **named)
  assert '\n' not in str(caught.value)
  return caught.value.reason


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize('pattern, expected', [
    ('a/{008..011}.tar', ['a/008.tar', 'a/009.tar', 'a/010.tar', 'a/011.tar']),
    ('{8..11}.tar', ['10.tar', '11.tar', '8.tar', '9.tar']),
    ('{b,a}/{1..2}.tar', ['a/1.tar', 'a/2.tar', 'b/1.tar', 'b/2.tar']),
    ('{a,b{1..2},a}', ['a', 'b1', 'b2']),
    ('a{b}c{}.tar', ['a{b}c{}.tar']),
    ('s3://bucket/{0..1}.tar', ['s3://bucket/0.tar', 's3://bucket/1.tar']),
    ('https://host/a.tar?key=[x]', ['https://host/a.tar?key=[x]']),
])
def test_patterns(pattern, expected):
  assert storage.expand(pattern) == expected


@pytest.mark.parametrize('pattern', ['{0..99999999999}.tar', '{0..999}{0..999}.tar', '{a,b}' * 40])
def test_patterns_that_stand_for_too_much_are_refused_at_once(pattern):
  before = time.monotonic()
  with pytest.raises(LmsptError, match=r'stands for more than 200000 files; use fewer'):
    storage.expand(pattern)
  assert time.monotonic() - before < 1


def test_globs_local_and_in_a_store(tmp_path, server):
  for name in ('a/0.tar', 'a/1.tar', 'b/0.tar', 'b/[x].tar', 'c.txt'):
    (server.folder / name).parent.mkdir(exist_ok=True)
    (server.folder / name).write_bytes(b'x')
  root = f'{server.folder}'
  assert storage.expand(f'{root}/*/0.tar') == [f'{root}/a/0.tar', f'{root}/b/0.tar']
  assert storage.expand(f'{root}/{{a,a,b}}/?.tar') == [f'{root}/a/0.tar', f'{root}/a/1.tar', f'{root}/b/0.tar']
  assert storage.expand(f'{root}/b/[x].tar') == [f'{root}/b/[x].tar']
  assert storage.expand(f'{root}/none*') == []
  url = upload(server.folder, 'globs')
  assert storage.expand(f'{url}/a/*.tar') == [f'{url}/a/0.tar', f'{url}/a/1.tar']
  assert storage.expand(f'{url}/**/*.txt') == [f'{url}/c.txt']
  with pytest.raises(LmsptError, match='http has no listings'):
    storage.expand(f'{server.url}/*.tar')


# ---------------------------------------------------------------- parts of files


def places(server, content: bytes) -> list[FileRange]:
  """The same range of a local file, of one served over http and of one in S3."""
  data, start = within(content)
  (server.folder / 'file').write_bytes(data)
  url = upload(server.folder, f'places-{os.path.basename(server.folder.parent)}'.replace('_', '-'))
  return [FileRange(path, start, len(content))
          for path in (str(server.folder / 'file'), f'{server.url}/file', f'{url}/file')]


def test_a_range_behaves_as_a_file(server):
  content = half_an_hour()[0][:3 << 20]
  for place in places(server, content):
    assert place.read(name='x') == content
    assert FileRange(place.path, place.start, None).read(name='x') == content + b'after' * 1000
    draw = random.Random(1)
    expected = io.BytesIO(content)
    with place.open(name='x') as file:
      assert file.seek(0, io.SEEK_END) == len(content)
      for _ in range(200):
        position, count = draw.randrange(len(content) + 100), draw.choice([0, 1, 5000, 300_000])
        assert file.seek(position) == expected.seek(position)
        assert file.read(count) == expected.read(count)
        assert file.tell() == expected.tell()
      buffer = bytearray(100)
      assert file.seek(-50, io.SEEK_END) and file.readinto(buffer) == 50
      assert buffer[:50] == content[-50:]
  small = FileRange(place.path, place.start, 1000)
  with small.open(name='x') as file:
    assert file.read() == content[:1000]


def test_a_crop_of_a_long_recording_reads_little_of_it(server):
  content, audio = half_an_hour()
  assert len(content) > 20 << 20
  local, http, store = places(server, content)

  def crop(place):
    with place.open(name='x') as file, soundfile.SoundFile(file) as sound:
      sound.seek(1234 * RATE)
      assert np.array_equal(sound.read(6 * RATE, dtype='int16'), audio[1234 * RATE:1240 * RATE])

  before = bytes_read()
  crop(local)
  assert bytes_read() - before < 3 << 20
  for place, relay in ((http, server), (store, s3())):
    relay.forget()
    crop(place)
    assert relay.sent < 4 << 20
    relay.forget()
    crop(place)  # from the cache
    assert relay.requests == []


def test_closing_releases_the_descriptor(tmp_path):
  (tmp_path / 'file').write_bytes(bytes(2 << 20))
  place = FileRange(str(tmp_path / 'file'), 0, None)
  before = len(os.listdir('/proc/self/fd'))
  files = [place.open(name='x') for _ in range(10)]
  assert len(os.listdir('/proc/self/fd')) == before + 10
  for file in files:
    file.close()
    file.close()
  assert len(os.listdir('/proc/self/fd')) == before


def test_faults_have_a_reason(server):
  (server.folder / 'file').write_bytes(bytes(3 << 20))
  long = 2 << 20
  for root in (str(server.folder), server.url, upload(server.folder, 'faults')):
    assert reason(FileRange(f'{root}/none', 0, 10).read, name='x') == 'missing'
    assert reason(FileRange(f'{root}/none', 0, long).open, name='x') == 'missing'
    assert reason(storage.local_copy, f'{root}/none', name='x') == 'missing'
    assert reason(FileRange(f'{root}/file', long, long).read, name='x') == 'truncated'
  assert reason(storage.stat, 's3://no-such-bucket/file') == 'missing'


@pytest.mark.filterwarnings('error')  # an exception that libsndfile's callbacks let fall is a warning here
def test_a_fault_while_reading_keeps_its_reason(server, capfd):
  content, _ = half_an_hour()
  (server.folder / 'long.flac').write_bytes(content)
  place = FileRange(f'{server.url}/long.flac', 0, len(content))
  with place.open(name='a') as file, open_audio(place, name='b') as audio:
    server.close()
    file.seek(9 << 20)
    assert reason(file.read, 10) == 'unreachable'
    assert reason(crop_mono, audio, 1234 * RATE, 6 * RATE, RATE, name='b') == 'unreachable'
  assert capfd.readouterr().err == ''


def test_a_file_that_shrank_is_truncated(server):
  path = server.folder / 'file'
  for place in (str(path), f'{server.url}/file'):
    path.write_bytes(bytes(100_000))
    assert storage.stat(place).size == 100_000
    path.write_bytes(bytes(50_000))
    assert reason(FileRange(place, 20_000, 60_000).read, name='x') == 'truncated'
  assert reason(storage.local_copy, place, name='x') == 'truncated'


def test_a_server_without_ranges(server, tmp_path):
  (server.folder / 'file').write_bytes(b'0123456789' * 100)
  plain = serve_folder(server.folder, ranges=False)
  assert FileRange(f'{plain.url}/file', 0, None).read(name='x') == b'0123456789' * 100
  with pytest.raises(LmsptError, match='does not serve ranges of bytes; use one that does'):
    FileRange(f'{plain.url}/file', 10, 10).read(name='x')
  plain.close()


# ---------------------------------------------------------------- failing servers


@pytest.mark.parametrize('kind', ['http', 's3'])
def test_a_server_that_fails_twice_is_asked_again(server, kind, capfd):
  (server.folder / 'file').write_bytes(b'content')
  url = server.url if kind == 'http' else upload(server.folder, 'twice')
  relay = server if kind == 'http' else s3()
  relay.failures = 2
  assert storage.stat(f'{url}/file').size == 7
  relay.failures = 2
  assert FileRange(f'{url}/file', 2, 3).read(name='x') == b'nte'
  relay.failures = 2
  assert storage.local_copy(f'{url}/file', name='x').read_bytes() == b'content'
  relay.failures = 1000
  relay.forget()
  assert reason(storage.stat, f'{url}/other') == 'unreachable'
  assert len(relay.requests) == (8 if kind == 'http' else 4)  # http: the headers, then a GET for want of them
  relay.failures, relay.gone = 0, True
  relay.forget()
  assert reason(storage.stat, f'{url}/other') == 'unreachable'
  assert len(relay.requests) <= (16 if kind == 'http' else 8)  # aiohttp asks again on a connection that it had kept
  relay.gone = False
  assert capfd.readouterr().err == ''


def test_a_server_that_is_gone_is_unreachable(server, monkeypatch):
  (server.folder / 'file').write_bytes(bytes(4 << 20))
  place = FileRange(f'{server.url}/file', 0, 4 << 20)
  file = place.open(name='x')
  assert file.read(4) == bytes(4)
  server.close()
  assert reason(place.read, name='x') == 'unreachable'
  assert reason(storage.local_copy, f'{server.url}/file', name='x') == 'unreachable'
  monkeypatch.setattr(remote, '_WAIT', 0.25)  # as it is
  before = time.monotonic()
  assert reason(storage.stat, f'{server.url}/other') == 'unreachable'
  assert 1 < time.monotonic() - before < 10
  assert file.seek(100) == 100 and file.read(4) == bytes(4)  # was fetched before


def test_a_refusal_is_not_asked_again(server):
  (server.folder / 'file').write_bytes(bytes(10))
  server.failures, server.failure = 1000, 403
  assert reason(storage.stat, f'{server.url}/file') == 'unreachable'
  assert [method for method, _, _ in server.requests] == ['HEAD', 'GET']


def test_a_missing_backend_is_named():
  backends = (('gs://b/f', 'gcsfs', 'gcs'), ('s3://b/f', 's3fs', 's3'), ('http://h/f', 'aiohttp', 'http'))
  for url, package, extra in backends:
    code = f"""
import sys
sys.modules['{package}'] = None
from lmspt_jax.data import storage
from lmspt_jax.errors import LmsptError
try:
  storage.stat('{url}')
except LmsptError as error:
  print(error)"""
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert out.stdout == f'{url}: needs {package}; pip install {package}, or "lmspt_jax[{extra}]"\n' and not out.stderr
  with pytest.raises(LmsptError, match="unknown scheme 'ftp'; use a local path, gs://"):
    storage.stat('ftp://host/file')


# ---------------------------------------------------------------- the cache


def test_a_file_is_looked_up_once_and_fetched_once(server):
  (server.folder / 'file').write_bytes(bytes(1000))
  url = f'{server.url}/file'
  for _ in range(3):
    FileRange(url, 100, 50).read(name='x')
    FileRange(url, 200, 50).read(name='x')
  assert [(method, wanted) for method, _, wanted in server.requests] == [
    ('HEAD', ''), ('GET', 'bytes=100-149'), ('GET', 'bytes=200-249')]
  server.forget()
  with ThreadPoolExecutor(8) as pool:
    copies = set(pool.map(lambda _: storage.local_copy(url, name='x'), range(8)))
  assert len(copies) == len(server.requests) == 1 and copies.pop().read_bytes() == bytes(1000)


def test_the_bound_is_kept_and_the_least_recently_used_goes(server, cache, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE_GB', '0.001')
  (server.folder / 'file').write_bytes(bytes(10_000_000))

  def fetches(number: int) -> int:
    server.forget()
    FileRange(f'{server.url}/file', 95_000 * number, 95_000).read(name='x')
    return sum(method == 'GET' for method, _, _ in server.requests)

  assert [fetches(number) for number in (*range(10), 0)] == [1] * 10 + [0]
  assert fetches(10) == 1 and total(cache) <= 1_000_000  # 1 and 2 went, those used longest ago
  assert [fetches(number) for number in (0, 9, 10, 1)] == [0, 0, 0, 1]
  for number in range(100):
    fetches(number)
    assert 500_000 < total(cache) <= 1_000_000
  with pytest.raises(LmsptError, match=r'10000000 bytes, more than there is room for .*; raise LMSPT_CACHE_GB'):
    storage.local_copy(f'{server.url}/file', name='x')
  assert len(FileRange(f'{server.url}/file', 0, None).read(name='x')) == 10_000_000  # too large: fetched, not kept
  assert fetches(99) == 0 and total(cache) <= 1_000_000


def test_what_is_being_written_counts(cache, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE_GB', '0.001')
  file_cache.add('old', 300_000, lambda path: path.write_bytes(bytes(300_000)))

  def fill(path: Path):
    assert file_cache.add('second', 500_000, lambda path: path.write_bytes(bytes(500_000))) is None
    assert file_cache.add('third', 200_000, lambda path: path.write_bytes(bytes(200_000)))
    path.write_bytes(bytes(600_000))

  assert file_cache.add('first', 600_000, fill).stat().st_size == 600_000
  assert file_cache.read('third', 200_000) == bytes(200_000) and total(cache) == 800_000


def test_a_damaged_entry_is_fetched_again(server, cache):
  (server.folder / 'file').write_bytes(b'content')
  url = f'{server.url}/file'
  for _ in range(3):
    assert FileRange(url, 0, 4).read(name='x') == b'cont'
    assert storage.local_copy(url, name='x').read_bytes() == b'content'
    for path in cache.rglob('*'):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:-1])


def test_a_new_version_is_another_entry(server):
  (server.folder / 'file').write_bytes(b'old one')
  with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
    assert pool.apply(read_all, (f'{server.url}/file',)) == b'old one'
    (server.folder / 'file').write_bytes(b'new one')
    assert pool.apply(read_all, (f'{server.url}/file',)) == b'new one'


def read_all(url: str) -> bytes:
  return FileRange(url, 0, None).read(name='x')


def read_randomly(url: str, seed: int) -> list[str]:
  """What went wrong in 150 reads of 20 kB parts of a file whose bytes are known."""
  draw, wrong, content = random.Random(seed), [], known()
  for _ in range(150):
    start = 20_000 * draw.randrange(25)
    if FileRange(url, start, 20_000).read(name='x') != content[start:start + 20_000]:
      wrong.append(f'{url} at {start}')
  copy = storage.local_copy(url, name='x')
  return wrong + ([] if copy.stat().st_size == 500_000 else [f'{copy}'])


def known() -> bytes:
  return b''.join(hashlib.sha256(str(number).encode()).digest() for number in range(15_625))


def test_several_processes_share_the_cache_within_its_bound(server, cache, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE_GB', '0.0007')
  (server.folder / 'file').write_bytes(known())
  with multiprocessing.get_context('spawn').Pool(2) as pool:
    result = pool.starmap_async(read_randomly, [(f'{server.url}/file', seed) for seed in range(2)])
    most = 0
    while not result.ready():
      try:
        most = max(most, total(cache))
      except FileNotFoundError:  # evicted while it was added up
        continue
      time.sleep(0.01)
    assert result.get() == [[], []]
  assert 300_000 < most <= 700_000
  assert not list(cache.rglob('*.tmp'))


def test_leftovers_of_a_killed_process_go(server, cache, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE_GB', '0.001')
  (server.folder / 'file').write_bytes(bytes(2_000_000))
  file_cache.add('x', 10, lambda path: path.write_bytes(bytes(10)))
  dead = cache / '00' / '.dead.1.1.600000.tmp'
  dead.parent.mkdir(exist_ok=True)
  dead.write_bytes(bytes(300_000))
  os.utime(dead, (time.time() - 7200, time.time() - 7200))
  alive = cache / '00' / '.alive.2.2.100000.tmp'
  alive.write_bytes(bytes(50_000))
  for start in range(0, 2_000_000, 500_000):
    FileRange(f'{server.url}/file', start, 500_000).read(name='x')
  assert not dead.exists() and alive.exists()
  assert total(cache) <= 1_000_000


def test_a_cache_that_cannot_be_used_is_one_line(server, tmp_path, monkeypatch):
  (server.folder / 'file').write_bytes(bytes(10))
  monkeypatch.setenv('LMSPT_CACHE_GB', 'lots')
  with pytest.raises(LmsptError, match=r"LMSPT_CACHE_GB = 'lots': must be a number of gigabytes"):
    FileRange(f'{server.url}/file', 0, 10).read(name='x')
  monkeypatch.delenv('LMSPT_CACHE_GB')
  (tmp_path / 'no-folder').write_text('')
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'no-folder'))
  with pytest.raises(LmsptError, match=r"the cache can't be used .*; set LMSPT_CACHE to a folder with room"):
    FileRange(f'{server.url}/file', 0, 10).read(name='x')


@pytest.mark.parametrize('kind', ['webdataset', 'parquet'])
def test_files_in_different_stores(kind):
  with pytest.raises(LmsptError, match='names files in different stores; give each of them as a corpus of its own'):
    open_source(f'{kind}:{{s3://one,gs://two}}/0.tar')
