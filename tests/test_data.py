"""Training batches: the same for every worker and host count, resumable, and steady under faults. Real speech."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.dataset_info import load_info
from lmspt_jax.data.fault_log import FaultLog
from lmspt_jax.data.metadata import auto_split
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import MAX_FAULTS, held_out_utterances, training_batches
from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.sources.folder import ASSETS
from lmspt_jax.errors import LmsptError

RATE, CROP = 16_000, 32_000
CORPUS = 'package:speech_sample'
CONFIG = DataConfig(train=CORPUS, held_out=CORPUS, batch_size=8, num_workers=0)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
  out = tmp_path_factory.mktemp('shards')
  prepare('package:speech_sample', out, num_shards=3, num_workers=2, progress=False)
  return out


def take(count, config=CONFIG, seed=1, rate=RATE, crop=CROP, **where):
  with training_batches(config, sample_rate=rate, crop_samples=crop, seed=seed, **where) as batches:
    return [next(batches) for _ in range(count)]


def digest(batches):
  return [hashlib.sha256(b''.join(batch[key].tobytes() for key in sorted(batch))).hexdigest() for batch in batches]


def damage(shards, out, share_of_shard):
  """A copy of the shards with part of the first one overwritten, its size kept."""
  shutil.copytree(shards, out)
  path = out / load_info(out).shards[0].name
  data = bytearray(path.read_bytes())
  start = 300_000
  data[start:start + int(len(data) * share_of_shard)] = bytes(int(len(data) * share_of_shard))
  path.write_bytes(data)
  return f'arrayrecord:{out}', path.name


# ---------------------------------------------------------------- order and content


def test_shapes_and_padding():
  batch, = take(1, crop=160_000)
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
    'audio': ((8, 160_000), 'float32'), 'num_samples': ((8,), 'int32'), 'index': ((8,), 'int64'),
    'record': ((8,), 'int64'), 'fault_record': ((8, MAX_FAULTS), 'int64'), 'fault_reason': ((8, MAX_FAULTS), 'int8')}
  assert batch['index'].tolist() == list(range(8))
  assert (batch['fault_record'] == -1).all()
  assert (batch['num_samples'] < 160_000).any()
  for row, length in zip(batch['audio'], batch['num_samples'], strict=True):
    assert np.abs(row[:length]).max() > 0.01 and not row[length:].any()


@pytest.fixture(scope='module')
def eight_batches():
  """By one host without workers; 54 records, so the second epoch is in it."""
  return take(8)


@pytest.mark.parametrize('hosts, workers', [(h, w) for h in (1, 2, 4) for w in (0, 2, 4) if (h, w) != (1, 0)])
def test_hosts_and_workers_do_not_change_the_batches(eight_batches, hosts, workers):
  assert len(set(digest(eight_batches))) == 8
  config, rows = dataclasses.replace(CONFIG, num_workers=workers), 8 // hosts
  for host in range(hosts) if workers == 0 else {0, hosts - 1}:  # a worker takes two seconds to start
    found = take(8, config, rows=range(host * rows, (host + 1) * rows))
    expected = [{key: value[host * rows:(host + 1) * rows] for key, value in batch.items()} for batch in eight_batches]
    assert digest(found) == digest(expected)


def test_resumes_at_any_step_with_other_workers_and_hosts():
  expected = take(12)
  for step in (1, 7, 11):
    assert digest(take(12 - step, start_batch=step)) == digest(expected[step:])
  workers = dataclasses.replace(CONFIG, num_workers=2)
  rows = take(1, workers, start_batch=9, rows=[1, 2, 6])[0]  # as a mesh may scatter them
  assert np.array_equal(rows['audio'], expected[9]['audio'][[1, 2, 6]])


def test_seeds_and_epochs_differ_and_an_epoch_takes_every_record_once(shards):
  assert digest(take(2)) != digest(take(2, seed=2))
  config = dataclasses.replace(CONFIG, batch_size=1, train=(CorpusConfig(CORPUS, 'valid'),))
  source = open_source(CORPUS, 'valid')
  whole = {source[index].load(RATE).tobytes() for index in range(10)}
  longest = 200_000
  epochs = take(20, config, crop=longest)
  rows = [batch['audio'][0, :batch['num_samples'][0]].tobytes() for batch in epochs]
  assert set(rows[:10]) == set(rows[10:]) == whole and rows[:10] != rows[10:]


def test_folder_and_shards_give_the_same_batches(shards):
  for split in ('train', ''):
    config, prepared = (dataclasses.replace(CONFIG, train=(CorpusConfig(uri, split),))
                        for uri in (CORPUS, f'arrayrecord:{shards}'))
    assert digest(take(3, config)) == digest(take(3, prepared))


@pytest.mark.parametrize('rate', [16_000, 24_000, 11_025])
def test_crops_equal_the_crop_of_the_whole_file(rate):
  source = open_source(CORPUS, 'train')
  whole = [source[index].load(rate) for index in range(len(source))]
  starts = []
  for batch in take(1, rate=rate, crop=rate):
    for row, length in zip(batch['audio'], batch['num_samples'], strict=True):
      row = row[:length]
      found = [at for audio in whole if (at := best_match(audio, row)) is not None]
      assert found, 'a crop that is no part of any file'
      starts += found
  assert len({start for start in starts if start}) > 4  # random places, not the beginnings


def best_match(audio, crop):
  """Where `crop` is part of `audio` to 1e-5, else None."""
  if len(audio) < len(crop):
    return None
  size = 1 << (len(audio) + len(crop)).bit_length()
  correlation = np.fft.irfft(np.fft.rfft(audio, size) * np.conj(np.fft.rfft(crop, size)), size)
  energy = np.cumsum(np.concatenate([[0.0], audio.astype(np.float64) ** 2]))
  last = len(audio) - len(crop) + 1
  error = energy[len(crop):] - energy[:last] - 2 * correlation[:last]
  at = int(np.argmin(error))
  return at if np.abs(audio[at:at + len(crop)] - crop).max() < 1e-5 else None


@pytest.mark.parametrize('rows', [[8], [-1], []])
def test_rows_outside_of_the_batch_are_refused(rows):
  with pytest.raises(LmsptError, match=r'rows = .*must be in \[0, 8\)'):
    take(1, rows=rows)


# ---------------------------------------------------------------- faults


def test_a_damaged_record_is_replaced_by_its_successor_and_counted(shards, tmp_path):
  uri, shard = damage(shards, tmp_path / 'damaged', 0.01)
  config = dataclasses.replace(CONFIG, train=uri)
  expected, batches = take(7), take(7, config)
  order = {int(i): row for batch in expected for i, row in zip(batch['index'], batch['audio'], strict=True)}
  failed = [(batch, row) for batch in batches for row in np.flatnonzero(batch['fault_record'][:, 0] >= 0)]
  assert failed
  source = open_source(uri, 'train')
  for batch, row in failed:
    record = int(batch['fault_record'][row, 0])
    assert source.name(record).startswith(shard)
    assert not np.array_equal(batch['audio'][row], order[int(batch['index'][row])]) and batch['audio'][row].any()
  good = [(batch, row) for batch in batches for row in np.flatnonzero(batch['fault_record'][:, 0] < 0)]
  assert all(np.array_equal(batch['audio'][row], order[int(batch['index'][row])]) for batch, row in good)
  assert digest(take(7, dataclasses.replace(config, num_workers=2))) == digest(batches)

  mixture = Mixture(config)
  lenient, strict = FaultLog(0.5, mixture), FaultLog(0.0, mixture)
  for batch in batches:
    lenient.update(batch)
  entry = lenient.report()[0]
  assert entry['name'].startswith(f'{shard}:') and entry['reason'] == 'corrupt record' and entry['shard'] == shard
  failed_at = {int(batch['index'][row]) for batch, row in failed}
  assert entry['examples'] and {e for entry in lenient.report() for e in entry['examples']} >= failed_at
  with pytest.raises(LmsptError, match=r'max_fault_rate = 0\.0: arrayrecord:.* train-00000-of-00003.*corrupt record'):
    for batch in batches:
      strict.update(batch)


def test_fault_rate_has_a_small_grace():
  def batch(failed, size=10):
    records, reasons = np.full((size, MAX_FAULTS), -1, np.int64), np.full((size, MAX_FAULTS), -1, np.int8)
    records[:failed, 0], reasons[:failed, 0] = range(failed), 1
    return {'fault_record': records, 'fault_reason': reasons, 'index': np.arange(size)}

  mixture = Mixture(dataclasses.replace(CONFIG, train='package:speech_sample'))
  log = FaultLog(0.01, mixture)
  log.update(batch(3))
  with pytest.raises(LmsptError, match='4 of 20 examples'):
    log.update(batch(1))
  log = FaultLog(0.1, mixture)
  for _ in range(20):
    log.update(batch(1))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_source_without_usable_records_stops_in_one_line(tmp_path, workers):
  for number in range(40):
    (tmp_path / f'{number}.wav').write_bytes(b'RIFF and then nonsense')
  config = dataclasses.replace(CONFIG, train=(CorpusConfig(f'folder:{tmp_path}', ''),), num_workers=workers)
  in_a_row = rf"{MAX_FAULTS} records in a row can't be used, the last one: \d+\.wav: not audio"
  with pytest.raises(LmsptError, match=in_a_row) as error:
    take(1, config)
  assert '\n' not in str(error.value)


def test_a_shard_cut_short_or_missing_is_named(shards, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(shards, copy)
  path = copy / 'train-00001-of-00003.arrayrecord'
  config = dataclasses.replace(CONFIG, train=f'arrayrecord:{copy}')
  path.write_bytes(path.read_bytes()[:100_000])
  cut = r'train-00001-of-00003\.arrayrecord: 100000 bytes where dataset\.json says .* \(truncated\)'
  with pytest.raises(LmsptError, match=rf'1 of 3 shards are broken, more than data\.max_fault_rate = 0\.01: .*{cut}'):
    take(1, config)
  valid = dataclasses.replace(config, train=(CorpusConfig(f'arrayrecord:{copy}', 'valid'),))
  assert len(Mixture(valid)) == 10  # in another shard
  path.unlink()
  with pytest.raises(LmsptError, match=r'train-00001-of-00003\.arrayrecord: .*No such file.*\(missing\)'):
    take(1, config)
  lenient = dataclasses.replace(config, max_fault_rate=0.6)
  log = FaultLog(0.6, Mixture(lenient))
  for batch in take(7, lenient):  # the order is the same as with it; its records give way to their successors
    log.update(batch)
  assert {row['reason'] for row in log.report()} == {'missing'}
  assert {row['shard'] for row in log.report()} == {path.name} and len(log.report()) == 1 + 18


@pytest.mark.parametrize('workers', [0, 2])
def test_a_thousand_faults_in_a_pass(tmp_path, workers):
  """Every good record is seen at its own place once an epoch, every fault counted, and nothing hangs."""
  rng = np.random.default_rng(0)
  speech = np.concatenate([utterance.load(RATE) for utterance in open_source(CORPUS, 'valid')])
  bad = set(rng.choice(3000, 1000, replace=False).tolist())
  for number in range(3000):
    start = number * 100
    clip = speech[start:start + 1600]
    path = tmp_path / f'{number:04d}.wav'
    kind = number % 5 if number in bad else None
    soundfile.write(path, clip if kind != 0 else np.full(1600, np.nan), RATE, subtype='FLOAT')
    if kind == 1:
      path.write_bytes(b'')
    elif kind == 2:
      path.write_bytes(path.read_bytes()[:30])
    elif kind == 3:
      path.write_bytes(rng.bytes(500))
    elif kind == 4:
      path.unlink()
      path.symlink_to('nowhere.wav')
  config = dataclasses.replace(CONFIG, train=(CorpusConfig(f'folder:{tmp_path}', ''),), batch_size=100,
                               num_workers=workers, max_fault_rate=1.0)
  mixture = Mixture(config)
  assert len(mixture) == 3000
  log = FaultLog(1.0, mixture)
  for epoch in range(1 if workers else 2):
    batches = take(30, config, crop=800, start_batch=30 * epoch)
    own = [int(r) for b in batches for r, f in zip(b['record'], b['fault_record'][:, 0], strict=True) if f < 0]
    failed = [int(f) for b in batches for f in b['fault_record'][:, 0] if f >= 0]
    names = [int(mixture.sources[0].name(record)[:4]) for record in own]
    assert sorted(names) == sorted(set(range(3000)) - bad)
    assert sorted(int(mixture.sources[0].name(record)[:4]) for record in failed) == sorted(bad)
    assert all(np.abs(batch['audio']).max(axis=1).all() for batch in batches)
    for batch in batches:
      log.update(batch)
  assert {int(row['name'][:4]) for row in log.report()} == bad
  assert {row['reason'] for row in log.report()} == {'non-finite', 'empty', 'undecodable', 'missing'}


# ---------------------------------------------------------------- held-out data and splits


def test_held_out_utterances_are_the_first_by_id_and_no_text_is_trained_on():
  held = held_out_utterances(CONFIG, RATE, 64_000, limit=8)
  assert held['audio'].shape == (8, 64_000) and held['num_samples'].dtype == np.int32
  assert held['ids'] == sorted(held['ids']) and all(held['texts'])
  source = open_source('package:speech_sample', 'valid')
  for row, length, index in zip(held['audio'], held['num_samples'], range(8), strict=True):
    whole = source[index].load(RATE)
    assert length == min(64_000, len(whole)) and np.array_equal(row[:length], whole[:length])
    assert not row[length:].any()
  train = open_source('package:speech_sample', 'train')
  assert not {train[i].text for i in range(len(train))} & {source[i].text for i in range(len(source))}
  assert (len(train), len(source)) == (54, 10)
  assert auto_split('Good bye!') == auto_split('good-bye')


def test_data_modules_do_not_load_jax():
  code = ('import sys, lmspt_jax.data.pipeline, lmspt_jax.data.prepare, lmspt_jax.cli.prepare\n'
          'print([m for m in ("jax", "flax", "orbax", "grain") if m in sys.modules])')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert json.loads(result.stdout.replace("'", '"')) == []


def test_workers_end_with_the_iterator_and_with_a_killed_parent(tmp_path):
  program = f'''
import os, signal, sys
sys.path.insert(0, {str(ASSETS.parent.parent)!r})
from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.pipeline import training_batches
import multiprocessing
if __name__ == '__main__':
  config = DataConfig(train='package:speech_sample', batch_size=2, num_workers=2)
  batches = training_batches(config, sample_rate=16000, crop_samples=1600, seed=0)
  next(batches)
  assert len(multiprocessing.active_children()) == 2
  batches.close()
  assert not multiprocessing.active_children()
  batches = training_batches(config, sample_rate=16000, crop_samples=1600, seed=0)
  next(batches)
  print(*[child.pid for child in multiprocessing.active_children()], flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
'''
  script = tmp_path / 'script.py'
  script.write_text(program)
  result = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          timeout=60)
  workers = [int(pid) for pid in result.stdout.split()]
  assert len(workers) == 2
  assert eventually(lambda: not any(map(alive, workers)))


def alive(pid):
  try:
    return ') Z' not in Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False


def eventually(condition, seconds=15):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.1)
  return False
