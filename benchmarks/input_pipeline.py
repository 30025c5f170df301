"""Crops from audio files, against a PyTorch DataLoader that does the release's work per item (_release_loader.py).

Run: python benchmarks/input_pipeline.py [--corpus=DIR] > docs/results/input_pipeline.md

DIR is a folder of speech with a manifest.jsonl (rows with path and speaker); the bundled sample is the default. Its
utterances become, in a temporary folder, three corpora as FLAC at 16 kHz and as mp3 at 24 kHz: utterances as they are
(2 to 8 s), joined to about 15 s, and joined to 30 minutes. Both sides make 6 s crops at 24 kHz of the same files, with
the same number of worker processes, by turns, each measurement in a process of its own; starting is not timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import soundfile
from _release_loader import loader

RATE, CROP_SECONDS = 24_000, 6.0
CROP = round(RATE * CROP_SECONDS)
SHARES = {'utterances': (2.0, 1200.0), '15 s': (15.0, 3600.0), '30 min': (1800.0, 3600.0)}  # seconds a file, in all
FORMATS = {'flac': 16_000, 'mp3': 24_000}


@dataclass(frozen=True)
class Corpus:
  name: str
  folder: Path

  @property
  def paths(self) -> list[str]:
    return sorted(map(str, self.folder.iterdir()))

  @property
  def batch_size(self) -> int:
    return 2 if '30 min' in self.name else 16


# ---------------------------------------------------------------- files


def joined(folder: Path, rows: list[dict], at_least: float, in_all: float) -> Iterator[np.ndarray]:
  """Recordings of at least so many seconds, float32 [N] at 16 kHz, each of utterances in the manifest's order."""
  from lmspt_jax.data.audio_io import load_mono
  parts, length, total, number = [], 0, 0, 0
  while total < in_all * 16_000:
    if number == len(rows) and total and at_least < 100:
      return
    audio = load_mono(folder / rows[number % len(rows)]['path'], 16_000)
    number += 1
    if at_least == SHARES['utterances'][0] and not 2 <= len(audio) / 16_000 <= 8:
      continue
    parts.append(audio)
    length += len(audio)
    if length >= at_least * 16_000:
      total += length
      yield np.concatenate(parts)
      parts, length = [], 0


