"""Kills a training run at random moments, again and again, and compares where it ends with a run that nobody kills.

    python benchmarks/kills.py [--kills=100] [--seed=0] [--devices=1] [--out=docs/results/kills.md]

A tiny experiment on the bundled speech, with everything on that carries state or draws at random from step to step, is
trained through the command line. Every start is killed with SIGKILL, in a phase drawn at random and at a random moment
of it, and the same command is started again; a run that comes to its end in spite of it is compared, and the next one
begins. With --devices=8 the mesh is 2 x 2 x 2. Exit status 1 unless every end equals the unbroken run's, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

PHASES = ('start', 'compile', 'step', 'save')
STEPS, EVERY = 400, 20
MESH = {1: (1, 1, 1), 8: (2, 2, 2)}
PATIENCE = 600.0  # seconds until a start that shows no sign of the phase to come has failed


@dataclass(frozen=True)
class Kill:
  """What a kill met: the phase, whether a checkpoint was half written, steps done since the last whole one."""

  phase: str
  half_written: bool
  repeated: int


class Watched:
  """A run's process, and what its folder shows of how far it is."""

  def __init__(self, process: subprocess.Popen, workdir: Path):
    self.process, self._folder = process, workdir
    self._started = time.time()
    self._left_over = self._begun()  # by those that were killed before

  def phase(self) -> str:
    """One of PHASES."""
    if self.half_written():
      return 'save'
    if not _newer(self._folder / 'parameters.txt', self._started):
      return 'start'
    # The log is cut back to the checkpoint before the first step, so that any row past that is this process's own.
    steps = [json.loads(line)['step'] for line in _lines(self._folder)]
    return 'step' if steps and steps[-1] > self.newest() and _newer(self._folder / 'metrics.jsonl', self._started) \
        else 'compile'

  def half_written(self) -> bool:
    """Whether this process has begun a checkpoint and not ended it. To be asked often."""
    begun = self._begun()
    self._left_over &= begun  # what has been removed may come again
    return bool(begun - self._left_over)

  def newest(self) -> int:
    """Step of the newest whole checkpoint; 0 without one."""
    return max((int(path.name) for path in (self._folder / 'checkpoints').glob('*') if path.name.isdigit()), default=0)

  def _begun(self) -> set[str]:
    return {path.name for path in (self._folder / 'checkpoints').glob('*') if not path.name.isdigit()}

  def kill(self) -> Kill:
    """SIGKILL; the process stands still while it is looked at."""
    self.process.send_signal(signal.SIGSTOP)
    phase, half_written, newest = self.phase(), self.half_written(), self.newest()
    steps = [json.loads(line)['step'] for line in _lines(self._folder)] if phase in ('step', 'save') else []
    self.process.kill()
    self.process.communicate()
    return Kill(phase, half_written, max(0, steps[-1] - newest) if steps else 0)


def kill_runs(start: Callable[[Path], Watched], folder: Path, kills: int, draws: random.Random,
              typical: dict[str, float]) -> tuple[list[Kill], list[Path]]:
  """Kills `kills` starts at random moments; the one after the last comes to its end.

  Args:
    start: starts the same command with a given workdir.
    folder: where the workdirs are made; a run that came to its end too early is followed by another one.
    kills: how many.
    draws: decides phases and moments.
    typical: seconds that each phase may take; a kill comes somewhere within.

  Raises:
    RuntimeError: the command failed.
  """
  met, runs = [], [folder / 'run_0']
  while True:
    watched = start(runs[-1])
    if len(met) < kills:
      _wait_for_moment(watched, draws.choice(PHASES), draws.random(), typical)
      if watched.process.poll() is None:
        met.append(watched.kill())
        print(f'kill {len(met)} of {kills}, {runs[-1].name}: {met[-1]}', file=sys.stderr, flush=True)
        continue
    output, _ = watched.process.communicate(timeout=PATIENCE)
    if watched.process.returncode:
      raise RuntimeError(f'status {watched.process.returncode}: {output}')
    if len(met) == kills:
      return met, runs
    runs.append(folder / f'run_{len(runs)}')


def _wait_for_moment(watched: Watched, aim: str, share: float, typical: dict[str, float]) -> None:
  """Returns at that share of a phase, or when the process has ended."""
  since, end = None, time.monotonic() + PATIENCE
  while watched.process.poll() is None:
    phase, now = watched.phase(), time.monotonic()
    if since is None and PHASES.index(phase) >= PHASES.index(aim):
      since = now
    if since is not None and now >= since + share * typical[aim]:
      return
    if now > end:
      raise RuntimeError(f'no {aim} within {PATIENCE:g} s')
    time.sleep(0.0005)


