"""Two processes that train as one over loopback: the same run as one process, and a common end whatever happens."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from make_golden_step import DIMS, TINY, replaced, speech_batches, write_teacher

from lmspt_jax.checkpoint import CheckpointStore, restore_for_inference
from lmspt_jax.errors import LmsptError
from lmspt_jax.hosts.agreement import whole_batch
from lmspt_jax.hosts.place import Place, find_place
from lmspt_jax.training.state import Experiment

STEPS = 20
EVERY = 10
# Whatever depends on the whole batch is on: k-means start, moving averages, revival, dropout. At a learning rate where
# the last bits of float32, which depend on the order of sums, do not yet choose another code.
CONFIG = replaced(
    TINY, train__num_steps=STEPS, train__checkpoint_every=EVERY, data__batch_size=8, data__crop_seconds=0.2,
    data__held_out='package:speech_sample', train__eval_every=EVERY, train__eval_utterances=10, train__eval_audio=1,
    train__eval_seconds=0.4, train__eval_metrics='mel_distance', train__best_metric='held_out/full/mel_distance',
    discriminator__fft_sizes=(), loss__mel_bins=(20,), loss__mel_windows=(256,),
    generator_optimizer__learning_rate=1e-4, discriminator_optimizer__learning_rate=1e-4,
    model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,), model__acoustic__kind='ema', model__acoustic__data_init=False,
    model__semantic__revive_every=3, model__semantic__revive_below=0.5, model__acoustic__revive_every=4,
    model__acoustic__revive_below=0.5)

# The command line itself, with what the tests look at or bring about.
DRIVER = """
import gc, hashlib, os, resource, sys, time

gc.disable()  # a third of the time of tracing

from lmspt_jax.cli.main import main
from lmspt_jax.errors import LmsptError
from lmspt_jax.hosts import watch
from lmspt_jax.training import loop, setup, workdir

watch.LOST_AFTER, watch.BEAT, workdir._SEEN_WITHIN = 6.0, 0.5, 1.0
training_batches = setup.training_batches


class Watched:
  # Writes down the digest of each row, by its example number.

  def __init__(self, *arguments, start_batch, **options):
    self.batches = training_batches(*arguments, start_batch=start_batch, **options)
    self.number = start_batch

  def __iter__(self):
    return self

  def __next__(self):
    if self.number == int(os.environ.get('FAIL_AT', -1)):
      raise LmsptError('data: no more of it')
    if self.number == int(os.environ.get('FULL_AT', -1)):  # for the files of checkpoints; logs are shorter
      resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    time.sleep(float(os.environ.get('SECONDS', 0)))
    batch = next(self.batches)
    with open(os.environ['ROWS'], 'a') as file:
      for index, audio in zip(batch['index'], batch['audio']):
        print(index, hashlib.sha256(audio.tobytes()).hexdigest(), file=file)
    self.number += 1
    return batch

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.batches.close()


def make_idle_step(*_):
  import jax.numpy as jnp
  from lmspt_jax.metrics import mean

  def step(state, teacher_params, batch):
    values = {'loss/mel': batch['audio'][:, 0].sum(), 'loss/distillation': 1.0, 'loss/discriminator': 1.0,
              'audio_seconds': jnp.sum(batch['num_samples']) / 16_000, 'skipped': 0.0}
    values = {name: mean(jnp.asarray(value)) for name, value in values.items()}
    return state.replace(step=state.step + 1), values

  return step


setup.training_batches = Watched
if os.environ.get('IDLE'):
  loop.make_train_step = make_idle_step  # learns nothing and compiles at once
