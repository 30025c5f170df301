"""Plans of the release preset with Whisper large-v3, as tables in docs/results/plan.md.

    python -m benchmarks.plan_tables --work=runs/plan_tables        # needs the extra `plan`; hours on 2 cores

Each plan is compiled in a process of its own and kept in --work, so that the script goes on where it was stopped;
--case=NAME compiles one, --table writes the page from what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'results' / 'plan.md'
BASE = ('--config.teacher.checkpoint=hf://openai/whisper-large-v3', '--config.data.crop_seconds=6',
        '--config.compute.dtype=bfloat16', '--config.mesh.fsdp=4')
NONE: dict[str, str] = {}
QUICK = {'compute.tpu_convolution_target': '0.7'}  # compiles in half the time; what fits is a matter of memory
BLOCK = {'compute.remat_codec': 'block', 'compute.remat_discriminators': 'block', 'compute.remat_teacher': 'block',
         **QUICK}
_GB, _GIB = 1e9, 2**30

# name: topology, chips, crops a chip, other fields
CASES: dict[str, tuple[str, int, int, dict[str, str]]] = {
  'v5e_16': ('v5e:4x4', 16, 2, NONE),
  'v5p_16': ('v5p:2x2x4', 16, 2, NONE),
  'v6e_16': ('v6e:4x4', 16, 2, NONE),
  'v5e_256': ('v5e:16x16', 256, 2, NONE),
  'v5e_8': ('v5e:2x4', 8, 2, NONE),
  'v5e_16_8_block': ('v5e:4x4', 16, 8, BLOCK),
  # Expected not to fit.
  'v5e_16_4': ('v5e:4x4', 16, 4, QUICK),
  'v5e_16_16_block': ('v5e:4x4', 16, 16, BLOCK),
}


def command(name: str, out: Path) -> list[str]:
  topology, chips, crops, fields = CASES[name]
  return [sys.executable, '-m', 'lmspt_jax', 'plan', f'--config={ROOT / "configs" / "lmspt_12_5hz.py"}',
          f'--topology={topology}', f'--out={out}', *BASE, f'--config.data.batch_size={chips * crops}',
          *(f'--config.{field}={value}' for field, value in fields.items())]


def compile_case(name: str, work: Path) -> None:
  out = work / name
  if (out / 'plan.json').exists():
    return
  start = time.monotonic()
  print(f'{name}: {" ".join(command(name, out)[3:])}', flush=True)
  done = subprocess.run(command(name, out), cwd=ROOT, capture_output=True, text=True)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'log.txt').write_text(done.stdout + done.stderr)
  print(f'{name}: {"done" if done.returncode == 0 else "FAILED"} after {time.monotonic() - start:.0f} s', flush=True)


def load(work: Path) -> dict[str, dict[str, Any]]:
  """The plan of each case that was compiled."""
  found = {}
  for name, (topology, *_) in CASES.items():
    path = work / name / 'plan.json'
    if path.exists():
      found[name] = json.loads(path.read_text())['topologies'][topology]
  return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def slices(plans: dict[str, dict[str, Any]]) -> str:
  rows = []
  for name in ('v5e_16', 'v5p_16', 'v6e_16', 'v5e_256'):
    if name not in plans:
      continue
    plan, (topology, _, crops, _) = plans[name], CASES[name]
    memory, projected = plan['memory'], plan['projected']
    room = f'{memory["peak"] / _GIB:.2f} of {memory["available"] / _GIB:.2f}'
    if not plan['fits']:
      rows.append([topology, str(crops), f'does not fit: {room}', *['-'] * 7])
      continue
    rows.append([
      topology, str(crops), room, f'{plan["flops"] / 1e12:.2f}', f'{plan["bytes_accessed"] / _GB:.0f}',
      f'{sum(c["sent_bytes"] for c in plan["collectives"].values()) / _GB:.2f}',
      f'{1000 * projected["step_seconds"]:.0f} ({projected["bound"]})', f'{projected["utilisation"]:.0%}',
      f'{projected["audio_hours_per_day"]:,.0f}', f'{plan["compile_seconds"] / 60:.0f}'])
  return table(['slice', 'crops a chip', 'memory, GiB', 'TFLOPs', 'GB moved', 'GB sent', 'step at least, ms (bound by)',
                'utilisation at most', 'hours of audio a day at most', 'compiled in, min'], rows)


def dominates(plans: dict[str, dict[str, Any]]) -> str:
  rows = []
  for name in ('v5e_16', 'v5p_16', 'v6e_16'):
    if name in plans and plans[name]['fits']:
      cycles, flops = plans[name]['cycles'], plans[name]['model_flops']
      parts = ['codec', 'discriminators', 'teacher', 'optimizer', 'other']
      rows.append([CASES[name][0], *(f'{cycles.get(p, 0) / sum(cycles.values()):.0%} '
                                     f'({flops.get(p, 0) / sum(flops.values()):.0%})' for p in parts)])
  return table(['slice', 'codec', 'discriminators', 'teacher', 'optimizer', 'other'], rows)


def scaling(plans: dict[str, dict[str, Any]]) -> str:
  rows = []
  for name in ('v5e_8', 'v5e_16', 'v5e_256'):
    if name in plans and plans[name]['fits']:
      found = plans[name]['collectives']
      payload, sent = (sum(kind[key] for kind in found.values()) for key in ('payload_bytes', 'sent_bytes'))
      rows.append([CASES[name][0], str(CASES[name][1]), f'{payload / 1e6:,.1f}', f'{sent / 1e6:,.1f}',
                   ', '.join(f'{kind} {value["payload_bytes"] / 1e6:,.1f}' for kind, value in found.items())])
  return table(['slice', 'chips', 'MB in collectives, a chip', 'MB sent, a chip', 'by kind'], rows)


def fits(plans: dict[str, dict[str, Any]]) -> str:
  rows = []
  for name, (topology, _, crops, fields) in CASES.items():
    if topology == 'v5e:4x4' and name in plans:
      plan, memory = plans[name], plans[name]['memory']
      remat = ', '.join(f'{field.removeprefix("compute.remat_")} {value}' for field, value in fields.items()
                        if field.startswith('compute.remat_')) or 'none'
      rows.append([str(crops), remat, 'yes' if plan['fits'] else 'no', f'{memory["peak"] / _GIB:.2f}',
                   f'{plan["projected"]["step_seconds"] * 1000:.0f}' if plan['fits'] else '-'])
  return table(['crops a chip', 'rematerialisation', 'fits', 'GiB needed of 15.75', 'step at least, ms'], rows)


def page(plans: dict[str, dict[str, Any]]) -> str:
  compiled = [plan['compile_seconds'] / 60 for name, plan in plans.items()
              if not QUICK.items() <= CASES[name][3].items()] or [0]
  quick = any(QUICK.items() <= CASES[name][3].items() for name in plans)
  how = ('Plans of 4 crops and more were compiled with `compute.tpu_convolution_target=0.7` (docs/scaling.md): in half '
         'the\ntime, with other tiles for the convolutions, which what fits does not hang on.' if quick else
         'docs/scaling.md has a plan of 8 crops, all parts recomputed, and its command.')
  return f'''# Plans: the release preset with Whisper large-v3 on TPU slices

Made by `python -m benchmarks.plan_tables`: `configs/lmspt_12_5hz.py`, crops of 6 s, bfloat16, parameters and teacher
split over four chips (`mesh.fsdp=4`). Compiling took {min(compiled):.0f} to {max(compiled):.0f} minutes each on two
cores that did other work too, with tcmalloc (docs/scaling.md).

No TPU was at hand. Memory and operations are what XLA's TPU compiler says of the program that a run would execute; GB
sent is counted in that program; time, utilisation and hours of audio are bounds from published figures of the chips
(`lmspt_jax/chips.py`), not measurements. GB moved counts all that instructions read and write, also what never leaves
the chip, so a bound by memory is on the safe side.

{slices(plans)}

FLOPs, bytes and GB sent are of one chip in one step. What the step consists of, by the cycles the compiler estimates
(in brackets by the model's own FLOPs):

{dominates(plans)}

## Weak scaling

The same crops a chip on more chips. What the collectives work on stays the same; what a chip sends for it grows as a
ring's arithmetic has it, (n - 1) / n of it and for an all-reduce twice that: from 8 to 256 chips 14 % more at most.

{scaling(plans)}

## What fits a v5e chip

{fits(plans)}

{how}
'''


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--work', type=Path, default=ROOT / 'runs' / 'plan_tables', help='plans are kept here')
  parser.add_argument('--case', choices=CASES, help='compile this one alone')
  parser.add_argument('--table', action='store_true', help='write the page from what is there, compile nothing')
  args = parser.parse_args()
  if not args.table:
    for name in CASES:
      if args.case in (None, name):
        compile_case(name, args.work.absolute())
  PAGE.write_text(page(load(args.work)))
  print(f'wrote {PAGE}')


if __name__ == '__main__':
  main()
