"""What a training run refuses, stops at or skips: one line naming the thing, its value and the way out.

Bad configs, overrides and audio given to the other verbs are in test_cli.py, sources and records in test_data*.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from make_golden_step import TINY, replaced, write_teacher

from lmspt_jax.cli.main import main
from lmspt_jax.data.prepare import prepare
from lmspt_jax.metrics import mean
from lmspt_jax.training import loop

CONFIG = replaced(
    TINY, train__num_steps=4, train__checkpoint_every=2, data__crop_seconds=0.2, discriminator__fft_sizes=(),
    model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,),
    model__semantic__data_init=False, model__acoustic__data_init=False)


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('config')
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'))
  path = folder / 'tiny.py'
  path.write_text(f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  return path


@pytest.fixture
def train(config_file, tmp_path, capsys):
  """(*overrides, workdir) -> (exit status, stdout, stderr)."""

  def run(*overrides, workdir=tmp_path / 'run'):
    status = main(['train', f'--config={config_file}', f'--workdir={workdir}', *(f'--config.{o}' for o in overrides)])
    return status, *capsys.readouterr()

  return run


@pytest.fixture
def refused(train):
  """Runs a training that must be refused before it begins, with one line that holds all of `words`."""

  def run(overrides, *words, **where):
    status, _, err = train(*overrides, **where)
    assert status == 1 and err.startswith('lmspt: error: ') and err.count('\n') == 1, err
    for word in words:
      assert str(word) in err
    return err

  return run


@pytest.fixture
def stopped(train):
  """Runs a training that must break off; its last line, after the progress bar, holds all of `words`."""

  def run(overrides, *words, **where):
    status, _, err = train(*overrides, **where)
    last = err.rstrip('\n').splitlines()[-1]
    assert status == 1 and last.startswith('lmspt: error: '), err
    for word in words:
      assert str(word) in last
    return last

  return run


def idle_step(patch: pytest.MonkeyPatch) -> None:
  """Has the loop run a train step that learns nothing and compiles at once."""

  def make_train_step(experiment, shardings):
    def step(state, teacher_params, batch):
      found = {name: mean(jnp.ones(())) for name in ('loss/mel', 'loss/distillation', 'loss/discriminator')}
      found['skipped'] = mean(jnp.zeros(()))
      found['audio_seconds'] = mean(jnp.sum(batch['num_samples']) / CONFIG.model.sample_rate)
      return state.replace(step=state.step + 1), found
    return step

  patch.setattr(loop, 'make_train_step', make_train_step)


@pytest.fixture
def idle(monkeypatch):
  idle_step(monkeypatch)


def steps_logged(workdir: Path) -> list[int]:
  return [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def checkpoints(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


# ---------------------------------------------------------------- config against machine and teacher


def test_batch_not_divisible_by_the_devices(config_file, repo, tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'lmspt_jax', 'train', f'--config={config_file}', f'--workdir={tmp_path / "run"}',
       '--config.data.batch_size=12'],
      env={**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}, cwd=repo, capture_output=True,
      text=True)
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr == ('lmspt: error: config field data.batch_size = 12: not divisible by the 8 devices of the mesh; '
                         'use 8\n')


@pytest.mark.parametrize('overrides, words', [
    (['mesh.fsdp=3'], ["mesh = {'data': -1, 'fsdp': 3, 'tensor': 1}", 'there are 1 devices']),
    (['mesh.data=-1', 'mesh.fsdp=-1'], ["'fsdp': -1", 'one of them may be -1']),
    (['data.crop_seconds=30.05'], ['data.crop_seconds = 30.05', 'at most 30 s', 'use less']),
    (['data.held_out=package:speech_sample', 'train.eval_seconds=31'], ['train.eval_seconds = 31', 'at most 30 s']),
    (['teacher.checkpoint=hf:absent'], ['absent/config.json', 'no such file']),
])
def test_what_does_not_fit(refused, overrides, words):
  refused(overrides, *words)


# ---------------------------------------------------------------- workdir


@pytest.mark.parametrize('make', [
    lambda p: p.touch(), lambda p: p.symlink_to(p.parent / 'absent' / 'run')], ids=['file', 'dangling link'])
def test_unwritable_workdir(refused, tmp_path, make):
  make(tmp_path / 'taken')
  refused([], f'--workdir={tmp_path / "taken"}: can\'t be written (File exists)', 'give a folder you own',
          workdir=tmp_path / 'taken')


def test_workdir_below_a_file(refused, tmp_path):
  (tmp_path / 'file').touch()
  refused([], f'--workdir={tmp_path / "file" / "run"}: can\'t be written (Not a directory)', 'give a folder you own',
          workdir=tmp_path / 'file' / 'run')


@pytest.fixture(scope='module')
def finished(config_file, tmp_path_factory) -> Path:
  """A run of four idle steps, with checkpoints of two and four."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    idle_step(patch)
    assert main(['train', f'--config={config_file}', f'--workdir={workdir}']) == 0
  assert checkpoints(workdir) == ['2', '4']
  return workdir


