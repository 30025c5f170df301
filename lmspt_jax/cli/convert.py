"""Weights from one format to another.

  run:DIR         a run's workdir (only to read)
  release:FILE    a .safetensors file in the layout of the authors' release, which their PyTorch model loads strictly
  folder:DIR      a folder as `lmspt export` writes it; to read, folder:hf://org/name[@revision] too
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError

SOURCES, TARGETS = ('run', 'release', 'folder'), ('release', 'folder')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--from', dest='source', required=True, metavar='KIND:PATH',
                      help='run:DIR, release:FILE or folder:DIR')
  parser.add_argument('--to', dest='target', required=True, metavar='KIND:PATH', help='release:FILE or folder:DIR')
  flags.add_weights(parser)
  parser.add_argument('--model-config', metavar='FILE[:ARG]',
                      help='a file such as configs/lmspt_12_5hz_fsq.py: what a release file has to be, or does not say')


def run(args: argparse.Namespace) -> int:
  source_kind, source = _parse(args.source, '--from', SOURCES)
  target_kind, target = _parse(args.target, '--to', TARGETS)
  for flag, kind, path in (('--from', source_kind, source), ('--to', target_kind, target)):
    if kind == 'release' and not path.endswith('.safetensors'):
      raise LmsptError(f'{flag}={kind}:{path}: a release file ends in .safetensors')
  if source_kind == 'run' and not (Path(source) / 'checkpoints').is_dir():
    raise LmsptError(f'--from={args.source}: not a run (no checkpoints/ in it)')
  config = flags.load(args.model_config).model if args.model_config else None

  from lmspt_jax.convert.release_file import write_release
  from lmspt_jax.pretrained.folder import write_folder
  from lmspt_jax.pretrained.loading import load

  model = load(source, config, average=args.weights == 'average')
  if target_kind == 'release':
    write_release(target, model.released())
  else:
    write_folder(target, model)
  print(f'wrote {target}')
  return 0


def _parse(text: str, flag: str, kinds: tuple[str, ...]) -> tuple[str, str]:
  kind, _, path = text.partition(':')
  if kind not in kinds or not path:
    raise LmsptError(f'{flag}={text}: use {" or ".join(f"{kind}:PATH" for kind in kinds)}')
  return kind, path
