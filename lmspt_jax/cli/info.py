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
  from lmspt_jax.pretrained.loading import load
  from lmspt_jax.pretrained.model import named_arrays

  found = load(model)
  config = found.config.model
  sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
  for name, array in (named_arrays(found.params) | named_arrays(found.codebooks)).items():
    part = name.partition('/')[0]
    sizes[part] = sizes.get(part, 0) + array.size
  rows = [
      ('model', f'{found.config.name}, step {found.step}'),
      ('source', found.source),
      ('hash', found.hash),
      ('sample rate', f'{config.sample_rate} Hz (resynthesis {config.resynthesis_sample_rate} Hz)'),
      ('frame rate', f'{config.frame_rate:g} Hz (hop {config.hop} samples)'),
      ('codebooks', f'{config.num_codebooks}: {" ".join(map(str, config.codebook_sizes))}'),
      ('bitrate', f'{config.bitrate:.0f} bit/s'),
      ('causal', 'yes' if config.causal else 'no'),
      ('parameters', f'{sum(sizes.values()) / 1e6:.2f} M'),
  ]
  rows += [(f'  {name}', f'{count / 1e6:.2f} M') for name, count in sizes.items() if count]
  rows.append(('teacher', found.teacher_id or 'none'))
  if found.best is not None:
    rows.append(('best', f'step {found.best.step}, {found.best.metric} {found.best.value:.4g}'))
  rows.append(('licence', found.provenance.license))
  return rows

