"""What a run measures of itself: throughput, waiting, utilisation of the chips, goodput over restarts; and FLOPs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden_step import TINY, replaced, write_teacher
from test_bad_input import CONFIG, idle_step

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.errors import LmsptError
from lmspt_jax.metrics import mean
from lmspt_jax.models.convolution2d import convolution
from lmspt_jax.models.layers import transposed_convolution
from lmspt_jax.training import loop, meter
from lmspt_jax.training.alarms import Alarms
from lmspt_jax.training.flops import RECOMPUTED, count_flops
from lmspt_jax.training.meter import Goodput, Meter, peak_flops

# ---------------------------------------------------------------- the meter, by a clock that the test sets


class Clock:
  """Stands in for `time`; nothing passes unless the test says so."""

  def __init__(self):
    self.now = 1000.0

  def perf_counter(self) -> float:
    return self.now

  time = perf_counter


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(meter, 'time', clock)
  return clock


class Rows(list):
  """A writer and a progress bar, which is off where there is no terminal."""

  disable = False

  def write(self, step, values):
    self.append((step, values))

  def update(self):
    pass

  def set_postfix_str(self, text):
    self.shown = text


@pytest.fixture
def rows():
  return Rows()


def make_meter(rows, goodput, flops=0, peak=None, **train):
  skipped = SimpleNamespace(update=lambda step, found: found, total=0)
  config = replaced(TINY, **{f'train__{key}': value for key, value in train.items()})
  return Meter(config, rows, rows, skipped, Alarms(config), flops=flops, peak_flops=peak, goodput=goodput)


def found(audio_seconds=8.0):
  return {name: mean(np.float32(1)) for name in ('loss/mel', 'loss/distillation', 'loss/discriminator')} | {
      'audio_seconds': (np.float32(audio_seconds), np.float32(1))}


def test_without_a_terminal_a_log_gets_lines(clock, rows, capsys):
  rows.disable = True
  measured = make_meter(rows, Goodput(None, None), log_every=2, num_steps=4)
  for step in range(1, 5):
    measured.add(step, found())
  measured.flush()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines] == ['step 2/4', 'step 4/4']
  assert 'mel 1.00' in lines[0] and not hasattr(rows, 'shown')


def test_a_row_says_what_happened_since_the_last(clock, rows):
  tested = make_meter(rows, Goodput(None, None), flops=3e12, peak=4e12, log_every=2)
  for step in (1, 2, 3, 4):
    with tested.waiting():
      clock.now += 0.5
    tested.add(step, found())
    clock.now += 1.5 if step < 3 else 3.5
  with tested.paused():
    clock.now += 100
  tested.flush()
  (first, a), (second, b) = rows
  assert (first, second) == (2, 4)
  assert a['audio_seconds_per_second'] == pytest.approx(2 * 8 / (2 + 2.5))  # step 2 is fetched when step 3 begins
  assert a['waiting_for_data'] == pytest.approx(1.5 / 4.5)
  assert a['model_flop_utilisation'] == pytest.approx(2 * 3 / (4.5 * 4))
  assert b['audio_seconds_per_second'] == pytest.approx(2 * 8 / (3.5 + 0.5 + 3.5))
  assert b['waiting_for_data'] == pytest.approx(0.5 / 7.5)
  assert b['goodput'] == pytest.approx((4.5 + 7.5) / (4.5 + 7.5 + 100))
  assert '2.1 audio s/s' in rows.shown and '20.0% of peak' in rows.shown and '7% waiting' in rows.shown


def test_without_a_known_chip_there_is_no_utilisation(clock, rows):
  assert peak_flops(jax.devices()) is None
  tested = make_meter(rows, Goodput(None, None), flops=3e12, peak=peak_flops(jax.devices()), log_every=1)
  tested.add(1, found())
  clock.now += 1
  tested.flush()
  assert 'model_flop_utilisation' not in rows[0][1] and 'of peak' not in rows.shown


def test_peak_of_a_slice():
  chips = [SimpleNamespace(device_kind='TPU v5 lite')] * 4
  assert peak_flops(chips) == 4 * 197e12


def test_goodput_over_a_kill(clock, rows, tmp_path):
  """Ten steps of 2 s, saved after six; killed, down for 30 s, started again for 10 s, the lost four done again."""
  goodput = Goodput(tmp_path, None)
  tested = make_meter(rows, goodput)
  for step in range(1, 11):
    tested.add(step, found())
    clock.now += 2
    tested.flush()
    if step == 6:
      record = json.loads(json.dumps(goodput.record))  # what a checkpoint holds
  assert goodput.share == pytest.approx(1)

  clock.now += 30
  again = Goodput(tmp_path, record)
  clock.now += 10
  tested = make_meter(rows, again)
  for step in range(7, 11):
    tested.add(step, found())
    clock.now += 2
    tested.flush()
  assert again.record['productive_seconds'] == pytest.approx(20)
  assert rows[-1][1]['goodput'] == again.share == pytest.approx(20 / (20 + 30 + 10 + 8))


def test_a_run_killed_before_its_first_checkpoint_started_when_it_started(clock, tmp_path):
  Goodput(tmp_path, None)
  clock.now += 50
  again = Goodput(tmp_path, None)
  again.productive_seconds = 10
  assert again.share == pytest.approx(0.2)


def test_a_damaged_first_start_is_named(tmp_path):
  (tmp_path / 'first_start.json').write_text('{}\n')
  with pytest.raises(LmsptError, match=r'first_start.json: does not say when'):
    Goodput(tmp_path, None)


def test_a_run_writes_them(tmp_path, monkeypatch):
  idle_step(monkeypatch)
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(tmp_path / 'teacher'))
  loop.train(config, tmp_path / 'run')
  logged = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert len(logged) == 4
  for row in logged:
    assert row['audio_seconds_per_second'] > 0 and 0 <= row['waiting_for_data'] <= 1 and 0 < row['goodput'] < 1
  store = CheckpointStore(tmp_path / 'run')
  early, late = (store.record(step)['timing']['productive_seconds'] for step in (2, 4))
  store.close()
  assert 0 < early < late
  assert (tmp_path / 'run' / 'first_start.json').exists()


# ---------------------------------------------------------------- FLOPs of a traced computation


def flops_of(function, *shapes, dtype=jnp.float32):
  traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
  return count_flops(traced.jaxpr)


def test_products_in_a_scan_count_as_often_as_it_runs():
  def step(x, kernels, last):
    with jax.named_scope('codec'):
      x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
    with jax.named_scope('teacher'):
      return jnp.sum(jnp.square(x @ last))

  one = 2 * 64 * 16 * 16
  shapes = (64, 16), (5, 16, 16), (16, 16)
  assert flops_of(step, *shapes).parts == {'codec': 5 * one, 'teacher': one}
  backward = flops_of(jax.grad(step, argnums=(0, 1, 2)), *shapes)
  assert backward.parts == {'codec': 15 * one, 'teacher': 3 * one}
  assert backward.passes == backward.model_flops == 18 * one


def test_what_is_recomputed_is_no_work_of_the_models():
  def step(x, kernel):
    return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ kernel) @ kernel))(x))

  one = 2 * 8 * 16 * 16
  found = flops_of(jax.grad(step), (8, 16), (16, 16))
  assert found.parts[RECOMPUTED] == 2 * one and found.model_flops == 4 * one
  assert found.passes == 6 * one


@pytest.mark.parametrize('precision, dtype, passes', [
    (jax.lax.Precision.HIGHEST, jnp.float32, 6), (jax.lax.Precision.HIGH, jnp.float32, 3), (None, jnp.float32, 1),
    (jax.lax.Precision.HIGHEST, jnp.bfloat16, 1)])
def test_float32_products_take_several_passes(precision, dtype, passes):
  found = flops_of(lambda x, y: jnp.matmul(x, y, precision=precision), (8, 16), (16, 4), dtype=dtype)
  assert found.passes == passes * found.model_flops == passes * 2 * 8 * 16 * 4


@pytest.mark.parametrize('function, x, kernel, macs', [
    (lambda x, k: transposed_convolution(x, k, 4), (2, 30, 8), (8, 8, 6), 2 * 31 * 8 * 8 * 6),
    (lambda x, k: convolution(x, k, 3, (0, 2)), (2, 3, 90, 8), (1, 5, 8, 6), 2 * 3 * 30 * 5 * 8 * 6)])
def test_convolutions_cost_their_taps_forward_and_for_both_gradients(function, x, kernel, macs):
  found = flops_of(jax.grad(lambda x, k: jnp.sum(jnp.square(function(x, k))), argnums=(0, 1)), x, kernel)
  assert found.model_flops == pytest.approx(3 * 2 * macs, rel=0.15)


def test_a_branch_that_the_data_chooses_counts_as_the_dearer():
  def step(x, y):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: (x @ y) @ y)

  assert flops_of(step, (16, 16), (16, 16)).model_flops == 2 * 2 * 16**3


def test_of_forms_for_platforms_the_default_counts():
  def step(x, y):
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: x @ y @ y @ y, default=lambda x, y: x @ y,
                                      tpu=lambda x, y: x @ y @ y)

  assert flops_of(step, (16, 16), (16, 16)).model_flops == 2 * 16**3
