"""`make demo`: the whole line on the bundled real speech, in minutes on two CPU cores.

Runs what a user would type, verb by verb: prepare, train (with the real Whisper tiny.en as teacher), encode, decode,
evaluate; then reads the run's own figures. Run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from lmspt_jax.cli import main as cli
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.sources.folder import ASSETS
from lmspt_jax.errors import LmsptError

CONFIG = Path(__file__).resolve().parent.parent / 'configs' / 'demo.py'
SAMPLE = 'package:speech_sample'
DECODED, EVALUATED = 4, 6  # held-out recordings
# figure of the last held-out evaluation -> (is measured against step 0, bound, which side is good)
TARGETS = {'mel': (True, 0.65, '<='), 'distillation': (True, 0.80, '<='), 'distinct_semantic': (False, 64, '>='),
           'perplexity_semantic': (False, 30, '>=')}


def main(argv: list[str] | None = None) -> int:
  """Exit status 0 when every figure is on the good side of its bound."""
  parser = argparse.ArgumentParser(prog='python -m lmspt_jax.demo', description=__doc__.splitlines()[0])
  parser.add_argument('--out', default='runs/demo', type=Path, help='folder for everything (default: %(default)s)')
  args = parser.parse_args(argv)
  started = time.monotonic()
  out: Path = args.out
  data, workdir, codes, decoded, evaluation = (
      out / name for name in ('data', 'run', 'codes', 'audio', 'evaluation'))
  if not CONFIG.is_file():
    print(f'lmspt_jax.demo: error: {CONFIG}: no such file; run the demo from a checkout', file=sys.stderr)
    return 1

  _verb('prepare', f'--source={SAMPLE}', f'--out={data}', '--runner=local')
  _verb('train', f'--config={CONFIG}:arrayrecord:{data}', f'--workdir={workdir}')
  source = open_source(SAMPLE, 'valid')
  names = [source[i].id for i in range(DECODED)]
  recordings = Path(os.path.relpath(ASSETS / 'speech_sample' / 'audio'))
  _verb('encode', f'--model={workdir}', f'--out={codes}', *(str(recordings / f'{name}.flac') for name in names))
  _verb('decode', f'--model={workdir}', f'--out={decoded}', *(str(codes / f'{name}.npz') for name in names))
  _verb('evaluate', f'--model={workdir}', f'--data=arrayrecord:{data}', '--split=valid', f'--limit={EVALUATED}',
        f'--out={evaluation}')

  met = _report(workdir)
  print(f'\n{(time.monotonic() - started) / 60:.1f} minutes, without the installation. Where things are:')
  for label, where in (
      ('originals', recordings), ('codes', codes), ('decoded speech', decoded), ('run', workdir),
      ('curves', f'tensorboard --logdir {workdir / "tensorboard"}'), ('report', evaluation / 'report.html')):
    print(f'  {label:<15} {where}')
  return 0 if met else 1


def _verb(*arguments: str) -> None:
  print(f'\n$ lmspt {shlex.join(arguments)}', flush=True)
  status = cli.main(list(arguments))
  if status:
    raise SystemExit(status)


def _report(workdir: Path) -> bool:
  """Prints the held-out figures of the first and the last evaluation; whether all are as they should be."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if 'held_out/mel' in row]
  first, last = rows[0], rows[-1]
  if first['step'] != 0:
    raise LmsptError(f'{workdir}/metrics.jsonl: no held-out figures of step 0; remove the folder and run again')
  print(f'\nHeld-out utterances, step 0 and step {last["step"]}:\n')
  print(f'  {"figure":<22}{"step 0":>10}{"end":>10}{"end / step 0":>14}   wanted')
  met = True
  for name in TARGETS:
    before, after = first[f'held_out/{name}'], last[f'held_out/{name}']
    relative, bound, side = TARGETS[name]
    value = after / before if relative else after
    good = value <= bound if side == '<=' else value >= bound
    met &= good
    wanted = f'{side} {f"{bound:.0%} of step 0" if relative else bound}: {"yes" if good else "NO"}'
    print(f'  {name:<22}{before:>10.3f}{after:>10.3f}{after / before:>14.1%}   {wanted}')
  for name in ('distinct_acoustic', 'perplexity_acoustic'):
    before, after = first[f'held_out/{name}'], last[f'held_out/{name}']
    print(f'  {name:<22}{before:>10.3f}{after:>10.3f}{after / before:>14.1%}')
  return met


if __name__ == '__main__':
  sys.exit(main())
