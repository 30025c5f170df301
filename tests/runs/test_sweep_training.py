"""`lmspt sweep` trains: runs that finish, fail, are started again, stopped and killed, and what their folders say.

A stub stands in for `lmspt train`, but for one real training.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from _sweep_place import DRIVER, FIGURES, Place
from make_golden_step import TINY, replaced

from lmspt_jax.cli.main import main
from lmspt_jax.sweeps import local, members


@pytest.fixture
def place(tmp_path):
  place = Place(tmp_path)
  place.sweep("product(named({'a': {}, 'b': {'model.latent_dim': 128}}), seeds(2))")
  return place


@pytest.fixture
def lmspt(place, capsys):
  """Runs `lmspt sweep` here with the stub: (exit status, what it printed, its stderr)."""
  return lambda *options: (place.lmspt(*options), *capsys.readouterr())


@pytest.fixture
def start(place, repo):
  """Starts `lmspt sweep` with the stub as a process of its own."""
  started = []

  def run(*options: str) -> subprocess.Popen:
    started.append(subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(place.root / 'stub.py'), *place.arguments(*options)],
        env={**os.environ, 'PYTHONPATH': str(repo)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Of what runs in the background of a shell, tests too, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))
    return started[-1]

  yield run
  for process in started:
    process.kill()
    process.communicate()


def until(condition) -> None:
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def alive(pid: int) -> bool:
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


# ---------------------------------------------------------------- training here


def test_a_sweep_ends_in_a_table_a_csv_and_a_plot(place, lmspt):
  half = {step: {name: value / 2 for name, value in row.items()} for step, row in FIGURES.items()}
  place.plan(figures={'a-seed1': half, 'b-seed1': {**FIGURES, '4': {'mel': None, 'distillation': 5.0}}})
  status, out, err = lmspt()
  assert status == 0, err
  table = (place.workdir / 'sweep.md').read_text()
  assert out == table + '\n'
  assert [line for line in table.splitlines() if line.startswith('|')] == [
      '| group | latent_dim | finished | mel        | distillation |',
      '|-------|------------|----------|------------|--------------|',
      '| a     |            | 2 of 2   | 1.5 ± 0.71 | 0.75 ± 0.35  |',
      '| b     | 128        | 2 of 2   | nan        | 3 ± 2.8      |']
  assert 'Held-out figures at step 4: mean ± standard deviation' in table and 'Not finished' not in table
  assert list(csv.reader((place.workdir / 'sweep.csv').open())) == [
      ['name', 'group', 'seed', 'status', 'step', 'model.latent_dim', 'held_out/step', 'held_out/mel',
       'held_out/distillation'],
      ['a-seed0', 'a', '0', 'finished', '4', '', '4', '2.0', '1.0'],
      ['a-seed1', 'a', '1', 'finished', '4', '', '4', '1.0', '0.5'],
      ['b-seed0', 'b', '0', 'finished', '4', '128', '4', '2.0', '1.0'],
      ['b-seed1', 'b', '1', 'finished', '4', '128', '4', 'nan', '5.0']]
  svg = (place.workdir / 'sweep.svg').read_text()
  texts = [element.text for element in ElementTree.fromstring(svg).iter('{http://www.w3.org/2000/svg}text')]
  assert {'mel', 'distillation', 'a (2 runs)', 'b (2 runs)'} <= {*texts}

  # Again: nothing is trained, and every byte is the same.
  assert lmspt()[:2] == (0, out) and (place.workdir / 'sweep.svg').read_text() == svg
  assert all(len(place.starts(name)) == 1 for name in place.members())
  assert place.starts('b-seed1')[0]['argv'] == [
      f'--config={place.config}', f'--workdir={place.workdir}/b-seed1', '--config.model.latent_dim=128',
      '--config.train.seed=1']
  # More seeds: only they are trained.
  place.sweep("product(named({'a': {}, 'b': {'model.latent_dim': 128}}), seeds(3))")
  place.plan()
  status, out, _ = lmspt()
  assert status == 0 and '| a     |            | 3 of 3   |' in out
  assert [len(place.starts(name)) for name in place.members()] == [1] * 6


def test_a_failure_is_recorded_and_the_others_go_on(place, lmspt):
  place.plan(**{'a-seed0': ['half:1', '0'], 'b-seed0': ['-9', '0']})
  status, out, err = lmspt()
  assert status == 1
  assert 'a-seed0: failed with status 1, lmspt: error: out of luck; see ' in err
  assert 'b-seed0: failed with status 137' in err
  last = err.splitlines()[-1]
  assert last.startswith('lmspt: error: 2 of 4 runs are not finished: a-seed0 (')
  assert str(place.workdir / 'a-seed0' / 'log.txt') in last and str(place.workdir / 'b-seed0' / 'log.txt') in last
  assert f'* a-seed0: failed, step 2 (status 1, lmspt: error: out of luck; see {place.workdir}/a-seed0/log.txt)' in out
  assert '| a     |            | 1 of 2   | 2   | 1            |' in out
  assert (place.workdir / 'a-seed0' / 'log.txt').read_text() == 'lmspt: error: out of luck\n'
  status, table, _ = lmspt('--table')
  assert (status, table) == (0, out)  # remembered
  assert len(place.starts('a-seed0')) == 1
  status, out, _ = lmspt()
  assert status == 0 and 'Not finished' not in out
  assert [len(place.starts(name)) for name in ('a-seed0', 'a-seed1', 'b-seed0', 'b-seed1')] == [2, 1, 2, 1]


def test_status_75_is_started_again_while_that_helps(place, lmspt):
  place.sweep('seeds(2)')
  place.plan(seed0=['75', '75', 'half:75', '75', '75', '0'], seed1=['75'] * 9)
  status, out, err = lmspt()
  assert status == 1
  assert place.state('seed0') == 'finished' and len(place.starts('seed0')) == 6
  assert len(place.starts('seed1')) == 1 + local.RESTARTS
  assert 'seed1: failed, step 0 (status 75, ' in out and err.count('status 75: starts again') == 5 + local.RESTARTS


def test_parallel(place, lmspt):
  place.sweep('seeds(2)')
  place.plan(seed0=['meet'], seed1=['meet'])
  assert lmspt('--parallel=2')[0] == 0


# ---------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize('number, expected', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_waited_for(place, start, lmspt, number, expected):
  place.sweep('seeds(3)')
  place.plan(seed0=['slow', '0'], seed1=['wait', '0'])
  process = start('--parallel=2')
  until(lambda: (place.workdir / 'seed0' / 'waiting').exists() and (place.workdir / 'seed1' / 'waiting').exists())
  process.send_signal(number)
  err = process.communicate(timeout=60)[1]
  assert process.returncode == expected, err
  assert [(place.workdir / name / 'told').read_text() for name in ('seed0', 'seed1')] == [str(int(signal.SIGTERM))] * 2
  assert not place.starts('seed2') and place.state('seed0') == 'unfinished'
  status, out, err = lmspt()
  assert status == 0 and 'seed0: goes on at step 2' in err and 'seed2: started' in err
  assert '| base  | 3 of 3   | 2 ± 0 | 1 ± 0        |' in out


@pytest.mark.skipif(sys.platform != 'linux', reason='PR_SET_PDEATHSIG')
def test_no_training_outlives_a_killed_sweep_or_meets_the_next(place, start, lmspt):
  place.sweep('seeds(1)')
  place.plan(seed0=['slow', '0'])
  process = start()
  until((place.workdir / 'seed0' / 'waiting').exists)
  other = start()
  assert 'another lmspt sweep is at work there' in other.communicate(timeout=60)[1] and other.returncode == 1
  process.kill()
  process.wait()
  status, _, err = lmspt()  # at once, while the training that was left still saves
  assert status == 0, err
  assert 'a training of a sweep that died is still saving; waits for it' in err
  assert (place.workdir / 'seed0' / 'told').read_text() == str(int(signal.SIGTERM))
  assert 'seed0: goes on at step 2' in err  # what it saved was seen
  first, second = place.starts('seed0')
  assert not alive(first['pid']) and second['pid'] != first['pid']


# ---------------------------------------------------------------- what a folder says


def test_a_changed_sweep_is_refused(place, lmspt):
  place.plan()
  assert lmspt()[0] == 0
  for a, b, words in (('{}', "{'model.latent_dim': 64}", 'model.latent_dim: 128 there, 64 now'),
                      ("{'train.eval_seconds': 2.0}", '{}', 'train.eval_seconds: 6.0 there, 2.0 now')):
    place.sweep(f"product(named({{'a': {a}, 'b': {b}}}), seeds(2))")
    for options in ((), ('--table',), ('--dry-run',)):
      status, out, err = lmspt(*options)
      assert (status, out, err.count('\n')) == (1, '', 1)
      assert 'holds a run with another config (' in err and words in err
  # What a run may change while it goes on, a sweep may.
  place.sweep("product(named({'a': {}, 'b': {'model.latent_dim': 128}}), seeds(2))",
              ", overrides={'data.num_workers': 1}")
  assert lmspt()[0] == 0
  # A config that left no checkpoint binds nothing.
  for member in place.members().values():
    for path in (member.folder / 'checkpoints').iterdir():
      path.rmdir()
  place.sweep("product(named({'a': {'model.latent_dim': 64}, 'b': {}}), seeds(2))")
  assert [place.state(name) for name in place.members()] == ['waiting'] * 4


def test_finished_is_when_training_has_nothing_left_to_do(place, lmspt):
  place.sweep('seeds(1)')
  place.plan()
  assert lmspt()[0] == 0
  folder = place.workdir / 'seed0'
  metrics = (folder / 'metrics.jsonl').read_text()
  assert place.state('seed0') == 'finished'
  (folder / 'checkpoints' / '4').rename(folder / 'checkpoints' / '4.orbax-checkpoint-tmp')  # half-written
  assert place.state('seed0') == 'unfinished'
  (folder / 'checkpoints' / '4.orbax-checkpoint-tmp').rename(folder / 'checkpoints' / '4')
  rows = metrics.splitlines()
  (folder / 'metrics.jsonl').write_text('\n'.join(rows[:-2]) + '\n' + rows[-2][:-5])  # cut by a kill
  found = members.progress(place.members()['seed0'])
  assert (found.state, found.step, list(found.figures)) == ('unfinished', 2, [0, 2])


# ---------------------------------------------------------------- the real thing


def test_one_real_training(repo, tmp_path, monkeypatch, capsys):
  config = replaced(
      TINY, train__num_steps=2, train__eval_utterances=2, train__eval_seconds=1.0, train__checkpoint_every=1,
      data__crop_seconds=0.2, data__batch_size=2, data__held_out='package:speech_sample', teacher__strategy='none',
      discriminator__fft_sizes=(), loss__mel_bins=(20,), loss__mel_windows=(256,), model__shared_encoder=True,
      model__encoder_strides=(320,), model__decoder_rates=(320,), model__resynthesis_rates=(320,),
      model__semantic__data_init=False, model__acoustic__data_init=False)
  (tmp_path / 'config.py').write_text(
      f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  (tmp_path / 'sweep.py').write_text(
      f'from lmspt_jax.sweeps import *\ndef get_sweep():\n  return Sweep({str(tmp_path / "config.py")!r}, seeds(1))\n')
  monkeypatch.setenv('PYTHONPATH', str(repo))
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  arguments = ['sweep', f'--sweep={tmp_path / "sweep.py"}', f'--workdir={tmp_path / "w"}']
  status = main(arguments)
  assert status == 0, capsys.readouterr().err + (tmp_path / 'w' / 'seed0' / 'log.txt').read_text()
  (row,) = csv.DictReader((tmp_path / 'w' / 'sweep.csv').open())
  assert (row['status'], row['step'], row['held_out/step']) == ('finished', '2', '2')
  assert 0 < float(row['held_out/mel']) < 100 and 1 <= float(row['held_out/perplexity_semantic']) <= 32
  capsys.readouterr()
  assert main(arguments) == 0
  assert capsys.readouterr().err.startswith('seed0: finished\n')  # what `lmspt train` leaves is seen to be whole
