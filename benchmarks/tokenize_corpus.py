"""`lmspt tokenize` against one file at a time, in paired rounds. Its tables: docs/results/tokenize.md.

    python benchmarks/tokenize_corpus.py --corpus=DIR [--presets demo release] [--files=64] [--rounds=5]

DIR is a folder with manifest.jsonl, such as benchmarks/make_speech_corpus.py makes; FILES of its recordings are drawn.
Weights are PyTorch's initial ones, stirred, so that all contestants have the same model. They are:

  tokenize        `lmspt tokenize`: decoding, encoding, shards and manifest on disk
  one at a time   our Tokenizer in a loop: load a file, encode it
  network         our network, compiled for every length, in the same loop; how long compiling took is said apart
  PyTorch         the reference in the same loop

All read the same files. What `lmspt encode FILE`, a process a file, takes is measured on a few.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import by_turns, report
from same_tokens import preset

PROCESSES = 4  # runs of `lmspt encode`


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--corpus', type=Path, required=True)
  parser.add_argument('--presets', nargs='+', default=['demo', 'release'])
  parser.add_argument('--files', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as work:
    folder, seconds = _draw(args.corpus, args.files, Path(work) / 'speech')
    for name in args.presets:
      _compare(name, folder, seconds, args.rounds, Path(work))


def _draw(corpus: Path, count: int, folder: Path) -> tuple[Path, float]:
  """So many recordings of the corpus, evenly spaced by length, as a folder of their own."""
  rows = [json.loads(line) for line in (corpus / 'manifest.jsonl').read_text().splitlines()]
  rows = sorted((row for row in rows if row['seconds'] >= 1), key=lambda row: (row['seconds'], row['id']))
  rows = [rows[n] for n in np.linspace(0, len(rows) - 1, count).astype(int)]
  folder.mkdir()
  for number, row in enumerate(rows):
    shutil.copy(corpus / row['path'], folder / f'{number:04d}.flac')
    row['path'] = f'{number:04d}.flac'
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  seconds = [row['seconds'] for row in rows]
  print(f'{count} recordings of {min(seconds):.1f} to {max(seconds):.1f} s, {sum(seconds) / 60:.1f} minutes in all')
  return folder, sum(seconds)


def _compare(name: str, folder: Path, seconds: float, rounds: int, work: Path) -> None:
  import _torch_tokenizer
  import jax
  import safetensors.torch
  import torch

  from lmspt_jax import Tokenizer
  from lmspt_jax.data.audio_io import load_mono
  from lmspt_jax.models.tokenizer import merge_tokenizer
  from lmspt_jax.slm.corpus import tokenize

  config, weights = preset(name), work / f'{name}.safetensors'
  reference = _torch_tokenizer.make(config)
  safetensors.torch.save_model(reference, str(weights))
  tokenizer = Tokenizer.from_pretrained(weights, config)
  module = merge_tokenizer(config, tokenizer.params, tokenizer.codebooks)
  network = jax.jit(lambda module, audio_BN: module.encode(audio_BN))
  paths = sorted(folder.glob('*.flac'))

  def load(path: Path) -> np.ndarray:
    return load_mono(path, config.sample_rate)

  def padded(path: Path) -> np.ndarray:
    audio = load(path)
    return np.pad(audio, (0, -len(audio) % config.hop))[None]

  def in_bulk() -> None:
    shutil.rmtree(work / 'tokens', ignore_errors=True)
    tokenize(tokenizer, f'folder:{folder}', work / 'tokens', progress=False)

  def torch_loop() -> list[Any]:
    with torch.inference_mode():
      return [reference.encode(torch.from_numpy(padded(path))) for path in paths]

  start = time.perf_counter()
  for path in paths:
    np.asarray(network(module, padded(path)))
  first = time.perf_counter() - start
  taken = by_turns({
      'tokenize': in_bulk,
      'one at a time': lambda: [tokenizer.encode(load(path), sample_rate=config.sample_rate) for path in paths],
      'network': lambda: [np.asarray(network(module, padded(path))) for path in paths],
      'PyTorch': torch_loop}, rounds)
  for other in ('one at a time', 'network', 'PyTorch'):
    report(f'{name}: tokenize and {other}', {key: taken[key] for key in ('tokenize', other)}, seconds, 'tokenize',
           other)
  print(f'  the network for each length, compiling included: {first:.1f} s, once')
  starts = []
  for path in paths[::len(paths) // PROCESSES][:PROCESSES]:
    start = time.perf_counter()
    subprocess.run([sys.executable, '-m', 'lmspt_jax', 'encode', f'--model={weights}', f'--out={work / "codes"}',
                    str(path)], check=True, stdout=subprocess.DEVNULL)
    starts.append(time.perf_counter() - start)
  bulk = float(np.median(taken['tokenize'])) / len(paths)
  print(f'  `lmspt encode FILE`, a process a file: median {np.median(starts):.1f} s a file; tokenize {bulk:.2f} s a '
        f'file (ratio {np.median(starts) / bulk:.0f})', flush=True)


if __name__ == '__main__':
  main()
