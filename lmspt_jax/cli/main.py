"""`lmspt VERB`: finds the verb's module, reads its arguments, turns faults into one line and an exit status.

A verb is a module `lmspt_jax/cli/VERB.py` with `add_arguments(parser)` and `run(args) -> int`. It is imported only
when it is called, so `lmspt prepare` loads no jax and `lmspt --help` loads nothing.

Exit status: 0 success; 1 a fault the user can mend (one line on stderr); 2 a command line that cannot be read;
75 a training run that was told to stop and saved, or that lost a host: to be started again; 130 interrupted from the
keyboard; 141 a stream whose reader left.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from lmspt_jax.cli import flags
from lmspt_jax.errors import EXIT_FAULT, EXIT_KEYBOARD, EXIT_USAGE, LmsptError, UsageError, nearest
from lmspt_jax.version import __version__

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # whatever was written where

VERBS = {
    'train': 'train a tokenizer, or resume a run',
    'sweep': 'train many runs of one config, and compare them',
    'prepare': 'audio and transcripts to shards',
    'encode': 'audio files to codes; or a stream of samples',
    'decode': 'codes to audio files; or a stream of codes',
    'tokenize': 'a corpus to token shards for a language model',
    'evaluate': 'a model measured on recordings, beside baselines',
    'plan': 'compile for a TPU slice without one: memory, FLOPs, bytes, collectives',
    'export': 'a model as a folder to pass on: weights, config, card, checksums',
    'convert': "weights from one format to another: a tokenizer's, a Whisper's",
    'info': 'versions and devices; what a model is',
}


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose faults are one line."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message} (see {self.prog} --help)')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one verb; returns the exit status."""
  try:
    return _run(list(sys.argv[1:] if argv is None else argv))
  except LmsptError as error:
    print(f'lmspt: error: {error}', file=sys.stderr)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAULT
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    print(f'lmspt: error: {error.filename or "a file"}: can\'t be written ({error.strerror}); make room there and run '
          'the same command again', file=sys.stderr)
    return EXIT_FAULT
  except KeyboardInterrupt:
    print('lmspt: interrupted', file=sys.stderr)
    return EXIT_KEYBOARD


def _run(argv: list[str]) -> int:
  if not argv or argv[0] in ('-h', '--help'):
    width = max(map(len, VERBS))
    print('usage: lmspt VERB ...\n')
    print('\n'.join(f'  {verb:<{width}}  {text}' for verb, text in VERBS.items()))
    print('\nlmspt VERB --help shows its arguments; lmspt --version the version.')
    return 0
  if argv[0] == '--version':
    print(f'lmspt {__version__}')
    return 0
  verb, *rest = argv
  if verb not in VERBS:
    raise UsageError(f'unknown verb {verb!r}: {nearest(verb, VERBS)} (see lmspt --help)')
  module = importlib.import_module(f'lmspt_jax.cli.{verb}')
  parser = Parser(prog=f'lmspt {verb}', description=module.__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.set_defaults(overrides=None)
  module.add_arguments(parser)
  overrides, rest = flags.split_overrides(rest)
  args = parser.parse_args(rest)
  if args.overrides is not None:  # the verb called flags.add_arguments
    args.overrides = overrides
  elif overrides:
    raise UsageError(f'lmspt {verb} takes no --config.{overrides[0][0]} (see lmspt {verb} --help)')
  return module.run(args)
