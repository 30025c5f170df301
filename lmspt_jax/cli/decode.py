"""Codes to audio: one NAME.wav per npz file that `lmspt encode` wrote.

With --stream, of a causal model: what `lmspt encode --stream` writes from standard input, every codebook of a frame;
to standard output raw 16-bit samples (signed, little-endian, mono), a frame's as soon as its codes are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import numpy as np

from lmspt_jax.cli import flags, outputs, streams
from lmspt_jax.errors import EXIT_READER_GONE, LmsptError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--out', metavar='DIR', help='folder for the wav files')
  parser.add_argument('--stream', action='store_true', help=streams.HELP)
  parser.add_argument('--path', choices=('full', 'semantic', 'resynthesis'), default='full',
                      help='full: all codebooks; semantic: only the semantic one; resynthesis: that one through the '
                           'auxiliary decoder (default: full)')
  parser.add_argument('--any-model', action='store_true', help='decode codes that another model made')
  parser.add_argument('codes', nargs='*', metavar='CODES.npz')


def run(args: argparse.Namespace) -> int:
  if args.stream:
    extra = args.codes[0] if args.codes else '--out' if args.out is not None else '--any-model'
    if args.codes or args.out is not None or args.any_model:
      raise UsageError(f'--stream reads standard input and writes standard output, and raw codes name no model: leave '
                       f'out {extra} (see lmspt decode --help)')
    return _stream(args)
  if not args.codes or args.out is None:
    raise UsageError('give --out=DIR and CODES.npz, or --stream (see lmspt decode --help)')
  return _files(args)


def _stream(args: argparse.Namespace) -> int:
  from lmspt_jax.data.audio_io import to_pcm
  from lmspt_jax.inference.codes import Codes, ids_dtype
  from lmspt_jax.inference.tokenizer import Tokenizer

  tokenizer = Tokenizer.from_pretrained(args.model)
  rate = tokenizer.resynthesis_sample_rate if args.path == 'resynthesis' else tokenizer.sample_rate
  dtype, state = ids_dtype(max(tokenizer.codebook_sizes)), tokenizer.start_decoding(args.path)

  def codes_of(ids_TK: np.ndarray) -> Codes:
    return Codes(ids_TK.T.astype(np.int32), len(ids_TK) * tokenizer.hop, tokenizer.sample_rate, tokenizer.frame_rate)

  tokenizer.push_codes(codes_of(np.zeros((1, tokenizer.num_codebooks), np.int32)), state)  # compiles
  print(f'lmspt decode: {tokenizer.num_codebooks} x {dtype.name} in, {tokenizer.frame_rate:g} times a second; '
        f'{rate} Hz int16 out', file=sys.stderr)
  try:
    for ids_TK in streams.read(dtype.str, tokenizer.num_codebooks, 'frame'):
      try:
        audio_N, state = tokenizer.push_codes(codes_of(ids_TK), state)
      except LmsptError as error:
        raise LmsptError(f'standard input: {error}') from error
      streams.write(to_pcm(audio_N).astype('<i2').tobytes())
  except streams.ReaderGone:
    return EXIT_READER_GONE
  if not state.num_samples:
    raise LmsptError('standard input: holds no codes; pipe lmspt encode --stream into this command')
  return 0


def _files(args: argparse.Namespace) -> int:
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
