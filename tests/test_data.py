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

from lmspt_jax.config import DataConfig
from lmspt_jax.data.dataset_info import load_info
from lmspt_jax.data.pipeline import FaultCounter, held_out_utterances, training_batches
from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.sources import ASSETS, auto_split, open_source
from lmspt_jax.errors import LmsptError

RATE, CROP = 16_000, 32_000
CONFIG = DataConfig(train='package:speech_sample', held_out='package:speech_sample', batch_size=8, num_workers=0)


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
    'fault_record': ((8, 8), 'int64')}
  assert batch['index'].tolist() == list(range(8))
  assert (batch['fault_record'] == -1).all()
  assert (batch['num_samples'] < 160_000).any()
  for row, length in zip(batch['audio'], batch['num_samples'], strict=True):
    assert np.abs(row[:length]).max() > 0.01 and not row[length:].any()


def test_worker_counts_give_the_same_batches():
  expected = digest(take(8))  # 0 workers; 54 records, so the second epoch is in it
  assert len(set(expected)) == 8
  assert digest(take(8, dataclasses.replace(CONFIG, num_workers=2))) == expected


def test_host_counts_give_the_same_batches():
  expected = digest(take(3))
  for hosts in (2, 4):
    parts = [take(3, process_index=host, process_count=hosts) for host in range(hosts)]
    assert parts[0][0]['audio'].shape == (8 // hosts, CROP)
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]}
              for step in zip(*parts, strict=True)]
    assert digest(joined) == expected


def test_resumes_at_any_step_with_other_workers_and_hosts():
  expected = take(12)
  for step in (1, 7, 11):
    assert digest(take(12 - step, start_batch=step)) == digest(expected[step:])
  workers = dataclasses.replace(CONFIG, num_workers=2)
  rows = take(1, workers, start_batch=9, process_index=1, process_count=2)[0]
  assert np.array_equal(rows['audio'], expected[9]['audio'][4:])


def test_seeds_and_epochs_differ_and_an_epoch_takes_every_record_once(shards):
  assert digest(take(2)) != digest(take(2, seed=2))
  config = dataclasses.replace(CONFIG, batch_size=1, train_split='valid')
  source = open_source(CONFIG.train, 'valid')
  whole = {source[index].load(RATE).tobytes() for index in range(10)}
  longest = 200_000
  epochs = take(20, config, crop=longest)
  rows = [batch['audio'][0, :batch['num_samples'][0]].tobytes() for batch in epochs]
  assert set(rows[:10]) == set(rows[10:]) == whole and rows[:10] != rows[10:]


def test_folder_and_shards_give_the_same_batches(shards):
  for split in ('train', ''):
    config = dataclasses.replace(CONFIG, train_split=split)
    prepared = dataclasses.replace(config, train=f'arrayrecord:{shards}')
    assert digest(take(3, config)) == digest(take(3, prepared))
  prepared = dataclasses.replace(prepared, train_split='train', num_workers=2)
  assert digest(take(3, prepared)) == digest(take(3))


@pytest.mark.parametrize('rate', [16_000, 24_000, 11_025])
def test_crops_equal_the_crop_of_the_whole_file(rate):
  source = open_source(CONFIG.train, 'train')
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


def test_bad_shapes_are_refused():
  with pytest.raises(LmsptError, match=r'data\.batch_size = 8: must be divisible by the 3 processes'):
    take(1, process_count=3)
  with pytest.raises(LmsptError, match='process_index = 2'):
    take(1, process_index=2, process_count=2)


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

  lenient, strict = FaultCounter(0.5, source), FaultCounter(0.0, source)
  for batch in batches:
    lenient.update(batch)
  entry = lenient.report()[0]
  assert entry['name'].startswith(f'{shard}:') and entry['reason'] == 'corrupt record' and entry['times'] >= 1
  with pytest.raises(LmsptError, match=r'max_fault_rate = 0\.0: train-00000-of-00003\.arrayrecord:\d+ \(corrupt'):
    for batch in batches:
      strict.update(batch)


def test_fault_rate_has_a_small_grace():
  def batch(failed, size=10):
    faults = np.full((size, 8), -1, np.int64)
    faults[:failed, 0] = range(failed)
    return {'fault_record': faults}

  source = open_source('package:speech_sample', 'valid')
  counter = FaultCounter(0.01, source)
  counter.update(batch(3))
  with pytest.raises(LmsptError, match='4 of 20 examples'):
    counter.update(batch(1))
  counter = FaultCounter(0.1, source)
  for _ in range(20):
    counter.update(batch(1))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_source_without_usable_records_stops_in_one_line(tmp_path, workers):
  for number in range(20):
    (tmp_path / f'{number}.wav').write_bytes(b'RIFF and then nonsense')
  config = dataclasses.replace(CONFIG, train=f'folder:{tmp_path}', train_split='', num_workers=workers)
  with pytest.raises(LmsptError, match=r"8 records in a row can't be used, the last one: \d+\.wav: not audio") as error:
    take(1, config)
  assert '\n' not in str(error.value)


def test_a_shard_cut_short_or_missing_is_named(shards, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(shards, copy)
  path = copy / 'train-00001-of-00003.arrayrecord'
  path.write_bytes(path.read_bytes()[:100_000])
  with pytest.raises(LmsptError, match=r'train-00001-of-00003\.arrayrecord: 100000 bytes where dataset\.json says'):
    open_source(f'arrayrecord:{copy}')
  assert len(open_source(f'arrayrecord:{copy}', 'valid')) == 10
  path.unlink()
  with pytest.raises(LmsptError, match=r'train-00001-of-00003\.arrayrecord: No such file'):
    open_source(f'arrayrecord:{copy}', 'train')


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
from lmspt_jax.config import DataConfig
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
