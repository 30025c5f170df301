"""The five formats against each other, and one worker against two.

    python benchmarks/data_sources.py --corpus=DIR --work=DIR

As data_order.py: CORPUS is a folder with manifest.jsonl, WORK takes it in every format. Crops of 6 s at 24 kHz of short
utterances, batches of 32, decoded in this process, by turns; then with one and with two workers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import by_turns

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.pipeline import Batches, training_batches

RATE, CROP, BATCHES = 24_000, 144_000, 40


def stream(uri: str, workers: int = 0) -> Batches:
  config = DataConfig(train=(CorpusConfig(uri),), batch_size=32, num_workers=workers)
  return training_batches(config, sample_rate=RATE, crop_samples=CROP, seed=0)


def take(batches: Batches) -> Callable[[], None]:
  def run() -> None:
    for _ in range(BATCHES):
      next(batches)
  return run


def audio_seconds(uri: str) -> float:
  """Of BATCHES batches, padding left out."""
  with stream(uri) as batches:
    return sum(float(next(batches)['num_samples'].sum()) for _ in range(BATCHES)) / RATE


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, type=Path)
  parser.add_argument('--work', required=True, type=Path)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  from corpus import every_format  # here: workers run this file's imports again
  uris = every_format(args.corpus, args.work)
  found = by_turns({kind: take(stream(uri)) for kind, uri in uris.items()}, args.rounds)
  print('| source | time of folder / its own | audio hours an hour and core |\n|---|---|---|')
  hours = audio_seconds(uris['folder'])
  for kind, values in found.items():
    ratios = [a / b for a, b in zip(found['folder'], values, strict=True)]
    span = f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
    print(f'| {kind} | {span} | {hours / np.median(values):,.0f} |')
  streams = {workers: stream(uris['webdataset'], workers) for workers in (1, 2)}
  ratios = []
  for turn in range(args.rounds + 1):
    spent = {}
    for workers, batches in streams.items():
      for _ in range(4 * workers):  # what lay ready is used up
        next(batches)
      start = time.perf_counter()
      take(batches)()
      spent[workers] = time.perf_counter() - start
    if turn:
      ratios.append(spent[1] / spent[2])
  print(f'\nTwo workers are {np.median(ratios):.2f} times as fast as one ({min(ratios):.2f} to {max(ratios):.2f}).')
  for batches in streams.values():
    batches.close()


if __name__ == '__main__':
  main()
