"""Train a tokenizer. Run the same command again and it resumes; SIGTERM saves and leaves with status 75."""

from __future__ import annotations

import argparse
import sys

from lmspt_jax.cli import flags

EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: not a fault, start the same command again


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_arguments(parser)
  parser.add_argument('--workdir', required=True, metavar='DIR', help='where checkpoints, logs and samples go')


def run(args: argparse.Namespace) -> int:
  config = flags.load(args.config, args.overrides)  # before jax, so that a misspelt field costs no time
  from lmspt_jax.training import loop

  try:
    loop.train(config, args.workdir)
  except loop.Interrupted as stop:
    print(f'lmspt: stopped: {stop}; run the same command again to resume', file=sys.stderr)
    return EXIT_RESUME
  return 0
