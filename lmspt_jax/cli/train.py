"""Train a tokenizer. Run the same command again and it resumes.

On several hosts the same command runs on each, with the three flags below, or with the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a Slurm step or a TPU slice it finds the others
itself. DIR must be on storage that all of them share.

Exit status: 0 trained to the end; 1 a fault to mend; 2 a command line that cannot be read; 75 stopped by SIGTERM and
saved, or another host was lost: start the same command again, on all hosts; 130 interrupted from the keyboard. A host
that fails takes the others along, with its own status.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lmspt_jax.cli import flags
from lmspt_jax.errors import EXIT_RESUME, Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_arguments(parser)
  parser.add_argument('--workdir', required=True, metavar='DIR', help='where checkpoints, logs and samples go')
  flags.add_hosts(parser)
  parser.add_argument('--replay', type=int, metavar='STEP',
                      help='do not train: run a step again that the run left in DIR/nonfinite, and print what of its '
                      'inputs, losses and gradients is not finite')


def run(args: argparse.Namespace) -> int:
  config = flags.load(args.config, args.overrides)  # before jax, so that a misspelt field costs no time
  from lmspt_jax import hosts
  from lmspt_jax.training import loop, nonfinite

  try:
    with hosts.start(args.coordinator, args.num_processes, args.process_id):
      if args.replay is None:
        loop.train(config, args.workdir)
      else:
        report = nonfinite.replay(config, Path(args.workdir), args.replay)
        if hosts.is_writer():
          print(report)
  except Interrupted as stop:
    print(f'lmspt: {stop}', file=sys.stderr)
    return EXIT_RESUME
  return 0
