"""Compile the train step for a TPU slice, without a TPU: memory, FLOPs, bytes, collectives, and a bound of its time."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from lmspt_jax.chips import CHIPS, parse_topology
from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError
from lmspt_jax.version import __version__

# The compiler alone is wanted: no chip, no lock on one, no question to the cloud's metadata server, no log.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  flags.add_arguments(parser)
  examples = ', '.join(chip.example for chip in CHIPS.values())
  slices = parser.add_mutually_exclusive_group(required=True)
  slices.add_argument('--topology', metavar='CHIP:SHAPE', help=f'a slice, e.g. {examples}')
  slices.add_argument('--topologies', metavar='A,B,C', help='several, in one table')
  parser.add_argument('--out', metavar='DIR', help='write plan.json and plan.svg there')


def run(args: argparse.Namespace) -> int:
  config = flags.load(args.config, args.overrides)
  topologies = [parse_topology(text) for text in (args.topologies or args.topology).split(',')]
  os.environ |= ENVIRONMENT
  from lmspt_jax.planning import report
  from lmspt_jax.planning.plan import plan, require_compiler

  require_compiler()
  plans = []
  for topology in topologies:
    with _clock(f'{topology.name}: tracing and compiling'):
      plans.append(plan(config, topology))
  print(report.as_table(plans))
  if args.out:
    versions = {'lmspt_jax': __version__, **{name: metadata.version(name) for name in ('jax', 'libtpu')}}
    folder = Path(args.out)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / 'plan.json').write_text(json.dumps(report.as_json(config.name, plans, versions), indent=2) + '\n')
      (folder / 'plan.svg').write_text(report.as_picture(plans))
    except OSError as error:
      raise LmsptError(f'--out={folder}: can\'t be written ({error.strerror}); give a folder you own') from error
  return 0


@contextlib.contextmanager
def _clock(what: str) -> Iterator[None]:
  """Says on stderr how long it has been going on: every second on a terminal, else every minute."""
  done, start, terminal = threading.Event(), time.monotonic(), sys.stderr.isatty()

  def tell() -> None:
    while not done.wait(1 if terminal else 60):
      text = f'{what}, {time.monotonic() - start:.0f} s'
      print(f'\r{text}' if terminal else text, end='' if terminal else '\n', file=sys.stderr, flush=True)

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    if terminal:
      print('\r\033[K', end='', file=sys.stderr, flush=True)
