"""The same global batches from every format, for every number of hosts and workers, and after resuming: a whole corpus.

    python benchmarks/data_order.py --corpus=DIR --work=DIR

CORPUS is a folder with manifest.jsonl. It is written as tars, parquet, TFDS and ArrayRecord shards into WORK (kept, so
that a second run is quicker), and the hashes of the first batches are compared with the folder's. Exit status 1 if any
differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.pipeline import training_batches

RATE, CROP, SEED = 24_000, 144_000, 7


def hashes(config: DataConfig, count: int, hosts: int = 1, start: int = 0) -> Iterator[str]:
  """sha256 of each global batch, put together from the hosts' rows."""
  streams = [training_batches(config, sample_rate=RATE, crop_samples=CROP, seed=SEED, start_batch=start,
                              rows=rows) for rows in np.split(np.arange(config.batch_size), hosts)]
  try:
    for _ in range(count):
      parts = [next(stream) for stream in streams]
      digest = hashlib.sha256()
      for key in sorted(parts[0]):
        digest.update(np.concatenate([part[key] for part in parts]).tobytes())
      yield digest.hexdigest()
  finally:
    for stream in streams:
      stream.close()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, type=Path)
  parser.add_argument('--work', required=True, type=Path)
  parser.add_argument('--batches', type=int, default=200)
  parser.add_argument('--batch_size', type=int, default=32)
  args = parser.parse_args()
  logging.basicConfig(level=logging.WARNING)
  from corpus import every_format  # here: workers run this file's imports again
  uris = every_format(args.corpus, args.work)
  config = lambda uri, workers: DataConfig(train=(CorpusConfig(uri, split='train'),), batch_size=args.batch_size,
                                           num_workers=workers)
  wrong = 0
  print(f'{args.batches} batches of {args.batch_size} x {CROP / RATE:g} s at {RATE} Hz, seed {SEED}\n')

  def compare(name: str, found: Iterator[str], expected: list[str]) -> None:
    nonlocal wrong
    start = time.perf_counter()
    same = list(found) == expected
    wrong += not same
    print(f'  {name:<44} {"identical" if same else "DIFFERENT"}   {time.perf_counter() - start:6.1f} s', flush=True)

  folder = uris.pop('folder')
  expected = list(hashes(config(folder, 0), args.batches))
  together = hashlib.sha256(''.join(expected).encode()).hexdigest()
  print(f'folder: {len(set(expected))} different batches, sha256 of their hashes {together}')
  for name, uri in uris.items():
    compare(name, hashes(config(uri, 0), args.batches), expected)
  print('\nhosts x workers (webdataset)')
  base = config(uris['webdataset'], 0)
  for hosts in (1, 2, 4):
    for workers in (0, 2, 4):
      compare(f'{hosts} hosts x {workers} workers',
              hashes(dataclasses.replace(base, num_workers=workers), args.batches, hosts=hosts), expected)
  print('\nresumed on another number of hosts')
  draw = random.Random(SEED)
  for name, uri in uris.items():
    start, hosts = draw.randrange(1, args.batches), draw.choice((2, 4))
    compare(f'{name}, batch {start} on, {hosts} hosts',
            hashes(config(uri, 0), args.batches - start, hosts=hosts, start=start), expected[start:])
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
