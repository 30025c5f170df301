"""Versions and devices; with MODEL, its sizes, frame rate, bitrate, licence, hash and teacher."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from lmspt_jax.cli import flags
from lmspt_jax.version import __version__

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
PARTS = ('semantic_encoder', 'acoustic_encoder', 'semantic_quantizer', 'acoustic_quantizer', 'decoder',
         'resynthesis_decoder')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('model', nargs='?', metavar='MODEL', help=flags.MODEL)


def run(args: argparse.Namespace) -> int:
  rows = _model(args.model) if args.model else _machine()
  width = max(len(name) for name, _ in rows)
  print('\n'.join(f'{name:<{width}}  {value}' for name, value in rows))
  return 0


def _machine() -> list[tuple[str, str]]:
  import jax

  rows = [('lmspt_jax', __version__), ('python', platform.python_version())]
  for package in PACKAGES:
    try:
      rows.append((package, metadata.version(package)))
    except metadata.PackageNotFoundError:
      rows.append((package, 'not installed'))
  devices = jax.devices()
  rows.append(('devices', f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})'))
  rows.append(('processes', str(jax.process_count())))
  return rows


def _model(model: str) -> list[tuple[str, str]]:
  from lmspt_jax.inference.tokenizer import Tokenizer, named_arrays

  tokenizer = Tokenizer.from_pretrained(model)
  config = tokenizer.config.model
  sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
  for name, array in (named_arrays(tokenizer.params) | named_arrays(tokenizer.codebooks)).items():
    part = name.partition('/')[0]
    sizes[part] = sizes.get(part, 0) + array.size
  rows = [
      ('model', f'{tokenizer.config.name}, step {tokenizer.step}'),
      ('hash', tokenizer.model_hash),
      ('sample rate', f'{tokenizer.sample_rate} Hz (resynthesis {tokenizer.resynthesis_sample_rate} Hz)'),
      ('frame rate', f'{tokenizer.frame_rate:g} Hz (hop {tokenizer.hop} samples)'),
      ('codebooks', f'{tokenizer.num_codebooks}: {" ".join(map(str, tokenizer.codebook_sizes))}'),
      ('bitrate', f'{config.bitrate:.0f} bit/s'),
      ('causal', 'yes' if config.causal else 'no'),
      ('parameters', f'{sum(sizes.values()) / 1e6:.2f} M'),
  ]
  rows += [(f'  {name}', f'{count / 1e6:.2f} M') for name, count in sizes.items() if count]
  rows.append(('teacher', tokenizer.teacher_id or 'none'))
  rows.append(('licence', tokenizer.license))
  return rows

