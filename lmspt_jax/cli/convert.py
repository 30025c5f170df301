"""Weights from one format to another: of a tokenizer

  run:DIR         a run's workdir (only to read)
  release:FILE    a .safetensors file in the layout of the authors' release, which their PyTorch model loads strictly
  folder:DIR      a folder as `lmspt export` writes it; to read also folder:hf://org/name[@revision]

or of a Whisper

  openai:FILE.pt  OpenAI's own file (only to read, as the next two)
  ctranslate2:DIR, package:NAME
  hf:DIR          a Hugging Face folder, which `transformers` loads; to read also hf://org/name[@revision]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Iterable
from pathlib import Path

from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError

TOKENIZER, WHISPER = 'a tokenizer', 'a Whisper'
SOURCES = {'run': TOKENIZER, 'release': TOKENIZER, 'folder': TOKENIZER,
           'openai': WHISPER, 'hf': WHISPER, 'ctranslate2': WHISPER, 'package': WHISPER}
_M_MMAP_THRESHOLD = -3  # malloc.h
TARGETS = {'release': TOKENIZER, 'folder': TOKENIZER, 'hf': WHISPER}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--from', dest='source', required=True, metavar='KIND:PATH',
                      help='run:DIR, release:FILE or folder:DIR; of a Whisper openai:FILE, hf:DIR, ctranslate2:DIR or '
                           'package:NAME')
  parser.add_argument('--to', dest='target', required=True, metavar='KIND:PATH',
                      help='release:FILE or folder:DIR; of a Whisper hf:DIR')
  flags.add_weights(parser)
  parser.add_argument('--model-config', metavar='FILE[:ARG]',
                      help='a file such as configs/lmspt_12_5hz_fsq.py: what a release file has to be, or does not say')
  parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'),
                      help='of the Whisper that is written (default: float32)')


def run(args: argparse.Namespace) -> int:
  _give_back_memory()
  kind, source = _parse(args.source, '--from', SOURCES)
  target_kind, target = _parse(args.target, '--to', TARGETS)
  model = SOURCES[kind]
  if model != TARGETS[target_kind]:
    others = ' or '.join(f'{other}:PATH' for other in TARGETS if TARGETS[other] == model)
    raise LmsptError(f'--to={args.target}: {model} ({kind}:) is written to {others}')
  if model == WHISPER:
    if args.model_config:
      raise LmsptError(f'--model-config={args.model_config}: a Whisper has a config of its own; leave it out')
    if target.startswith('//'):
      raise LmsptError(f'--to={args.target}: nothing is written to the hub; give a folder, hf:DIR')
    from lmspt_jax.convert.whisper_folder import write_whisper_folder

    write_whisper_folder(args.source, target, args.dtype or 'float32')
  else:
    if args.dtype:
      raise LmsptError(f'--dtype={args.dtype}: a tokenizer is written as float32; leave it out')
    for flag, wanted, path in (('--from', kind, source), ('--to', target_kind, target)):
      if wanted == 'release' and not path.endswith('.safetensors'):
        raise LmsptError(f'{flag}=release:{path}: a release file ends in .safetensors')
    if kind == 'run' and not (Path(source) / 'checkpoints').is_dir():
      raise LmsptError(f'--from={args.source}: not a run (no checkpoints/ in it)')
    _convert_tokenizer(args, source, target_kind, target)
  print(f'wrote {target}')
  return 0


def _give_back_memory() -> None:
  """Has glibc return what is freed to the system at once: it would keep half a model of what Orbax has read."""
  with contextlib.suppress(OSError):  # another C library
    ctypes.CDLL('libc.so.6').mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _convert_tokenizer(args: argparse.Namespace, source: str, target_kind: str, target: str) -> None:
  config = flags.load(args.model_config).model if args.model_config else None

  from lmspt_jax.convert.release_file import write_release
  from lmspt_jax.pretrained.folder import write_folder
  from lmspt_jax.pretrained.loading import load

  model = load(source, config, average=args.weights == 'average')
  if target_kind == 'release':
    write_release(target, model.released())
  else:
    write_folder(target, model)


def _parse(text: str, flag: str, kinds: Iterable[str]) -> tuple[str, str]:
  kind, _, path = text.partition(':')
  if kind not in kinds or not path:
    raise LmsptError(f'{flag}={text}: use {" or ".join(f"{kind}:PATH" for kind in kinds)}')
  return kind, path
