"""Weights from one format to another.

  run:DIR         a run's workdir (only to read)
  release:FILE    a .safetensors file in the layout of the authors' release, which their PyTorch model loads strictly
"""

from __future__ import annotations

import argparse

from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError

SOURCES, TARGETS = ('run', 'release'), ('release',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--from', dest='source', required=True, metavar='KIND:PATH', help='run:DIR or release:FILE')
  parser.add_argument('--to', dest='target', required=True, metavar='KIND:PATH', help='release:FILE')
  parser.add_argument('--weights', choices=('average', 'last'), default='average',
                      help="of a run: the moving average over steps, where it keeps one, or the last step's "
                           '(default: average)')
  parser.add_argument('--model-config', metavar='FILE[:ARG]',
                      help='a file such as configs/lmspt_12_5hz_fsq.py: what a release file has to be, or does not say')


def run(args: argparse.Namespace) -> int:
  kind, source = _parse(args.source, '--from', SOURCES)
  _, target = _parse(args.target, '--to', TARGETS)
  if not target.endswith('.safetensors'):
    raise LmsptError(f'--to={args.target}: a release file ends in .safetensors')
  config = flags.load(args.model_config).model if args.model_config else None
  if config is not None and kind == 'run':
    raise LmsptError(f'--model-config={args.model_config}: a run has a config of its own; leave it out')

  from lmspt_jax.convert.release_file import read_release, write_release

  if kind == 'release':
    write_release(target, read_release(source, config))
  else:
    from lmspt_jax.inference.release import release_of_run

    write_release(target, release_of_run(source, average=args.weights == 'average'))
  print(f'wrote {target}')
  return 0


def _parse(text: str, flag: str, kinds: tuple[str, ...]) -> tuple[str, str]:
  kind, _, path = text.partition(':')
  if kind not in kinds or not path:
    raise LmsptError(f'{flag}={text}: use {" or ".join(f"{kind}:PATH" for kind in kinds)}')
  return kind, path
