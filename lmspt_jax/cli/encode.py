"""Audio files to codes: one NAME.npz per file, with ids [K, T], num_samples, sample_rate, frame_rate, model_hash."""

from __future__ import annotations

import argparse

from lmspt_jax.cli import flags, outputs
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--out', required=True, metavar='DIR', help='folder for the npz files')
  parser.add_argument('audio', nargs='+', metavar='AUDIO', help='wav, flac, ogg or mp3; any rate, any channels')


def run(args: argparse.Namespace) -> int:
  from lmspt_jax.data.audio_io import MAX_FRAMES, open_audio, read_blocks

  pairs = outputs.plan(args.audio, args.out, '.npz')
  for source, _ in pairs:  # headers only: a wrong file is found before the model is loaded
    open_audio(source, name=str(source)).close()

  from lmspt_jax.inference.codes import write_codes
  from lmspt_jax.inference.tokenizer import Tokenizer

  tokenizer = Tokenizer.from_pretrained(args.model)
  for source, target in pairs:
    with open_audio(source, name=str(source)) as file:
      blocks = (block_NC.T for block_NC in read_blocks(file, 0, MAX_FRAMES, name=str(source)))
      try:
        codes = tokenizer.encode_blocks(blocks, sample_rate=file.samplerate)
      except AudioError:  # names the file
        raise
      except LmsptError as error:
        raise LmsptError(f'{source}: {error}') from error
    write_codes(target, codes, max(tokenizer.codebook_sizes))
    seconds = codes.num_samples / codes.sample_rate
    print(f'{target}: {codes.ids.shape[0]} codebooks x {codes.ids.shape[1]} frames, {seconds:.2f} s')
  return 0
