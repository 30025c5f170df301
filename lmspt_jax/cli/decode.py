"""Codes to audio files: one NAME.wav per npz file that `lmspt encode` wrote."""

from __future__ import annotations

import argparse
import dataclasses

from lmspt_jax.cli import flags, outputs
from lmspt_jax.errors import LmsptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--out', required=True, metavar='DIR', help='folder for the wav files')
  parser.add_argument('--path', choices=('full', 'semantic', 'resynthesis'), default='full',
                      help='full: all codebooks; semantic: only the semantic one; resynthesis: that one through the '
                           'auxiliary decoder (default: full)')
  parser.add_argument('--any-model', action='store_true', help='decode codes that another model made')
  parser.add_argument('codes', nargs='+', metavar='CODES.npz')


def run(args: argparse.Namespace) -> int:
  from lmspt_jax.inference.codes import read_codes

  pairs = outputs.plan(args.codes, args.out, '.wav')
  read = [(source, target, read_codes(source)) for source, target in pairs]  # small: all faults before the model

  from lmspt_jax.data.audio_io import write_wav_blocks
  from lmspt_jax.inference.tokenizer import Tokenizer

  tokenizer = Tokenizer.from_pretrained(args.model)
  rate = tokenizer.resynthesis_sample_rate if args.path == 'resynthesis' else tokenizer.sample_rate
  for source, target, codes in read:
    if args.any_model:
      codes = dataclasses.replace(codes, model_hash='')
    elif codes.model_hash != tokenizer.model_hash:
      raise LmsptError(f'{source}: codes of model {codes.model_hash}, not of {args.model} ({tokenizer.model_hash}); '
                       'use the model that made them, or --any-model')
    try:
      blocks = tokenizer.decode_blocks(codes, path=args.path)
    except LmsptError as error:
      raise LmsptError(f'{source}: {error}') from error
    samples = write_wav_blocks(target, blocks, rate)
    print(f'{target}: {samples / rate:.2f} s at {rate} Hz')
  return 0
