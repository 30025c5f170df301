"""The best checkpoint is kept beside the newest, found as RUN@best, and named by `lmspt info`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from _tiny_run import CONFIG, write_run

from lmspt_jax import Tokenizer
from lmspt_jax.checkpoint import CheckpointStore, run_and_which
from lmspt_jax.cli.main import main
from lmspt_jax.config import to_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.pretrained.loading import load

METRIC = 'held_out/full/pesq'


def best(step, value=3.0):
  return {'metric': METRIC, 'step': step, 'value': value}


def save(workdir, steps, keep):
  """Saves (step, best step so far) one after the other; the checkpoints that are there then."""
  with CheckpointStore(workdir, keep=keep) as store:
    for step, best_step in steps:
      store.save(step, {'x': jax.numpy.full(3, step)}, {'best': best(best_step) if best_step else None})
      store.wait()
    return store.steps


def test_the_best_stays_beside_the_newest(tmp_path):
  assert save(tmp_path, [(1, None), (2, 2), (3, 2), (4, 2), (5, 2)], keep=2) == [2, 4, 5]
  assert save(tmp_path, [(6, 2)], keep=2) == [2, 5, 6]  # of a process that goes on
  assert save(tmp_path, [(7, 7), (8, 7), (9, 7), (10, 7)], keep=2) == [7, 9, 10]
  assert save(tmp_path, [(11, 7)], keep=1) == [7, 11]
  assert save(tmp_path / 'off', [(step, None) for step in range(1, 6)], keep=2) == [4, 5]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Of the newest checkpoint, 9, the best step is 3; another model is saved at each."""
  workdir = write_run(tmp_path_factory.mktemp('best') / 'run')
  first = load(workdir)
  with CheckpointStore(workdir) as store:
    for step, found in ((6, None), (9, best(3, 3.25))):
      params = jax.tree.map(lambda x, step=step: x + step / 100, first.params)
      store.save(step, {'average': {'params': params, 'codebooks': first.codebooks},
                        'generator': {'tokenizer': params}, 'codebooks': first.codebooks},
                 {'config': to_dict(CONFIG), 'teacher_id': 'teacher-id', 'best': found})
      store.wait()
  return workdir


def test_a_checkpoint_is_named(run, tmp_path):
  newest, at_best, at_six = (Tokenizer.from_pretrained(f'{run}{which}') for which in ('', '@best', '@6'))
  assert [one.model.step for one in (newest, at_best, at_six)] == [9, 3, 6]
  assert len({one.model_hash for one in (newest, at_best, at_six)}) == 3
  assert at_best.model.source == f'{run}@best' and newest.model.best.value == 3.25
  odd = write_run(tmp_path / 'run@6')  # a folder of that name
  assert load(odd).step == 3 and run_and_which(odd) == (odd, '') and load(f'{odd}@3').step == 3
  assert run_and_which('a@b') == (Path('a@b'), '') and str(run_and_which('x/y@best')[0]) == 'x/y'


def test_what_is_not_there_is_told(run, tiny_run):
  for model, words in ((f'{run}@4', 'no checkpoint of step 4; there are 3, 6, 9'),
                       (f'{tiny_run}@best', 'trained without train.best_metric, or not evaluated yet'),
                       (f'{run}/none@best', 'no such model')):
    with pytest.raises(LmsptError, match=words):
      load(model)


@pytest.mark.parametrize('damage', [{'metric': 1, 'step': 3, 'value': 1.0}, [], {'metric': 'm', 'step': 3},
                                    {'metric': 'm', 'step': 3, 'value': float('nan')}])
def test_a_damaged_record_is_told(tmp_path, damage):
  workdir = write_run(tmp_path / 'run')
  path = next(workdir.glob('checkpoints/3/record/*.json'))
  path.write_text(json.dumps(json.loads(path.read_text()) | {'best': damage}))
  with pytest.raises(LmsptError, match=r'has best = .*damaged'):
    load(workdir)


def test_info_and_export_take_it(run, tmp_path, capsys):
  assert main(['info', str(run)]) == 0
  out = capsys.readouterr().out
  assert 'tiny, step 9' in out and f'step 3, {METRIC} 3.25' in out
  assert main(['export', f'--model={run}@best', '--format=safetensors', f'--out={tmp_path / "out"}']) == 0
  assert load(tmp_path / 'out').step == 3
  np.testing.assert_array_equal(*(next(iter(jax.tree.leaves(load(model).params))) for model in
                                  (f'{run}@best', tmp_path / 'out')))
