"""Half an hour of streaming: memory stays flat and open files bounded, with thousands of shards.

    python benchmarks/data_soak.py --corpus=DIR --work=DIR [--minutes=30]

CORPUS, a folder with manifest.jsonl, is written into WORK as 2,000 tars and 2,000 ArrayRecord shards, as parquet and
TFDS; training batches are streamed from a mixture of all of them and the folder by two workers. The table has, of every
minute, the most resident memory of this process and its workers together, and the most open files of any of them. Exit
status 1 if the last minute has more than 1.05 times the memory of the third.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.pipeline import training_batches

RATE, CROP, SHARDS = 24_000, 144_000, 2_000


def processes() -> list[int]:
  return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


def memory_mb() -> float:
  """Resident set sizes of this process and its workers. Pages that they share count in each."""
  statuses = [Path(f'/proc/{pid}/status').read_text() for pid in processes()]
  return sum(int(status.partition('VmRSS:')[2].split()[0]) for status in statuses) / 1024


def open_files() -> int:
  """Of the process that has most."""
  return max(len(os.listdir(f'/proc/{pid}/fd')) for pid in processes())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, type=Path)
  parser.add_argument('--work', required=True, type=Path)
  parser.add_argument('--minutes', type=int, default=30)
  args = parser.parse_args()
  logging.basicConfig(level=logging.WARNING)
  from corpus import every_format  # here: workers run this file's imports again
  uris = every_format(args.corpus, args.work, SHARDS)
  config = DataConfig(train=tuple(map(CorpusConfig, uris.values())), batch_size=32, num_workers=2)
  print(f'mixture of {", ".join(uris)}; batches of 32 x {CROP / RATE:g} s at {RATE} Hz, 2 workers\n')
  print('| minute | batches | audio hours | memory, MB | most open files |\n|---|---|---|---|---|')
  memory, count, start = {}, 0, time.monotonic()
  with training_batches(config, sample_rate=RATE, crop_samples=CROP, seed=0) as batches:
    for minute in range(1, args.minutes + 1):
      peak, files = 0.0, 0
      while time.monotonic() < start + 60 * minute:
        next(batches)
        count += 1
        if count % 20 == 0:
          peak, files = max(peak, memory_mb()), max(files, open_files())
      memory[minute] = peak
      print(f'| {minute} | {count} | {count * 32 * CROP / RATE / 3600:.1f} | {peak:.1f} | {files} |', flush=True)
  ratio = memory[args.minutes] / memory[min(3, args.minutes)]
  print(f'\nlast minute / third minute: {ratio:.3f} (at most 1.05: {"yes" if ratio <= 1.05 else "NO"})')
  return 0 if ratio <= 1.05 else 1


if __name__ == '__main__':
  sys.exit(main())
