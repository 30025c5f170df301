"""A run that was killed or told to stop ends, after the same command again, bit for bit as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kills import Watched, differences, kill_runs, logged
from make_golden_step import DIMS, TINY, replaced, write_teacher

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.metrics import MetricWriter
from lmspt_jax.training.state import Experiment

STEPS = 20
EVERY = 10
# Everything that carries state or draws at random from step to step is on: moving averages, revival, dropout.
CONFIG = replaced(
    TINY, train__num_steps=STEPS, train__checkpoint_every=EVERY, data__batch_size=2, data__crop_seconds=0.2,
    discriminator__fft_sizes=(), loss__mel_bins=(20,), loss__mel_windows=(256,),
    model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,), model__acoustic__kind='ema',
    model__semantic__data_init=False, model__acoustic__data_init=False, model__semantic__revive_every=3,
    model__semantic__revive_below=0.5, model__acoustic__revive_every=4, model__acoustic__revive_below=0.5)

# The command line itself, with the digest of every batch that training draws written down. The one after the last
# step is drawn too: it is the batch that training would go on with.
DRIVER = """
import gc, hashlib, os, sys

gc.disable()  # a third of the time of tracing

from lmspt_jax.cli.main import main
from lmspt_jax.training import setup

training_batches = setup.training_batches


class Recorded:

  def __init__(self, *arguments, start_batch, **options):
    self.batches = training_batches(*arguments, start_batch=start_batch, **options)
    self.next = start_batch

  def __next__(self):
    batch = next(self.batches)
    digest = hashlib.sha256(b''.join(batch[key].tobytes() for key in sorted(batch))).hexdigest()
    with open(os.environ['BATCH_LOG'], 'a') as file:
      print(self.next, digest, file=file)
    self.next += 1
    return batch

  def __enter__(self):
    return self

  def __exit__(self, *_):
    next(self)
    self.batches.close()


if __name__ == '__main__':  # data workers import this file too
  setup.training_batches = Recorded
  sys.exit(main())
"""


@dataclass
class Started:
  """A training process; `workdir` is its run's."""

  process: subprocess.Popen
  workdir: Path
  log: Path

  def finish(self) -> tuple[int, str]:
    """(exit status, all it printed)."""
    output, _ = self.process.communicate(timeout=300)
    return self.process.returncode, output

  def batches(self) -> dict[int, str]:
    """Digest of each batch drawn by this process, by its number."""
    rows = [line.split() for line in self.log.read_text().splitlines()]
    assert len({number for number, _ in rows}) == len(rows)
    return {int(number): digest for number, digest in rows}

  def wait_for(self, condition) -> None:
    """Returns as soon as `condition()` holds."""
    end = time.monotonic() + 300
    while not condition():
      assert self.process.poll() is None, f'ended too early: {self.finish()}'
      assert time.monotonic() < end
      time.sleep(0.0005)


