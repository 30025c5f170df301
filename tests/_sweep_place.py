"""A sweep whose trainings are done by a stub: what the tests of `lmspt sweep` share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lmspt_jax.cli import flags
from lmspt_jax.cli.main import main
from lmspt_jax.config import to_dict
from lmspt_jax.sweeps import local, members

CONFIG = """
from lmspt_jax.config import DataConfig, ExperimentConfig, TrainConfig, to_config_dict

def get_config():
  return to_config_dict(ExperimentConfig(
    data=DataConfig(train='package:speech_sample', held_out='package:speech_sample'), train=TrainConfig(num_steps=4)))
"""
# Does what PLAN/NAME.json says: 'starts' is a list of an exit status, or 'wait' and 'slow' for SIGTERM, or 'meet'
# another run that trains at the same time. Status 0 writes what a finished run has, others nothing; 'half:' before one
# makes a checkpoint first.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

workdir = Path(next(a.split('=', 1)[1] for a in sys.argv if a.startswith('--workdir=')))
plan = json.loads((workdir.parent / 'plan' / f'{workdir.name}.json').read_text())
with open(workdir / 'starts', 'a+') as file:
  file.seek(0)
  index = len(file.readlines())
  print(json.dumps({'pid': os.getpid(), 'argv': sys.argv[1:]}), file=file)
action = plan['starts'][index]
(workdir / 'config.json').write_text(json.dumps(plan['config']))


def train(last):
  with open(workdir / 'metrics.jsonl', 'w') as file:
    for step, figures in plan['figures'].items():
      if int(step) <= last:
        if figures:
          print(json.dumps({'step': int(step), **{f'held_out/{k}': v for k, v in figures.items()}}), file=file)
        print(json.dumps({'step': int(step), 'loss/mel': 1.0}), file=file)
  (workdir / 'checkpoints' / str(last)).mkdir(parents=True, exist_ok=True)


def stop(number, frame):
  if action == 'slow':
    time.sleep(1)
  train(2)
  (workdir / 'told').write_text(str(number))
  sys.exit(75)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(99))
if action.startswith('half:'):
  train(2)
  action = action.removeprefix('half:')
if action == 'meet':
  (workdir.parent / f'met_{workdir.name}').touch()
  end = time.monotonic() + 30
  while len(list(workdir.parent.glob('met_*'))) < 2:
    time.sleep(0.01)
    if time.monotonic() > end:
      sys.exit(97)
  action = '0'
if action in ('wait', 'slow'):
  (workdir / 'waiting').touch()
  time.sleep(60)
  sys.exit(98)
if action == '0':
  train(4)
else:
  print('lmspt: error: out of luck', file=sys.stderr)
if int(action) < 0:
  os.kill(os.getpid(), -int(action))
sys.exit(int(action))
"""
DRIVER = """
import sys
from lmspt_jax.cli.main import main
from lmspt_jax.sweeps import local
local.TRAIN = (sys.executable, '-S', sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
FIGURES = {'0': {'mel': 8.0, 'distillation': 4.0}, '2': {'mel': 4.0, 'distillation': 2.0},
           '4': {'mel': 2.0, 'distillation': 1.0}}


class Place:
  """A folder with a config, a sweep file, a stub of `lmspt train` and what that is to do."""

  def __init__(self, root: Path):
    self.root, self.workdir = root, root / 'the sweep'
    self.config = root / 'config.py'
    self.config.write_text(CONFIG)
    (root / 'stub.py').write_text(STUB)
    (self.workdir / 'plan').mkdir(parents=True)

  def sweep(self, runs: str, more: str = '') -> None:
    """The sweep file; `runs` is Python for its runs."""
    (self.root / 'sweep.py').write_text(
        f'from lmspt_jax.sweeps import *\ndef get_sweep():\n  return Sweep({str(self.config)!r}, {runs}{more})\n')

  def members(self) -> dict[str, members.Member]:
    sweep = flags.call_file('sweep', str(self.root / 'sweep.py'))
    return {member.name: member for member in members.resolve(sweep, self.workdir, flags.load)}

  def plan(self, figures: dict | None = None, **starts: list[str]) -> None:
    """What each run does, by name: the k-th start's action. `figures` are by name and step."""
    for name, member in self.members().items():
      content = {'config': to_dict(member.config), 'starts': starts.get(name, ['0']),
                 'figures': (figures or {}).get(name, FIGURES)}
      (self.workdir / 'plan' / f'{name}.json').write_text(json.dumps(content))

  def arguments(self, *options: str) -> list[str]:
    return ['sweep', f'--sweep={self.root / "sweep.py"}', f'--workdir={self.workdir}', *options]

  def starts(self, name: str) -> list[dict]:
    path = self.workdir / name / 'starts'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def lmspt(self, *options: str) -> int:
    """Runs `lmspt sweep` here, with the stub; its exit status."""
    with pytest.MonkeyPatch.context() as patched:
      patched.setattr(local, 'TRAIN', (sys.executable, '-S', str(self.root / 'stub.py')))
      patched.setattr(local, 'TICK', 0.01)
      return main(self.arguments(*options))

  def state(self, name: str) -> str:
    return members.progress(self.members()[name]).state