def make_corpora(source: Path, root: Path) -> list[Corpus]:
  from lmspt_jax.data.audio_io import to_mono_at
  rows = [json.loads(line) for line in (source / 'manifest.jsonl').read_text(encoding='utf-8').splitlines()]
  rows.sort(key=lambda row: (row.get('speaker', ''), row['path']))
  stride = max(1, len(rows) // 1000)
  rows = rows[::stride]  # of all speakers
  corpora = [Corpus(f'{share}, {kind}', root / f'{share.replace(" ", "_")}-{kind}')
             for share in SHARES for kind in FORMATS]
  for corpus in corpora:
    corpus.folder.mkdir()
  for share, (at_least, in_all) in SHARES.items():
    for number, audio in enumerate(joined(source, rows, at_least, in_all)):
      for kind, rate in FORMATS.items():
        path = root / f'{share.replace(" ", "_")}-{kind}' / f'{number:05d}.{kind}'
        soundfile.write(path, to_mono_at(audio, 16_000, rate), rate)
  return corpora


# ---------------------------------------------------------------- the sides, each measurement in a process of its own


def lmspt_jax(corpus: Corpus, workers: int) -> Callable[[], float]:
  """A function that makes the next batch and gives its audio seconds."""
  from lmspt_jax.config import CorpusConfig, DataConfig
  from lmspt_jax.data.pipeline import training_batches
  config = DataConfig(train=(CorpusConfig(uri=f'folder:{corpus.folder}', split=''),), batch_size=corpus.batch_size,
                      num_workers=workers)
  batches = training_batches(config, sample_rate=RATE, crop_samples=CROP, seed=0)
  return lambda: float(next(batches)['num_samples'].sum()) / RATE


def release(corpus: Corpus, workers: int, log_mel: bool = True) -> Callable[[], float]:
  paths = corpus.paths * (20_000 // len(corpus.paths) + 1)
  batches = iter(loader(paths, CROP_SECONDS, corpus.batch_size, workers, log_mel=log_mel))
  return lambda: next(batches)['duration']


SIDES = {'lmspt_jax': lmspt_jax, 'release': release, 'without its log-mel': functools.partial(release, log_mel=False)}


def throughput(step: Callable[[], float], workers: int, seconds: float) -> float:
  """Audio hours an hour and core. Cores are the workers, or without them the processor time that was used."""
  for _ in range(3 * workers or 2):  # started, and what lay ready is used up
    step()
  audio, batches, start, used = 0.0, 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - start < seconds or batches < 2 * max(1, workers):
    audio += step()
    batches += 1
  elapsed, used = time.perf_counter() - start, time.process_time() - used
  return audio / (elapsed * workers if workers else used)


def measure(side: str, corpus: Corpus, workers: int, seconds: float) -> float:
  """`throughput` in a new process, so that the sides share neither threads nor memory."""
  command = [sys.executable, __file__, '--measure', side, corpus.name, str(corpus.folder), str(workers), str(seconds)]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return float(done.stdout.split()[-1])


def measure_here(side: str, name: str, folder: str, workers: str, seconds: str) -> None:
  print(throughput(SIDES[side](Corpus(name, Path(folder)), int(workers)), int(workers), float(seconds)), flush=True)
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(0)


def parts(corpus: Corpus, count: int) -> dict[str, float]:
  """Seconds a crop takes by part, in this process."""
  from lmspt_jax.data.audio_io import read_range, resampled_length, to_mono_at
  from lmspt_jax.data.sources import open_source
  source, random = open_source(f'folder:{corpus.folder}'), np.random.default_rng(0)
  spent = {'open': [], 'decode': [], 'resample': []}
  for position in random.integers(0, len(source), count).tolist():
    begin = time.perf_counter()
    utterance = source[position]
    with utterance.open() as file:
      opened = time.perf_counter()
      rate = file.samplerate
      room = resampled_length(file.frames, rate, RATE) - CROP
      start = int(random.integers(0, room + 1)) if room > 0 else 0
      drawn = time.perf_counter()
      audio = read_range(file, start * rate // RATE, (start + CROP) * rate // RATE, name=utterance.name)
      read = time.perf_counter()
      to_mono_at(audio, rate, RATE)
      resampled = time.perf_counter()
    spent['open'].append(opened - begin + time.perf_counter() - resampled)
    spent['decode'].append(read - drawn)
    spent['resample'].append(resampled - read)
  return {name: float(np.mean(values)) for name, values in spent.items()}


# ---------------------------------------------------------------- the report


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--corpus', type=Path, default=common.ROOT / 'lmspt_jax' / 'assets' / 'speech_sample')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=4.0, help='of each measurement, at least')
  parser.add_argument('--measure', nargs=5, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    measure_here(*args.measure)
  with tempfile.TemporaryDirectory() as folder:
    report(make_corpora(args.corpus, Path(folder)), args.rounds, args.seconds)


def report(corpora: list[Corpus], rounds: int, seconds: float) -> None:
  import torch
  print(f'# Input pipeline: crops of {CROP_SECONDS:g} s at {RATE // 1000} kHz\n')
  print(f'{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, soundfile '
        f'{soundfile.__version__} (libsndfile {soundfile.__libsndfile_version__}). Audio hours an hour and core, '
        f'medians of {rounds} rounds by turns; files in the page cache. Ratios: median of the rounds (lowest to '
        'highest).\n')
  print('| files | workers | lmspt_jax | release | ratio | release without its log-mel | ratio |')
  print('|---|---|---|---|---|---|---|')
  single = {}
  for corpus in corpora:
    for workers in (0, 2):
      found = np.array([[measure(side, corpus, workers, seconds) for side in SIDES] for _ in range(rounds)])
      ours, full, bare = np.median(found, axis=0)
      single.setdefault(corpus.name, ours)
      ratios = [f'{np.median(r):.1f} ({r.min():.1f} to {r.max():.1f})' for r in (found[:, :1] / found[:, 1:]).T]
      print(f'| {corpus.name} | {workers} | {ours:,.0f} | {full:,.0f} | {ratios[0]} | {bare:,.0f} | {ratios[1]} |',
            flush=True)
  print('\nWhere the time of a crop goes in one process of lmspt_jax, in milliseconds. "Batch" is what is left of the '
        'time per crop above: order, rows to batch, copies.\n')
  print('| files | open | decode | resample | batch | bound by |')
  print('|---|---|---|---|---|---|')
  for corpus in corpora:
    spent = parts(corpus, 60 if 'min' in corpus.name else 300)
    lengths = [min(soundfile.info(path).duration, CROP_SECONDS) for path in corpus.paths]
    spent['batch'] = max(0.0, float(np.mean(lengths)) / single[corpus.name] - sum(spent.values()))
    cells = ' | '.join(f'{1000 * value:.2f}' for value in spent.values())
    print(f'| {corpus.name} | {cells} | {max(spent, key=spent.get)} |', flush=True)


if __name__ == '__main__':
  main()
