"""Export a model to pass on: a folder with weights or graphs, config.json, a model card and checksums.

  safetensors   weights in the layout of the authors' release; the folder is a MODEL again, here or on the hub
  stablehlo     encode and decode for `jax.export`, run without this package
  onnx          encode and decode for ONNX Runtime and others, run without jax
"""

from __future__ import annotations

import argparse

from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError

FORMATS = ('safetensors', 'stablehlo', 'onnx')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--format', required=True, choices=FORMATS, help='what to write')
  parser.add_argument('--out', required=True, metavar='DIR', help='a folder that does not exist yet, or is empty')
  flags.add_weights(parser)
  parser.add_argument('--resynthesis', action='store_true', help='of graphs: the auxiliary decoder too')


def run(args: argparse.Namespace) -> int:
  if args.resynthesis and args.format == 'safetensors':
    raise LmsptError('--resynthesis: safetensors hold the auxiliary decoder anyway; leave it out')

  from lmspt_jax.export import onnx, stablehlo
  from lmspt_jax.pretrained.folder import write_export, write_folder
  from lmspt_jax.pretrained.loading import load

  model = load(args.model, average=args.weights == 'average')
  if args.format == 'safetensors':
    write_folder(args.out, model)
  else:
    write, versions = {'onnx': (onnx.write_onnx, onnx.versions),
                       'stablehlo': (stablehlo.write_stablehlo, stablehlo.versions)}[args.format]
    write_export(args.out, model, args.format, lambda folder: write(
        folder, model.config.model, model.params, model.codebooks, resynthesis=args.resynthesis), versions())
  print(f'wrote {args.out}\nlicence: {model.provenance.license}')
  return 0
