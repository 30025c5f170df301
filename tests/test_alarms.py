"""Alarms: a sound run raises none; what each is for raises it, once it lasts, and ends it; a resumed run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from make_golden_step import replaced

from lmspt_jax.cli import flags
from lmspt_jax.losses.adversarial import discriminator_loss, generator_adversarial_loss
from lmspt_jax.training.alarms import ROWS, Alarms

ROOT = Path(__file__).parents[1]
# What alarms look at in the rows of a `make demo` (2 CPU cores, 2026-11-26), but for acoustic codebooks' least.
DEMO_FILE = Path(__file__).parent / 'fixtures' / 'demo_rows.jsonl'
DEMO_ROWS = [json.loads(line) for line in DEMO_FILE.read_text().splitlines()]
NAMES = ('alarm/codebook_collapse', 'alarm/discriminator_dominance', 'alarm/data_stall')
SOUND = DEMO_ROWS[-1]


@pytest.fixture(scope='module')
def demo():
  return flags.load(str(ROOT / 'configs' / 'demo.py'))


def over(alarms, rows):
  """(what is added to each row, all lines)."""
  added, lines = [], []
  for step, row in enumerate(rows):
    values, told = alarms.update(step, row)
    assert tuple(values) == NAMES
    added.append(tuple(map(int, values.values())))
    lines += told
  return added, lines


def test_the_demo_raises_none(demo):
  assert len(DEMO_ROWS) == 20
  added, lines = over(Alarms(demo), DEMO_ROWS)
  assert set(added) == {(0, 0, 0)} and lines == []


def dominated(fake, real):
  """Losses of four sub-discriminators that answer this."""
  maps = lambda answer: [[jnp.full((2, 5), answer)]] * 4
  return {'loss/discriminator': float(discriminator_loss(maps(real), maps(fake))),
          'loss/adversarial': float(generator_adversarial_loss(maps(fake)))}


@pytest.mark.parametrize('number, change, words', [
    (0, {'codebook/least_perplexity_acoustic': 15.0}, 'acoustic perplexity 15, under 16'),  # 5 % of 320 frames
    (0, {'codebook/least_perplexity_semantic': 3.0}, 'semantic perplexity 3'),
    (1, dominated(0.05, 0.95), 'its loss is 0.005 a discriminator'),
    (2, {'waiting_for_data': 0.5}, '50% of the time')])
def test_each_begins_and_ends_once_it_lasts(demo, number, change, words):
  bad = {**SOUND, **change}
  alarms = Alarms(demo)
  odd = [bad] * (ROWS - 1) + [SOUND]
  assert over(alarms, odd) == ([(0, 0, 0)] * ROWS, [])
  on = tuple(int(place == number) for place in range(3))
  added, lines = over(alarms, [bad] * ROWS + [SOUND] * ROWS)
  assert added == [(0, 0, 0)] * (ROWS - 1) + [on] * ROWS + [(0, 0, 0)]
  assert [line.split(' ', 2)[1] for line in lines] == [str(ROWS - 1), str(2 * ROWS - 1)]
  assert words in lines[0] and lines[1].endswith(': over') and alarms.marks == []


def test_a_discriminator_that_can_not_tell_raises_none(demo):
  for fake, real in ((0.5, 0.5), (0.3, 0.7), (0.9, 0.9), (0.0, 0.0)):
    assert over(Alarms(demo), [{**SOUND, **dominated(fake, real)}] * ROWS)[1] == []


def test_a_row_that_does_not_tell_changes_nothing(demo):
  bad, unknown = {**SOUND, 'waiting_for_data': 0.9}, {'waiting_for_data': math.nan}
  added, lines = over(Alarms(demo), [bad, unknown, bad, unknown, {}, bad])
  assert added[-2:] == [(0, 0, 0), (0, 0, 1)] and len(lines) == 1


def test_small_codebooks_may_be_worth_little(demo):
  small = replaced(demo, model__semantic__codebook_size=32, model__acoustic__codebook_size=63)
  nothing = {f'codebook/least_perplexity_{part}': 1.0 for part in ('semantic', 'acoustic')}
  assert over(Alarms(small), [{**SOUND, **nothing}] * ROWS)[1] == []
  assert over(Alarms(demo), [{**SOUND, **nothing}] * ROWS)[1] != []


@pytest.mark.parametrize('cut', range(1, 12))
def test_a_run_that_resumes_has_the_same_alarms(demo, cut):
  bad = {**SOUND, 'waiting_for_data': 0.9, 'codebook/least_perplexity_semantic': 2.0}
  rows = [*np.array([bad, SOUND])[[0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1]]]
  expected, _ = over(Alarms(demo), rows)
  first = Alarms(demo)
  before, _ = over(first, rows[:cut])
  again = Alarms(demo, json.loads(json.dumps(first.record)))  # what a checkpoint holds
  after, _ = over(again, rows[cut:])
  assert before + after == expected and (1, 0, 1) in expected and expected[-1] == (0, 0, 0)