@pytest.fixture(scope='module')
def start(tmp_path_factory, repo):
  """(workdir, **environment) -> Started: the same command each time, with the machine code compiled once."""
  folder = tmp_path_factory.mktemp('resume')
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'))
  (folder / 'config.py').write_text(
      f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  (folder / 'driver.py').write_text(DRIVER)
  # Most of such a run is compilation: no optimisation, and one cache, which every process here reads.
  flags = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  environment = {**os.environ, 'PYTHONPATH': str(repo), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XLA_FLAGS': flags}
  running = []

  def run(workdir: Path, *overrides: str) -> Started:
    log = folder / f'batches_{len(running)}.txt'
    process = subprocess.Popen(
        [sys.executable, folder / 'driver.py', 'train', f'--config={folder / "config.py"}', f'--workdir={workdir}',
         *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**environment, 'BATCH_LOG': str(log)},
        start_new_session=True)
    running.append(process)
    return Started(process, workdir, log)

  yield run
  for process in running:
    if process.poll() is None:
      process.kill()
      process.wait()


@pytest.fixture(scope='module')
def in_one_go(start, tmp_path_factory) -> Started:
  """The run that nothing interrupts, and that saves nothing on its way."""
  run = start(tmp_path_factory.mktemp('in_one_go'), f'--config.train.checkpoint_every={10 * STEPS}')
  status, output = run.finish()
  assert status == 0, output
  assert checkpoints(run.workdir) == [str(STEPS)]
  return run


def checkpoints(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


@functools.cache
def abstract_state() -> dict[str, Any]:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                      vars(Experiment(CONFIG, DIMS).abstract_state()))


def saved(workdir: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """(state as arrays by path, record) of a checkpoint."""
  store = CheckpointStore(workdir)
  state, record = store.restore(step, abstract_state())
  store.close()
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}, record


def assert_same_end(run: Started, reference: Started, since: int) -> None:
  """The state after the last step, the batches since `since` and the log are the reference's."""
  (state, record), (expected, expected_record) = saved(run.workdir, STEPS), saved(reference.workdir, STEPS)
  different = [path for path in expected if state[path].tobytes() != expected[path].tobytes()]
  assert not different and state.keys() == expected.keys()
  for part in ('generator', 'discriminator', 'generator_opt', 'discriminator_opt', 'codebooks'):
    assert any(part in path for path in state)
  assert record['data'] == expected_record['data']
  assert (record['data']['seed'], record['data']['next_batch']) == (0, STEPS)

  every = reference.batches()
  assert list(every) == list(range(STEPS + 1)) and len(set(every.values())) == len(every)
  assert run.batches() == {number: every[number] for number in range(since, STEPS + 1)}
  assert rows(run.workdir) == rows(reference.workdir)


def rows(workdir: Path) -> list[dict[str, float]]:
  """metrics.jsonl without what a clock says; every step is in it once, in order."""
  found = logged(workdir)
  assert [row['step'] for row in found] == list(range(1, STEPS + 1))
  assert all(len(row) > 10 for row in found)
  return found


def kill_while_saving(run: Started, step: int) -> bool:
  """Kills the run when it has begun to write the checkpoint of `step`; False if it was faster than this process."""
  folder = run.workdir / 'checkpoints'
  run.wait_for(lambda: folder.is_dir() and any(name.startswith(str(step)) for name in checkpoints(run.workdir)))
  run.process.send_signal(signal.SIGSTOP)  # nothing moves while we look
  half_written = str(step) not in checkpoints(run.workdir)
  run.process.kill()
  assert run.finish()[0] == -signal.SIGKILL
  return half_written


def test_killed_while_it_saves(start, in_one_go, tmp_path):
  for attempt in range(5):
    run = start(tmp_path / str(attempt))
    if kill_while_saving(run, STEPS):
      break
  (left_over,) = set(checkpoints(run.workdir)) - {str(EVERY)}
  assert left_over != str(STEPS) and str(EVERY) in checkpoints(run.workdir)
  # As if another start had been killed too, while it saved on SIGTERM.
  shutil.copytree(run.workdir / 'checkpoints' / left_over,
                  run.workdir / 'checkpoints' / left_over.replace(str(STEPS), str(STEPS - 1)))
  assert len((run.workdir / 'metrics.jsonl').read_text().splitlines()) == STEPS  # ten of them are to be done again

  again = start(run.workdir)
  status, output = again.finish()
  assert status == 0, output
  assert f'resuming at step {EVERY}\n' in output
  assert checkpoints(run.workdir) == [str(EVERY), str(STEPS)]
  assert_same_end(again, in_one_go, since=EVERY)
  before, after = saved(run.workdir, EVERY)[0], saved(run.workdir, STEPS)[0]
  assert all(not np.array_equal(before[path], after[path]) for path in before if path.startswith("['generator']"))


def test_told_to_stop(start, in_one_go, tmp_path):
  run = start(tmp_path / 'run', '--config.data.num_workers=1')
  metrics, folder = run.workdir / 'metrics.jsonl', run.workdir / 'checkpoints'
  run.wait_for(lambda: metrics.exists() and metrics.read_text().count('\n') >= 2)
  # As Slurm does it: all processes, the data workers too; and again while the state is being saved.
  os.killpg(run.process.pid, signal.SIGTERM)
  run.wait_for(lambda: any(path.name != str(EVERY) for path in folder.glob('*')))
  os.killpg(run.process.pid, signal.SIGTERM)
  status, output = run.finish()
  assert status == 75, output
  (step,) = map(int, checkpoints(run.workdir))
  assert 2 <= step < STEPS and step != EVERY
  assert f'SIGTERM: stopped at step {step}, saved in {run.workdir}; run the same command again' in output

  again = start(run.workdir)
  status, output = again.finish()
  assert status == 0, output
  assert f'resuming at step {step}\n' in output
  assert_same_end(again, in_one_go, since=step)


def test_killed_at_random_moments(start, in_one_go, tmp_path):
  def begin(workdir: Path) -> Watched:
    return Watched(start(workdir).process, workdir)

  typical = {'start': 2.0, 'compile': 2.0, 'step': 0.1, 'save': 0.02}
  kills, runs = kill_runs(begin, tmp_path, 5, random.Random(4), typical)
  assert len(kills) == 5 and len({kill.phase for kill in kills}) >= 2, kills
  for run in runs:
    assert differences(run, in_one_go.workdir, STEPS) == []
    assert checkpoints(run) == [str(EVERY), str(STEPS)]


def test_a_run_that_was_killed_before_its_first_checkpoint_logs_from_the_beginning(tmp_path):
  for _ in range(2):  # the second time as if the first had been killed
    writer = MetricWriter(tmp_path, start_step=0)
    writer.write(0, {'held_out/mel': 3.0})
    writer.write(1, {'loss/mel': 2.0})
    writer.close()
  assert [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [0, 1]
