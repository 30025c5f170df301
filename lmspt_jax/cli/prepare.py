"""`lmspt prepare`: audio and transcripts to ArrayRecord shards plus dataset.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmspt_jax.data.dataset_info import FILE_NAME
from lmspt_jax.errors import LmsptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--source', required=True, metavar='KIND:URI',
                      help='folder:DIR, webdataset:PATTERN, parquet:PATTERN, tfds:NAME, arrayrecord:DIR, ...')
  parser.add_argument('--out', required=True, metavar='DIR', help='a local folder, for shards and dataset.json')
  parser.add_argument('--num_shards', type=int, metavar='N', help='per split, in place of --shard_mb')
  parser.add_argument('--shard_mb', type=int, default=256, metavar='N', help='MiB a shard should have; default: 256')
  parser.add_argument('--sample_rate', type=int, metavar='HZ', help='resample to it; default: as recorded')
  parser.add_argument('--max_seconds', type=float, default=30.0, metavar='S',
                      help='longer recordings are cut at pauses; the pieces have no text; default: 30')
  parser.add_argument('--num_workers', type=int, metavar='N', help='processes of local and direct; default: the CPUs')
  parser.add_argument('--runner', default='direct', metavar='NAME',
                      help='direct (default: Apache Beam on this machine), local (no Beam), DataflowRunner, '
                           'FlinkRunner, SparkRunner or another of Beam\'s; its options go after "--"')
  parser.add_argument('beam_options', nargs='*', metavar='-- --BEAM_OPTION=VALUE', help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
  for option in args.beam_options:
    if not option.startswith('--'):
      raise LmsptError(f'{option!r}: not an option; Beam\'s come after "--" and look like --NAME=VALUE')
  from lmspt_jax.data.prepare import prepare
  info = prepare(args.source, args.out, num_shards=args.num_shards, shard_mb=args.shard_mb,
                 num_workers=args.num_workers, runner=args.runner, beam_options=args.beam_options,
                 sample_rate=args.sample_rate, max_seconds=args.max_seconds)
  for split, total in info.splits.items():
    print(f'{split}: {total["utterances"]} utterances, {total["hours"] * 60:.1f} minutes')
  for reason, entry in info.faults.items():
    print(f'left out, {reason}: {entry["count"]} (e.g. {entry["names"][0]})')
  print(f'{len(info.shards)} shards, {sum(shard.bytes for shard in info.shards)} bytes; '
        f'{Path(args.out) / FILE_NAME} describes them')
  return 0
