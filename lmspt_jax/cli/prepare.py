"""`lmspt prepare`: audio and transcripts to ArrayRecord shards plus dataset.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmspt_jax.data.dataset_info import FILE_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--source', required=True, metavar='KIND:URI',
                      help='folder:DIR (audio files, optional manifest.jsonl), arrayrecord:DIR, package:NAME')
  parser.add_argument('--out', required=True, metavar='DIR', help='where shards and dataset.json go')
  parser.add_argument('--num_shards', type=int, metavar='N', help='per split; default: one per 256 MiB of source audio')
  parser.add_argument('--num_workers', type=int, metavar='N', help='decoding threads; default: the CPUs')


def run(args: argparse.Namespace) -> int:
  from lmspt_jax.data.prepare import prepare
  info = prepare(args.source, args.out, num_shards=args.num_shards, num_workers=args.num_workers)
  for split, total in info.splits.items():
    print(f'{split}: {total["utterances"]} utterances, {total["hours"] * 60:.1f} minutes')
  for reason, entry in info.faults.items():
    print(f'left out, {reason}: {entry["count"]} (e.g. {entry["names"][0]})')
  print(f'{len(info.shards)} shards, {sum(shard.bytes for shard in info.shards)} bytes; '
        f'{Path(args.out) / FILE_NAME} describes them')
  return 0