sys.exit(main())
"""


@dataclass
class Run:
  """The processes of one run; `rows` are their logs."""

  processes: list[subprocess.Popen]
  workdir: Path
  rows: list[Path]

  def finish(self, host: int, seconds: float = 300) -> tuple[int, str]:
    """(exit status, all it printed) of a process."""
    output, _ = self.processes[host].communicate(timeout=seconds)
    return self.processes[host].returncode, output

  def succeed(self) -> Run:
    for host in range(len(self.processes)):
      status, output = self.finish(host)
      assert status == 0, output
    return self

  def examples(self) -> dict[int, str]:
    """Digest of each row of the batches, by its example number; no host made what another did."""
    made = [{tuple(line.split()) for line in path.read_text().splitlines()} for path in self.rows]
    pairs = set().union(*made)
    assert len({index for index, _ in pairs}) == len(pairs) == sum(map(len, made))
    return {int(index): digest for index, digest in pairs}

  def wait_for(self, condition) -> None:
    end = time.monotonic() + 300
    while not condition():
      for host, process in enumerate(self.processes):
        assert process.poll() is None, f'ended too early: {self.finish(host)}'
      assert time.monotonic() < end
      time.sleep(0.02)


@pytest.fixture(scope='module')
def start(tmp_path_factory, repo):
  """(workdirs, *overrides, devices per process, environment per process) -> Run, a process for each workdir."""
  folder = tmp_path_factory.mktemp('hosts')
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'))
  (folder / 'config.py').write_text(
      f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  (folder / 'driver.py').write_text(DRIVER)
  # Most of such a run is compilation: no optimisation, and one cache, which every process here reads.
  flags = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  environment = {**os.environ, 'PYTHONPATH': str(repo), 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XLA_FLAGS': flags}
  running = []

  def run(workdirs: list[Path], *overrides: str, devices: int, more: tuple[dict[str, str], ...] = ({}, {})) -> Run:
    at, here, rows = f'127.0.0.1:{free_port()}', [], []
    for host, workdir in enumerate(workdirs):
      place = [f'--coordinator={at}', f'--num-processes={len(workdirs)}', f'--process-id={host}']
      rows.append(folder / f'rows_{len(running)}.txt')
      rows[-1].touch()
      here.append(subprocess.Popen(
          [sys.executable, folder / 'driver.py', 'train', f'--config={folder / "config.py"}', f'--workdir={workdir}',
           *place, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
          env={**environment, 'ROWS': str(rows[-1]), 'JAX_NUM_CPU_DEVICES': str(devices), **more[host]}))
      running.append(here[-1])
    return Run(here, workdirs[0], rows)

  yield run
  for process in running:
    if process.poll() is None:
      process.kill()
      process.wait()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


IDLE = ({'IDLE': '1'}, {'IDLE': '1'})
BRISK = tuple({**where, 'SECONDS': '0.05'} for where in IDLE)  # a while for each step, so that a signal comes amid them
ALONE = ('--config.data.held_out=', '--config.train.eval_metrics=', '--config.train.best_metric=',
         '--config.model.semantic.data_init=false')


@pytest.fixture(scope='module')
def one(start, tmp_path_factory) -> Run:
  """One process with eight devices."""
  return start([tmp_path_factory.mktemp('one')], devices=8).succeed()


@pytest.fixture(scope='module')
def two(start, one, tmp_path_factory) -> Run:
  """Two processes with four devices each. After `one`, so that they don't compile at the same time."""
  workdir = tmp_path_factory.mktemp('two')
  return start([workdir, workdir], devices=4).succeed()


def rows(workdir: Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def newest(workdir: Path) -> int:
  """Step of the newest checkpoint that is whole, or 0."""
  return max((int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdecimal()), default=0)


@functools.cache
def abstract_state() -> dict[str, Any]:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                      vars(Experiment(CONFIG, DIMS).abstract_state()))


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """State of a checkpoint as arrays by path."""
  store = CheckpointStore(workdir)
  state, _ = store.restore(step, abstract_state())
  store.close()
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}


# ---------------------------------------------------------------- as one


def test_losses_are_those_of_one_process(one, two):
  """Sums run in another order, so the last bits of float32 differ."""
  expected, found = rows(one.workdir), rows(two.workdir)
  assert [row['step'] for row in found] == [row['step'] for row in expected]
  compared = set()
  for row, reference in zip(found, expected, strict=True):
    for name in reference:
      if name.startswith(('loss/', 'held_out/')):
        compared.add(name)
        assert row[name] == pytest.approx(reference[name], rel=1e-4), (reference['step'], name)
      elif name.startswith('codebook/'):
        assert row[name] == pytest.approx(reference[name], rel=1e-6), (reference['step'], name)
  assert {'loss/generator', 'loss/discriminator', 'held_out/mel', 'held_out/perplexity_semantic',
          'held_out/resynthesis/mel_distance'} <= compared
  assert len({row['loss/mel'] for row in found if 'loss/mel' in row}) == STEPS