def differences(workdir: Path, reference: Path, steps: int) -> list[str]:
  """Paths of the arrays whose bits differ after the last step, and rows of the log that do; what a clock says is left
  out."""
  import jax
  from make_golden_step import DIMS

  from lmspt_jax.checkpoint import CheckpointStore
  from lmspt_jax.config import ExperimentConfig, from_dict
  from lmspt_jax.training.state import Experiment

  def load(folder: Path) -> dict[str, np.ndarray]:
    store = CheckpointStore(folder)
    config = from_dict(ExperimentConfig, store.record(steps)['config'])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = vars(Experiment(config, DIMS).abstract_state())
    state, record = store.restore(steps, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract))
    store.close()
    found = {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
             for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return found | {'data position': np.frombuffer(json.dumps(record['data']).encode(), np.uint8)}

  here, there = load(workdir), load(reference)
  found = [path for path in sorted({**here, **there})
           if path not in here or path not in there or here[path].tobytes() != there[path].tobytes()]
  rows, expected = logged(workdir), logged(reference)
  return found + [f'row {number} of metrics.jsonl' for number in range(max(len(rows), len(expected)))
                  if rows[number:number + 1] != expected[number:number + 1]]


def logged(workdir: Path) -> list[dict[str, float]]:
  """metrics.jsonl without what a clock says."""
  kept = ('loss/', 'gradient/', 'codebook/', 'held_out/')
  rows = [json.loads(line) for line in _lines(workdir)]
  return [{k: v for k, v in row.items() if k in ('step', 'skipped_steps') or k.startswith(kept)} for row in rows]


def _lines(workdir: Path) -> list[str]:
  """Whole rows of metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')] if path.exists() else []


def _newer(path: Path, since: float) -> bool:
  return path.exists() and path.stat().st_mtime >= since


# -------------------------------------------------------------------- the experiment


def write_experiment(folder: Path, devices: int) -> Path:
  """A config file of the tiny experiment, beside its teacher."""
  from make_golden_step import TINY, replaced, write_teacher

  data, fsdp, tensor = MESH[devices]
  config = replaced(
      TINY, train__num_steps=STEPS, train__checkpoint_every=EVERY, data__batch_size=max(2, devices),
      data__crop_seconds=0.2, discriminator__fft_sizes=(), loss__mel_bins=(20,), loss__mel_windows=(256,),
      model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
      model__resynthesis_rates=(320,), model__acoustic__kind='ema', model__semantic__data_init=False,
      model__acoustic__data_init=False, model__semantic__revive_every=3, model__semantic__revive_below=0.5,
      model__acoustic__revive_every=4, model__acoustic__revive_below=0.5, mesh__data=data, mesh__fsdp=fsdp,
      mesh__tensor=tensor, teacher__checkpoint=write_teacher(folder / 'teacher'))
  path = folder / 'config.py'
  path.write_text(f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  return path


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--devices', type=int, default=1, choices=sorted(MESH))
  parser.add_argument('--out', type=Path)
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  with tempfile.TemporaryDirectory() as folder:
    text, good = _campaign(args, Path(folder))
  print(text)
  if args.out:
    args.out.write_text(text)
  return 0 if good else 1


def _campaign(args: argparse.Namespace, folder: Path) -> tuple[str, bool]:
  config = write_experiment(folder, args.devices)
  # Most of such a run is compilation: no optimisation, and one cache, which every process reads.
  flags = (f'--xla_force_host_platform_device_count={args.devices} --xla_backend_optimization_level=0 '
           '--xla_llvm_disable_expensive_passes=true')
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags,
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}

  def start(workdir: Path) -> Watched:
    process = subprocess.Popen(
        [sys.executable, '-m', 'lmspt_jax', 'train', f'--config={config}', f'--workdir={workdir}'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    return Watched(process, workdir)

  began, reference = time.monotonic(), folder / 'unbroken'
  kill_runs(lambda _: start(reference), folder, 0, random.Random(), {})
  shutil.rmtree(folder / 'unbroken')  # the first one filled the cache: the second one's times are those of the others
  typical, seen, watched = {}, time.monotonic(), start(reference)
  for phase in ('start', 'compile'):
    while watched.process.poll() is None and watched.phase() == phase:
      time.sleep(0.001)
    typical[phase], seen = time.monotonic() - seen, time.monotonic()
  output, _ = watched.process.communicate()
  if watched.process.returncode:
    raise RuntimeError(output)
  typical |= {'step': (time.monotonic() - seen) * 2 * EVERY / STEPS, 'save': 0.3}

  kills, runs = kill_runs(start, folder, args.kills, random.Random(args.seed), typical)
  differing = [f'{run.name}: {name}' for run in runs for name in differences(run, reference, STEPS)]
  differing += [f'{run.name}: left over {path.name}' for run in runs for path in (run / 'checkpoints').iterdir()
                if not path.name.isdigit()]
  return _report(args, kills, len(runs), differing, time.monotonic() - began), not differing


def _report(args: argparse.Namespace, kills: list[Kill], runs: int, differing: list[str], seconds: float) -> str:
  count = Counter(kill.phase for kill in kills)
  rows = [(phase, count[phase], sum(k.half_written for k in kills if k.phase == phase),
           sum(k.repeated for k in kills if k.phase == phase)) for phase in PHASES]
  rows.append(('all', len(kills), sum(row[2] for row in rows), sum(row[3] for row in rows)))
  table = '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)
  verdict = 'none' if not differing else '; '.join(differing[:20])
  data, fsdp, tensor = MESH[args.devices]
  return f"""# Killed at random moments

`python benchmarks/kills.py --kills={args.kills} --seed={args.seed} --devices={args.devices}`,
{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores.

{STEPS} steps of a tiny experiment on the bundled speech, a checkpoint every {EVERY} steps.
Mesh {data} x {fsdp} x {tensor}. {len(kills)} starts were killed with SIGKILL; {runs} runs came to their end.

| phase | kills | half-written checkpoints | steps to be done again |
|---|---|---|---|
{table}

Differences between the ends of these runs and that of an unbroken one, bit for bit (every array of the state, the data
position, every row of metrics.jsonl but for what a clock says), and half-written checkpoints left over: {verdict}.
"""


if __name__ == '__main__':
  sys.exit(main())
