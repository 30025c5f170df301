"""Export a model to pass on: a folder with weights or graphs, config.json, a model card and checksums.

  safetensors   weights in the layout of the authors' release; the folder is a MODEL again, here or on the hub
"""

from __future__ import annotations

import argparse

from lmspt_jax.cli import flags

FORMATS = ('safetensors',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--format', required=True, choices=FORMATS, help='what to write')
  parser.add_argument('--out', required=True, metavar='DIR', help='a folder that does not exist yet, or is empty')
  flags.add_weights(parser)


def run(args: argparse.Namespace) -> int:
  from lmspt_jax.pretrained.folder import write_folder
  from lmspt_jax.pretrained.loading import load

  model = load(args.model, average=args.weights == 'average')
  write_folder(args.out, model)
  print(f'wrote {args.out}\nlicence: {model.provenance.license}')
  return 0