def test_the_best_is_that_of_one_process(one, two):
  records = []
  for run in (one, two):
    with CheckpointStore(run.workdir) as store:
      records.append(store.record(STEPS)['best'])
    name, step, value = (records[-1][key] for key in ('metric', 'step', 'value'))
    evaluated = {row['step']: row[name] for row in rows(run.workdir) if row['step'] and name in row}
    assert evaluated[step] == value == min(evaluated.values()) and len(evaluated) == 2
  assert records[0]['step'] == records[1]['step']


def test_codes_are_those_of_one_process(one, two):
  audio = np.concatenate([batch['audio'] for batch in speech_batches(CONFIG, 4)])
  codes = [np.asarray(jax.jit(restore_for_inference(run.workdir).tokenizer.encode)(audio)) for run in (one, two)]
  assert np.array_equal(*codes) and all(len(np.unique(codes[0][:, k])) > 8 for k in range(codes[0].shape[1]))
  start, end = saved(two.workdir, EVERY), saved(two.workdir, STEPS)
  assert all(not np.array_equal(start[path], end[path]) for path in start if path.startswith("['generator']"))


def test_hosts_start_from_another_run(start, one, two, tmp_path):
  """Fine-tuning, with all that a run has: the first step is that of one process, from where the other run was."""
  overrides = (f'--config.init.model={one.workdir}', '--config.init.weights=last', '--config.init.discriminators=true',
               '--config.init.optimizers=true', '--config.train.num_steps=2')
  alone = start([tmp_path / 'alone'], *overrides, devices=8).succeed()
  hosts = start([tmp_path / 'hosts'] * 2, *overrides, devices=4).succeed()
  expected, found = ([row for row in rows(run.workdir) if 'loss/mel' in row] for run in (alone, hosts))
  assert [row['step'] for row in found] == [1, 2]
  for row, reference, fresh in zip(found, expected, rows(one.workdir), strict=False):
    for name in ('loss/mel', 'loss/distillation', 'loss/discriminator'):
      assert row[name] == pytest.approx(reference[name], rel=1e-4), (row['step'], name)
    assert row['loss/mel'] != pytest.approx(fresh.get('loss/mel', 0), rel=1e-3)


def test_each_example_is_made_by_one_host(one, two):
  examples = one.examples()
  assert two.examples() == examples and sorted(examples) == list(range(STEPS * 8))
  assert all(path.read_text() for path in two.rows)


def test_only_host_0_writes(one, two):
  """Each file is there once and whole, as one process leaves it; there is one log of TensorBoard's."""
  names = [sorted(str(path.relative_to(run.workdir)) for path in run.workdir.rglob('*')
                  if 'checkpoints' not in path.parts and 'tensorboard' not in path.parts) for run in (one, two)]
  assert names[0] == names[1] and 'parameters.txt' in names[0]
  assert sum(name.endswith('.wav') for name in names[0]) == 3 * 4  # evaluations, kinds
  assert len(list((two.workdir / 'tensorboard').iterdir())) == 1
  assert len((two.workdir / 'commands.txt').read_text().splitlines()) == 1
  assert '--process-id=0' in (two.workdir / 'commands.txt').read_text()
  assert len(rows(two.workdir)) == len(rows(one.workdir))


