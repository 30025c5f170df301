"""A corpus to token shards for a language model: ArrayRecord, parquet, and manifest.json. Run it again and it resumes.

On several hosts the same command runs on each, with the three flags below, or with what `lmspt train` recognises; DIR
must then be on storage that all of them share.

Exit status: 0 all is there; 1 a fault to mend, or tokens that --verify found to differ; 75 another host was lost: start
the same command again, on all hosts; 130 interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError

if TYPE_CHECKING:
  from lmspt_jax.slm.manifest import Manifest
  from lmspt_jax.slm.verification import Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--data', required=True, metavar='KIND:URI',
                      help='folder:DIR, arrayrecord:DIR, webdataset:PATTERN, parquet:PATTERN, tfds:NAME, ...')
  parser.add_argument('--out', required=True, metavar='DIR', help='a local folder, for shards and manifest.json')
  parser.add_argument('--split', default='', metavar='NAME', help='of the data; default: all of it')
  parser.add_argument('--shard_utterances', type=int, default=8192, metavar='N',
                      help='at most so many in a shard; default: 8192')
  parser.add_argument('--max_fault_rate', type=float, default=0.01, metavar='SHARE',
                      help='stop when more of the utterances can\'t be used; default: 0.01')
  parser.add_argument('--verify', type=int, nargs='?', const=100, metavar='N',
                      help='write nothing: check all checksums, encode N utterances of the shards once more (default: '
                           '100, drawn at random) and compare')
  flags.add_hosts(parser)


def run(args: argparse.Namespace) -> int:
  if args.verify is not None and args.verify < 1:
    raise LmsptError(f'--verify={args.verify}: use at least 1')
  from lmspt_jax import hosts
  from lmspt_jax.inference.tokenizer import Tokenizer
  from lmspt_jax.slm.corpus import tokenize
  from lmspt_jax.slm.verification import verify

  with hosts.start(args.coordinator, args.num_processes, args.process_id):
    tokenizer = Tokenizer.from_pretrained(args.model)
    if args.verify is not None:
      if hosts.is_writer():
        _report(verify(tokenizer, args.data, args.out, args.verify), args.out)
      return 0
    manifest = tokenize(tokenizer, args.data, args.out, split=args.split, shard_utterances=args.shard_utterances,
                        max_fault_rate=args.max_fault_rate)
  if manifest is not None:
    _describe(manifest, args.out)
  return 0


def _report(found: Verification, out: str) -> None:
  compared = f'{found.tokens} tokens of {found.utterances} utterances compared (seed {found.seed})'
  if found.differing:
    first, count = next(iter(found.differing)), sum(found.differing.values())
    raise LmsptError(f'{out}: {compared}: {count} differ, in {len(found.differing)} utterances, the first {first!r}; '
                     'the audio or the kind of device has changed, so write the tokens again with another --out')
  print(f'{compared}: none differs')


def _describe(manifest: Manifest, out: str) -> None:
  from lmspt_jax.slm.manifest import FILE_NAME

  for split, total in manifest.splits.items():
    print(f'{split}: {total["utterances"]} utterances, {total["hours"]:.2f} hours')
  for reason, entry in manifest.faults.items():
    print(f'left out, {reason}: {entry["count"]} (e.g. {entry["names"][0]})')
  for number, use in enumerate(manifest.codebooks):
    print(f'codebook {number}: {use["used"]} of {use["size"]} codes, perplexity {use["perplexity"]:.1f}, '
          f'{use["entropy"]:.2f} bits')
  print(f'mostly one code: {manifest.degenerate} utterances (degenerate.jsonl)')
  for line in manifest.warnings:
    print(f'warning: {line}')
  print(f'{manifest.tokens} tokens in {len(manifest.shards)} shards; licence of the model: '
        f'{manifest.model["license"]}\n{Path(out) / FILE_NAME} describes them')
