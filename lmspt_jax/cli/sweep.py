"""Train many runs of one config, each with changes of its own, and put them into one table, one CSV and one plot.

The sweep file has get_sweep(), which returns the runs; see configs/sweeps/. They are trained on this machine, or handed
to a cluster with --launcher. Run the same command again: finished runs are skipped, the others go on where they were.

Exit status: 0 all runs are finished (with --launcher: handed over); 1 a fault, or some failed; 75 stopped by SIGTERM,
the runs have saved; 130 by Ctrl-C, likewise.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lmspt_jax.cli import flags
from lmspt_jax.errors import EXIT_RESUME, Interrupted, LmsptError, shown
from lmspt_jax.sweeps import Sweep, clusters, local, members, plot, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--sweep', required=True, metavar='FILE[:ARG]',
                      help='a file with get_sweep(), such as configs/sweeps/frame_rates.py; ARG is passed to it')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='each run trains in DIR/NAME; DIR/sweep.md, .csv and .svg are what came of them')
  where = parser.add_mutually_exclusive_group()
  where.add_argument('--parallel', type=int, default=1, metavar='N',
                     help='how many runs train at a time on this machine (default: 1)')
  where.add_argument('--launcher', metavar='COMMAND',
                     help="hand the runs over in place of training them here: 'launch/slurm.sh OPTIONS' (one array) or "
                     "'launch/gke.py --name=NAME OPTIONS' (JobSets NAME-RUN)")
  parser.add_argument('--dry-run', action='store_true', help='check every run, print what would be run, run nothing')
  parser.add_argument('--table', action='store_true', help='only put together what the runs have written so far')


def run(args: argparse.Namespace) -> int:
  if args.parallel < 1:
    raise LmsptError(f'--parallel={args.parallel}: give a number from 1 on')
  workdir = Path(args.workdir)
  sweep = flags.call_file('sweep', args.sweep)
  if not isinstance(sweep, Sweep):
    raise LmsptError(f'--sweep={args.sweep}: get_sweep returned {shown(sweep)}: return lmspt_jax.sweeps.Sweep(...)')
  every = members.resolve(sweep, workdir, flags.load)
  found = {member.name: members.progress(member) for member in every}
  todo = [member for member in every if found[member.name].state not in ('finished', 'launched')]
  handovers = clusters.handovers(todo, args.launcher) if args.launcher is not None else None
  if args.dry_run:
    for member in every:
      state = found[member.name]
      print(f'# {member.name}: {state.state}, step {state.step} of {member.config.train.num_steps}')
    for command in ([handover.command for handover in handovers] if handovers is not None else
                    [(*local.TRAIN, *member.arguments) for member in todo]):
      print(shlex.join(command))
    return 0

  plot.require_matplotlib()
  if args.table:
    _collect(every, workdir, args.sweep)
    return 0
  for member in every:
    if member not in todo:
      print(f'{member.name}: {found[member.name].state} {found[member.name].note}'.rstrip(), file=sys.stderr)
  if handovers is not None:
    clusters.hand_over(handovers)
    _collect(every, workdir, args.sweep)
    return 0
  try:
    local.train_all(todo, workdir, parallel=args.parallel)
  except Interrupted as stop:
    print(f'lmspt: {stop}', file=sys.stderr)
    return EXIT_RESUME
  rest = [result for result in _collect(every, workdir, args.sweep) if not result.finished]
  if rest:
    names = [f'{result.member.name} ({result.member.folder / members.LOG})' for result in rest]
    raise LmsptError(f'{len(rest)} of {len(every)} runs are not finished: {", ".join(names)}; mend what the logs say '
                     'and run the same command again')
  return 0


def _collect(every: Sequence[members.Member], workdir: Path, name: str) -> list[summary.Result]:
  """Writes and prints what came of the runs so far."""
  results = [summary.Result(member, members.progress(member)) for member in every]
  table = summary.as_markdown(results, name)
  written = {'sweep.md': table, 'sweep.csv': summary.as_csv(results), 'sweep.svg': plot.as_svg(results, name)}
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for file, text in written.items():
      temporary = workdir / f'.{file}.tmp'
      temporary.write_text(text, encoding='utf-8')
      temporary.replace(workdir / file)
  except OSError as error:
    raise LmsptError(f'--workdir={workdir}: can\'t be written ({error.strerror}); give a folder you own') from error
  print(table)
  print(f'{", ".join(str(workdir / file) for file in written)}', file=sys.stderr)
  return results