@pytest.mark.parametrize('before, after', [('one', 2), ('two', 1)])
def test_goes_on_with_another_number_of_hosts(start, request, tmp_path, before, after):
  """Saved by one process and restored by two, and the other way round, by steps that leave the state as it is."""
  run = request.getfixturevalue(before)
  shutil.copytree(run.workdir, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(STEPS))
  again = start([tmp_path / 'run'] * after, devices=8 // after, more=IDLE)
  status, output = again.finish(0)
  assert status == 0 and f'resuming at step {EVERY}\n' in output, output
  again.succeed()
  left, found = saved(run.workdir, EVERY), saved(tmp_path / 'run', STEPS)
  different = [path for path in left if left[path].tobytes() != found[path].tobytes()]
  assert different == ["['step']"] and left.keys() == found.keys()
  assert again.examples() == {index: digest for index, digest in run.examples().items() if index >= EVERY * 8}


# ---------------------------------------------------------------- the end


def last_line(output: str) -> str:
  return output.rstrip('\n').splitlines()[-1]


def test_a_lost_host_ends_all_and_a_stop_of_one_stops_all(start, tmp_path):
  """In turn, in one workdir: host 1 is killed, host 0 is killed, host 1 is told to stop."""
  workdir = tmp_path / 'run'
  begin = lambda: start([workdir, workdir], '--config.train.num_steps=100000', '--config.train.checkpoint_every=20',
                        *ALONE, devices=1, more=BRISK)
  for victim in (1, 0):
    run, before = begin(), newest(workdir)
    run.wait_for(lambda: newest(workdir) > before)  # noqa: B023
    run.processes[victim].kill()
    killed = time.monotonic()
    status, output = run.finish(1 - victim, seconds=60)
    assert status == 75 and time.monotonic() - killed < 30, output
    assert f'lmspt: stopped: host {victim} of 2 is lost: ' in last_line(output)
    assert 'start the same command again on all hosts' in last_line(output)

  run, before = begin(), newest(workdir)
  metrics = workdir / 'metrics.jsonl'
  run.wait_for(lambda: metrics.read_text().count('\n') > before + 5)
  run.processes[1].terminate()
  ends = [run.finish(host, seconds=60) for host in range(2)]
  assert [status for status, _ in ends] == [75, 75], ends
  assert f'resuming at step {before}\n' in ends[0][1]
  step = newest(workdir)
  assert step > before
  for _, output in ends:
    assert f'stopped at step {step}, saved in {workdir}' in last_line(output)
  assert [row['step'] for row in rows(workdir)] == list(range(1, step + 1))


def test_a_host_that_fails_says_why_to_all(start, tmp_path):
  run = start([tmp_path, tmp_path], *ALONE, devices=1, more=(IDLE[0], {**IDLE[1], 'FAIL_AT': '5'}))
  (status_0, output_0), (status_1, output_1) = run.finish(0, 60), run.finish(1, 60)
  assert (status_0, status_1) == (1, 1)
  assert last_line(output_0) == 'lmspt: stopped: host 1 failed: data: no more of it'
  assert last_line(output_1) == 'lmspt: error: data: no more of it'


def test_a_host_that_cannot_save_ends_all(start, tmp_path):
  """Its part of the checkpoint is what the other one's save waits for, and its own next step for the other host."""
  run = start([tmp_path, tmp_path], *ALONE, devices=1, more=(BRISK[0], {**BRISK[1], 'FULL_AT': str(EVERY - 1)}))
  (status_0, output_0), (status_1, output_1) = run.finish(0, 90), run.finish(1, 90)
  assert (status_0, status_1) == (1, 1), output_0 + output_1
  message = f'{tmp_path}/checkpoints/{EVERY}: this checkpoint could not be written ('
  assert message in last_line(output_0) and 'host 1 failed: ' in last_line(output_0)
  assert message in last_line(output_1)
  assert newest(tmp_path) == 0


def test_a_workdir_of_ones_own_is_refused(start, tmp_path):
  run = start([tmp_path / 'a', tmp_path / 'b'], *ALONE, devices=1, more=IDLE)
  for host in range(2):
    status, output = run.finish(host, 60)
    assert status == 1 and 'does not see what host 0 writes there' in last_line(output), output
  assert not (tmp_path / 'b').exists()


def test_faults_of_one_host_are_counted_by_all_and_listed_by_host_0(start, speech_folder, tmp_path):
  """Two hosts stop at the same step as one process does, for the same reason, and leave the same list."""
  folder = tmp_path / 'spoilt'
  folder.mkdir()
  for path in sorted((speech_folder / 'audio').glob('*.flac'))[:40]:
    shutil.copy(path, folder)
  for number in range(8):
    (folder / f'bad_{number}.wav').write_text('this is no audio')
  overrides = [f'--config.data.train=folder:{folder}', '--config.data.train.0.split=', *ALONE,
               '--config.data.max_fault_rate=0.08']
  ends, lists, logs = [], [], []
  for hosts in (1, 2):
    run = start([tmp_path / str(hosts)] * hosts, *overrides, devices=2 // hosts, more=IDLE)
    ends.append([run.finish(host, 120) for host in range(hosts)])
    assert all(status == 1 for status, _ in ends[-1]), ends[-1]
    lists.append([json.loads(line) for line in (run.workdir / 'faults.jsonl').read_text().splitlines()])
    logs.append(run)
  assert lists[0] == lists[1] and len(lists[0]) > 3
  assert all('more than data.max_fault_rate = 0.08' in last_line(output) for end in ends for _, output in end)
  assert logs[0].examples().keys() == logs[1].examples().keys()
  by_host = [{int(line.split()[0]) for line in path.read_text().splitlines()} for path in logs[1].rows]
  failed = {example for row in lists[0] for example in row['examples']}
  assert failed & by_host[0] and failed & by_host[1]
  assert ends[1][0][1].count("can't be used") == len(lists[0]) and "can't be used (" not in ends[1][1][1]


# ---------------------------------------------------------------- the beginning


FLAGS = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM = {'SLURM_JOB_ID': '77', 'SLURM_STEP_NODELIST': 'n[01-02]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1',
         'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_TASKS': '2'}


@pytest.fixture
def environment(monkeypatch):
  """Sets these variables and none of the others that say where a process is."""

  def use(**values: str) -> None:
    for name in (*FLAGS, *SLURM):
      monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
      monkeypatch.setenv(name, value)

  use()
  return use


def test_flags_come_before_variables(environment):
  assert find_place(None, None, None) is None
  environment(JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='4', JAX_PROCESS_ID='3')
  assert find_place(None, None, None) == Place('a:1', 4, 3)
  assert find_place('b:2', None, 0) == Place('b:2', 4, 0)
  assert find_place('[::1]:2', 2, 1) == Place('[::1]:2', 2, 1)
  assert find_place(None, 1, 0) is None


@pytest.mark.parametrize('given, words', [
    (('a:1', None, None), ['--coordinator=a:1', '--num-processes (or JAX_NUM_PROCESSES)', '--process-id']),
    ((None, 2, 0), ['--num-processes=2, --process-id=0', '--coordinator (or JAX_COORDINATOR_ADDRESS) must be given']),
    (('a', 2, 0), ["'a'", 'HOST:PORT']),
    (('a:70000', 2, 0), ["'a:70000'", 'HOST:PORT']),
    (('a:1', 2, 2), ['--process-id=2', 'from 0']),
    (('a:1', 0, 0), ['--num-processes=0']),
    (('a:1', 2, 'x'), ['--process-id', "'x'", 'whole number']),
])
def test_what_is_missing_or_wrong(environment, given, words):
  with pytest.raises(LmsptError) as error:
    find_place(*given)
  assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


def test_slurm_step(environment):
  environment(**SLURM)
  assert find_place(None, None, None) == Place(detection='slurm')
  assert find_place('a:1', 2, 1) == Place('a:1', 2, 1)
  environment(**{**SLURM, 'SLURM_STEP_NUM_TASKS': '1'})
  assert find_place(None, None, None) is None
  environment(**{name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NUM_TASKS'})
  assert find_place(None, None, None) is None  # a shell in an allocation of two tasks


@pytest.mark.parametrize('platforms, hosts, expected', [
    ('tpu,cpu', 'a,b', Place(detection='gketpu')), ('tpu,cpu', 'localhost', None), ('cpu', 'a,b', None)])
def test_tpu_slice(environment, monkeypatch, platforms, hosts, expected):
  monkeypatch.setattr('jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm', True)
  environment(TPU_WORKER_HOSTNAMES=hosts, TPU_WORKER_ID='1', MEGASCALE_NUM_SLICES='1')
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', platforms)
  try:
    assert find_place(None, None, None) == expected
  finally:
    jax.config.update('jax_platforms', before)


def begin(repo: Path, port: int, process: int) -> subprocess.CompletedProcess:
  """Joins one of two processes, alone."""
  return subprocess.run(
      [sys.executable, '-c', 'import sys\nfrom lmspt_jax import hosts\nhosts.start(*sys.argv[1:], patience=2)',
       f'127.0.0.1:{port}', '2', str(process)], cwd=repo, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize('process', [0, 1])
def test_hosts_that_do_not_come_are_waited_for_a_while(repo, process):
  done = begin(repo, free_port(), process)
  assert done.returncode == 75
  assert 'not all processes came together within 2 s' in done.stderr and len(done.stderr.splitlines()) == 2


def test_a_port_that_is_taken(repo):
  with socket.create_server(('', 0)) as other:
    done = begin(repo, port := other.getsockname()[1], process=0)
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 1 and f"LmsptError: --coordinator=127.0.0.1:{port}: can't listen at port {port} (" in last


def test_rows_that_several_hosts_hold_are_taken_once():
  index = np.array([[4, 6], [5, 6]], np.int64) + (1 << 40)
  found = whole_batch({'index': index, 'x': index[..., None] * 2})
  assert found['index'].tolist() == [(1 << 40) + i for i in (4, 5, 6)]
  assert np.array_equal(found['x'][:, 0], 2 * found['index'])
