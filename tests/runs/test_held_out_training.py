"""A training with held-out metrics, the best checkpoint and alarms: killed and resumed, it is as in one go."""

from __future__ import annotations

import functools
import json
import time

import jax
import numpy as np
import pytest
from make_golden_step import replaced, write_teacher
from test_bad_input import CONFIG

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.measures import ears, measure
from lmspt_jax.models.tokenizer import PATHS
from lmspt_jax.models.whisper_decoding import Listener
from lmspt_jax.pretrained.loading import load
from lmspt_jax.training import evaluators, loop, setup
from lmspt_jax.training.alarms import ROWS

STEPS, EVERY, CHECKPOINTS = 8, 2, 3
MEL = 'held_out/full/mel_distance'
BEST = 'held_out/perplexity_semantic'  # falls in so short a run: the best is an early one
CLOCK = ('audio_seconds_per_second', 'waiting_for_data', 'goodput', 'alarm/data_stall')


class Killed(BaseException):
  """Not an Exception: nothing may catch it."""


class Batches:
  """What training draws, until it is killed, and no faster than it may."""

  def __init__(self, make, kill_at=None, seconds=0.0):
    self.make, self.kill_at, self.seconds = make, kill_at, seconds

  def __call__(self, *arguments, start_batch, **options):
    self.inner, self.next = self.make(*arguments, start_batch=start_batch, **options), start_batch
    return self

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.inner.close()

  def __next__(self):
    if self.next == self.kill_at:
      raise Killed
    time.sleep(self.seconds)
    self.next += 1
    return next(self.inner)


@pytest.fixture(scope='module')
def config(tmp_path_factory, speech_folder):
  """Held out: two short utterances of the sample, and one that is longer than what is heard of it."""
  folder = tmp_path_factory.mktemp('held_out_training')
  rows = [json.loads(line) for line in (speech_folder / 'manifest.jsonl').read_text().splitlines()]
  held_out = folder / 'speech'
  held_out.mkdir()
  chosen = [row for row in rows if row['id'] in ('asterisk-vm-reachoper', 'asterisk-queue-thereare')]
  chosen.append(next(row for row in rows if row['id'].startswith('librivox')))
  for row in chosen:
    (held_out / f'{row["id"]}.flac').write_bytes((speech_folder / row['path']).read_bytes())
  (held_out / 'manifest.jsonl').write_text(''.join(
      json.dumps({**row, 'path': f'{row["id"]}.flac', 'split': 'valid'}) + '\n' for row in chosen))
  return replaced(
      CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'), data__held_out=f'folder:{held_out}',
      data__num_workers=0, train__num_steps=STEPS, train__log_every=1, train__eval_every=EVERY, train__eval_seconds=2.5,
      train__eval_audio=1, train__eval_metrics='wer,stoi,si_sdr,mel_distance,teacher_distance',
      train__checkpoint_every=CHECKPOINTS, train__keep_checkpoints=1, train__best_metric=BEST)


@pytest.fixture(scope='module')
def quick():
  """The pool measures in this process, and a text ends soon: noise can be heard as a long one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluators, 'Pool', lambda processes: measure.Pool(0))
    patch.setattr(ears, 'Listener', functools.partial(Listener, max_tokens=12))
    yield patch


@pytest.fixture(scope='module')
def in_one_go(config, quick, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('in_one_go') / 'run'
  loop.train(config, workdir)
  return workdir


def rows(workdir):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in CLOCK} for row in found]


def best_of(workdir):
  """(best by the rows, best by the newest checkpoint's record, steps of all checkpoints)."""
  value, step = max((row[BEST], row['step']) for row in rows(workdir) if BEST in row and row['step'])
  with CheckpointStore(workdir) as store:
    return (step, value), store.record(store.latest_step)['best'], store.steps


def test_every_path_is_measured(in_one_go):
  held_out = [row for row in rows(in_one_go) if BEST in row]
  assert [row['step'] for row in held_out] == list(range(0, STEPS + 1, EVERY))
  for row in held_out:
    assert {f'held_out/{path}/{name}' for path in PATHS for name in
            ('wer', 'stoi', 'si_sdr', 'mel_distance', 'teacher_distance')} <= row.keys()
    assert row['held_out/original/wer'] < 0.5 < row['held_out/full/wer']  # real speech, and an untrained model
    assert row['held_out/full/wer_missing'] == 1 and 'held_out/original/stoi' not in row
  assert held_out[0][MEL] != held_out[1][MEL]
  assert len(list((in_one_go / 'held_out').glob('step_*/*.wav'))) == 4 * len(held_out)


def test_the_best_is_kept(in_one_go, config):
  (step, value), record, steps = best_of(in_one_go)
  assert record == {'metric': BEST, 'step': step, 'value': value} and steps == [step, STEPS]
  assert load(f'{in_one_go}@best').step == step


@pytest.mark.parametrize('kill_at', [3, 5])
def test_killed_and_resumed_it_is_as_in_one_go(in_one_go, config, quick, tmp_path, kill_at):
  workdir = tmp_path / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setup, 'training_batches', Batches(setup.training_batches, kill_at=kill_at))
    with pytest.raises(Killed):
      loop.train(config, workdir)
  assert rows(workdir)[-1]['step'] < STEPS
  loop.train(config, workdir)
  assert rows(workdir) == rows(in_one_go)
  assert best_of(workdir) == best_of(in_one_go)
  ours, theirs = (jax.tree.leaves(load(run).params) for run in (workdir, in_one_go))
  assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- alarms, each by what it is for


def alarmed(config, workdir, capsys, **changed):
  """(rows, lines of the log) of a run without held-out evaluation."""
  config = replaced(config, data__held_out='', train__eval_metrics='', train__best_metric='', **changed)
  loop.train(config, workdir)
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return found, [line for line in capsys.readouterr().out.splitlines() if ' alarm: ' in line]


def test_dead_codes_raise_the_alarm(config, tmp_path, capsys):
  found, lines = alarmed(
      config, tmp_path / 'run', capsys, train__num_steps=12, data__crop_seconds=1.6, data__batch_size=4,
      model__semantic__codebook_size=1024, model__acoustic__codebook_size=1024, quirks__dead_codes=True)
  assert max(row['alarm/codebook_collapse'] for row in found) == 1
  assert any('alarm: codebook collapse: ' in line for line in lines)


def test_a_discriminator_that_learns_too_fast_raises_the_alarm(config, tmp_path, capsys):
  found, lines = alarmed(
      config, tmp_path / 'run', capsys, train__num_steps=80, train__checkpoint_every=80, data__batch_size=8,
      data__crop_seconds=0.4, discriminator__periods=(2,), discriminator__period_channels=(8, 16, 16, 16, 16),
      generator_optimizer__learning_rate=0.0, generator_optimizer__final_learning_rate=0.0,
      discriminator_optimizer__learning_rate=4e-3, discriminator_optimizer__final_learning_rate=4e-3)
  assert [row['alarm/discriminator_dominance'] for row in found[:20]] == [0] * 20
  assert max(row['alarm/discriminator_dominance'] for row in found) == 1
  assert any('alarm: discriminator dominates: its loss is' in line for line in lines)


def test_slow_data_raises_the_alarm(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(setup, 'training_batches', Batches(setup.training_batches, seconds=1.0))
  found, lines = alarmed(config, tmp_path / 'run', capsys, train__num_steps=ROWS + 2, train__checkpoint_every=100)
  assert found[-1]['alarm/data_stall'] == 1 and any('% of the time spent waiting for data' in line for line in lines)
