"""Audio to codes: one NAME.npz per file, with ids [K, T], num_samples, sample_rate, frame_rate, model_hash.

With --stream, of a causal model: raw 16-bit samples (signed, little-endian, mono) from standard input; to standard
output a frame's K codes, uint16 little-endian, semantic first, as soon as the frame's last sample is there.

    arecord -q -t raw -f S16_LE -c 1 -r 24000 | lmspt encode --stream --model=MODEL |
      lmspt decode --stream --model=MODEL | aplay -q -t raw -f S16_LE -c 1 -r 24000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from lmspt_jax.cli import flags, outputs, streams
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import EXIT_READER_GONE, LmsptError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--out', metavar='DIR', help='folder for the npz files')
  parser.add_argument('--stream', action='store_true', help=streams.HELP)
  parser.add_argument('--rate', type=int, metavar='HZ',
                      help="of the stream's samples; other rates than the model's are resampled (default: the model's)")
  parser.add_argument('audio', nargs='*', metavar='AUDIO', help='wav, flac, ogg or mp3; any rate, any channels')


def run(args: argparse.Namespace) -> int:
  if args.stream:
    if args.audio or args.out is not None:
      raise UsageError(f'--stream reads standard input and writes standard output: leave out '
                       f'{args.audio[0] if args.audio else "--out"} (see lmspt encode --help)')
    return _stream(args)
  if not args.audio or args.out is None:
    raise UsageError('give --out=DIR and AUDIO, or --stream (see lmspt encode --help)')
  if args.rate is not None:
    raise UsageError('--rate is for --stream: files know theirs (see lmspt encode --help)')
  return _files(args)


def _stream(args: argparse.Namespace) -> int:
  from lmspt_jax.data.audio_io import mono_blocks
  from lmspt_jax.inference.checks import checked_rate
  from lmspt_jax.inference.codes import Codes, ids_dtype
  from lmspt_jax.inference.tokenizer import Tokenizer

  tokenizer = Tokenizer.from_pretrained(args.model)
  rate = tokenizer.sample_rate if args.rate is None else checked_rate(args.rate)
  dtype, state = ids_dtype(max(tokenizer.codebook_sizes)), tokenizer.start()
  tokenizer.push(np.zeros(tokenizer.hop, np.float32), state)  # compiles, before anything is late
  print(f'lmspt encode: {rate} Hz int16 in; {tokenizer.num_codebooks} x {dtype.name} out, {tokenizer.frame_rate:g} '
        'times a second', file=sys.stderr)
  fault = None

  def samples() -> Iterator[np.ndarray]:
    nonlocal fault
    try:
      for pcm_N1 in streams.read('<i2', 1, 'sample'):
        yield pcm_N1[:, 0] / np.float32(32768)
    except LmsptError as error:  # told when the rest of the audio is encoded
      fault = error

  def put(codes: Codes) -> None:
    if codes.ids.size:
      streams.write(codes.ids.T.astype(dtype).tobytes())

  try:
    for audio_N in mono_blocks(samples(), rate, tokenizer.sample_rate):
      codes, state = tokenizer.push(audio_N, state)
      put(codes)
    try:
      put(tokenizer.finish(state))
    except LmsptError as error:
      raise LmsptError(f'standard input: {error}') from error
  except streams.ReaderGone:
    return EXIT_READER_GONE
  if fault:
    raise fault
  return 0


def _files(args: argparse.Namespace) -> int:
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