def test_workdir_of_another_config(refused, finished):
  before = (finished / 'config.json').read_bytes()
  err = refused(['loss.mel=1', 'train.log_every=3'], finished, 'another config (loss.mel: 15.0 there, 1.0 now)',
                'use another --workdir', workdir=finished)
  assert 'log_every' not in err
  many = [f'train.{name}' for name in ('seed=1', 'num_steps=5')] + [
      f'loss.{name}=3' for name in ('mel', 'adversarial', 'distillation', 'feature_matching')]
  refused(many, ' and 2 more)', workdir=finished)
  assert (finished / 'config.json').read_bytes() == before


def test_what_parameters_do_not_depend_on_may_change(train, idle, finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  assert train('train.log_every=3', 'data.num_workers=1')[0] == 0
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['train']['log_every'] == 3


def test_a_run_without_a_checkpoint_binds_no_config(train, refused, idle, tmp_path):
  refused(['data.train=folder:mispelt'], 'mispelt')
  assert (tmp_path / 'run' / 'config.json').exists()
  assert train('train.num_steps=1')[0] == 0


def test_data_may_move_but_not_change(train, refused, idle, finished, speech_folder, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  shutil.copytree(speech_folder, tmp_path / 'speech')
  moved = f'data.train=folder:{tmp_path / "speech"}'
  manifest = tmp_path / 'speech' / 'manifest.jsonl'
  whole = manifest.read_text()
  rows = whole.splitlines(keepends=True)
  manifest.write_text(''.join(rows[:-8]))
  refused([moved, 'train.keep_checkpoints=9'], 'data.train: holds other utterances', 'than when step 4 was saved',
          'put back what was there, or use another --workdir')
  manifest.write_text(whole)
  assert train(moved, 'train.keep_checkpoints=9')[0] == 0
  refused([moved, 'data.train.0.split='], 'another config', "data.train.0.split: 'train' there")


def test_damaged_config_of_a_run(refused, finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  (tmp_path / 'run' / 'config.json').write_text('{"name":')
  refused([], tmp_path / 'run' / 'config.json', 'not JSON', 'use another --workdir')


def test_another_teacher(refused, finished, config_file, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  weights = config_file.parent / 'teacher' / 'model.safetensors'
  before = weights.read_bytes()
  try:
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    refused([], 'teacher.checkpoint: its hash is', 'the run was trained with', 'give that one')
  finally:
    weights.write_bytes(before)


@pytest.mark.parametrize('part', ['state', 'record'])
def test_damaged_checkpoint(stopped, train, idle, finished, tmp_path, part):
  shutil.copytree(finished, tmp_path / 'run')
  newest = tmp_path / 'run' / 'checkpoints' / '4'
  files = [path for path in (newest / part).rglob('*') if path.is_file()]
  assert files
  for path in files:
    os.truncate(path, path.stat().st_size // 2)
  stopped([], f'{newest}: can\'t be read', 'delete it to go on from the checkpoint before it')
  shutil.rmtree(newest)
  status, out, _ = train()
  assert status == 0 and 'resuming at step 2\n' in out
  assert steps_logged(tmp_path / 'run') == [1, 2, 3, 4] and checkpoints(tmp_path / 'run') == ['2', '4']


# ---------------------------------------------------------------- data


@pytest.mark.parametrize('overrides, words', [
    (['data.train='], ["config field data.train = ''", 'give KIND:URI']),
    (['data.train=speech'], ["'speech'", 'write KIND:URI']),
    (['data.train=floder:speech'], ["unknown kind 'floder'", "did you mean 'folder'"]),
    (['data.train=folder:absent'], ["no folder 'absent'", 'check the path']),
    (['data.train.0.split=dev'], ["no utterances in split 'dev'", 'it has train (54), valid (10)']),
    (['data.held_out=folder:absent'], ["no folder 'absent'", 'check the path']),
])
def test_no_such_data(refused, overrides, words):
  refused(overrides, *words)


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp('shards')
  prepare('package:speech_sample', out, num_shards=2, num_workers=1, progress=False)
  return out


def copied(shards: Path, tmp_path: Path) -> tuple[str, Path]:
  """(override of data.train, second shard) of a copy."""
  shutil.copytree(shards, tmp_path / 'shards')
  return f'data.train=arrayrecord:{tmp_path / "shards"}', tmp_path / 'shards' / 'train-00001-of-00002.arrayrecord'


def test_a_shard_cut_short(refused, shards, tmp_path):
  override, path = copied(shards, tmp_path)
  whole = path.stat().st_size
  os.truncate(path, whole // 2)
  refused([override], path, f'{whole // 2} bytes where dataset.json says {whole}', 'copy it again or rerun')


@pytest.mark.parametrize('workers', [0, 1])
def test_a_shard_cut_short_and_filled_up(stopped, idle, shards, tmp_path, workers):
  """Such as a download that was broken off after its file had been allocated."""
  override, path = copied(shards, tmp_path)
  whole = path.stat().st_size
  os.truncate(path, whole // 2)
  os.truncate(path, whole)
  stopped([override, 'train.num_steps=20', f'data.num_workers={workers}'], f'{path.name}: ', 'corrupt record',
          'more than data.max_fault_rate')


def test_a_damaged_record_is_skipped_and_counted(train, idle, shards, tmp_path, caplog):
  override, path = copied(shards, tmp_path)
  data = bytearray(path.read_bytes())
  data[len(data) // 2:len(data) // 2 + 1000] = bytes(1000)
  path.write_bytes(data)
  status, _, err = train(override, 'data.max_fault_rate=0.2', 'train.checkpoint_every=14',
                         'train.num_steps=14')  # 56 examples of 54 records
  assert status == 0, err
  (fault,) = [json.loads(line) for line in (tmp_path / 'run' / 'faults.jsonl').read_text().splitlines()]
  assert fault['name'].startswith(f'{path.name}:') and fault['reason'] == 'corrupt record' and fault['examples']
  assert f'{fault["name"]} can\'t be used' in caplog.text
  assert steps_logged(tmp_path / 'run') == list(range(1, 15))


@pytest.fixture
def spoilt(speech_folder, tmp_path) -> Path:
  """A folder of sixteen good recordings and five that can't be used."""
  folder = tmp_path / 'spoilt'
  folder.mkdir()
  good = sorted((speech_folder / 'audio').glob('*.flac'))[:16]
  for path in good:
    shutil.copy(path, folder)
  (folder / 'text.wav').write_text('this is no audio')
  (folder / 'nothing.wav').touch()
  soundfile.write(folder / 'empty.wav', np.zeros(0), 16_000)
  soundfile.write(folder / 'nan.wav', np.full(8_000, np.nan, np.float32), 16_000, subtype='FLOAT')
  (folder / 'cut.flac').write_bytes(good[0].read_bytes()[:100])
  return folder


REASONS = {'text.wav': 'undecodable', 'nothing.wav': 'empty', 'empty.wav': 'empty', 'nan.wav': 'non-finite',
           'cut.flac': 'truncated'}


def test_recordings_that_cannot_be_used_are_skipped_and_counted(train, idle, spoilt, tmp_path):
  epochs = 2 * 21
  status, _, err = train(f'data.train=folder:{spoilt}', 'data.train.0.split=', 'data.max_fault_rate=0.5',
                      f'train.num_steps={epochs // 2}', 'data.batch_size=2', 'train.checkpoint_every=100')
  assert status == 0, err
  faults = [json.loads(line) for line in (tmp_path / 'run' / 'faults.jsonl').read_text().splitlines()]
  assert {fault['name']: fault['reason'] for fault in faults} == REASONS
  assert sum(len(fault['examples']) for fault in faults) >= 2 * len(REASONS)  # each epoch meets each
  assert steps_logged(tmp_path / 'run') == list(range(1, epochs // 2 + 1))


def test_training_stops_past_the_fault_rate(stopped, idle, spoilt, tmp_path):
  last = stopped([f'data.train=folder:{spoilt}', 'data.train.0.split=', 'data.max_fault_rate=0.02',
                  'train.num_steps=40', 'train.checkpoint_every=1'],
                 f'folder:{spoilt}', 'more than data.max_fault_rate = 0.02', 'mend them or raise the rate')
  named = [name for name in REASONS if f'{name} ({REASONS[name]})' in last]
  assert len(named) == 4
  faults = [json.loads(line) for line in (tmp_path / 'run' / 'faults.jsonl').read_text().splitlines()]
  assert {fault['name'] for fault in faults} >= set(named)
  assert checkpoints(tmp_path / 'run')  # what was learnt until then stays
