"""A million tokens in every way that should not matter: 0 may differ. Its table: docs/results/same_corpus.md.

    python benchmarks/same_corpus.py --model=MODEL --corpus=DIR [--tokens=1000000] [--work=runs/same_corpus]

DIR is a folder with manifest.jsonl, such as benchmarks/make_speech_corpus.py makes; as many of its recordings are drawn
as give so many tokens. `lmspt tokenize` writes them once; its tokens are compared with those of

  lists of 1, 3 or 16 recordings, in a random order
  one recording at a time, its last frame filled up with zeros; or in blocks of 1 to 100,000 samples
  eight devices, and two hosts with four devices each (`lmspt tokenize` again, its files byte for byte)
  the StableHLO and ONNX graphs, each recording as a whole

Exit status 1 if anything differs; a graph's near ties (docs/export.md) are counted and no fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import ROOT

from lmspt_jax import Tokenizer
from lmspt_jax.data.audio_io import load_mono
from lmspt_jax.slm.manifest import read_manifest
from lmspt_jax.slm.token_rows import from_table

DEVICES = '--xla_force_host_platform_device_count'
Check = Callable[[], Iterator[tuple[str, np.ndarray]]]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--corpus', type=Path, required=True)
  parser.add_argument('--tokens', type=int, default=1_000_000)
  parser.add_argument('--work', type=Path, default=ROOT / 'runs' / 'same_corpus')
  args = parser.parse_args()
  shutil.rmtree(args.work, ignore_errors=True)
  args.work.mkdir(parents=True)
  tokenizer = Tokenizer.from_pretrained(args.model)
  rate, hop = tokenizer.sample_rate, tokenizer.hop
  rows = draw(args.corpus, args.work / 'speech', args.tokens / tokenizer.frame_rate / tokenizer.num_codebooks)
  paths = {row['id']: args.work / 'speech' / row['path'] for row in rows}
  names = list(paths)
  tokenize(args.model, args.work, 'tokens')
  wanted = {row.id: row.ids for path in read_manifest(args.work / 'tokens').paths(args.work / 'tokens', '.parquet')
            for row in from_table(pq.read_table(path))}
  count = sum(ids.size for ids in wanted.values())
  print(f'{len(wanted)} recordings, {count} tokens of {tokenizer.num_codebooks} codebooks, '
        f'model {tokenizer.model_hash}', flush=True)
  rng, wrong = np.random.default_rng(0), 0

  def lists() -> Iterator[tuple[str, np.ndarray]]:
    order = rng.permutation(names).tolist()
    while order:
      size = int(rng.choice((1, 3, 16)))
      part, order = order[:size], order[size:]
      codes = tokenizer.encode([load_mono(paths[name], rate) for name in part], sample_rate=rate)
      yield from ((name, one.ids) for name, one in zip(part, codes, strict=True))

  def alone() -> Iterator[tuple[str, np.ndarray]]:
    for number, name in enumerate(names):
      audio = load_mono(paths[name], rate)
      if number % 2:
        yield name, tokenizer.encode(np.pad(audio, (0, -len(audio) % hop)), sample_rate=rate).ids
        continue
      cuts = np.cumsum(10 ** rng.uniform(0, 5, 10_000)).astype(int)
      parts = np.split(audio, cuts[cuts < len(audio)])
      yield name, tokenizer.encode_blocks((part for part in parts if len(part)), sample_rate=rate).ids

  ways: dict[str, Check] = {'lists of 1, 3 and 16, shuffled': lists, 'alone, filled up or in blocks': alone}
  for way, check in ways.items():
    start, differing = time.monotonic(), 0
    found = 0
    for name, ids in check():
      same = ids.shape == wanted[name].shape
      differing += int((ids != wanted[name]).sum()) if same else wanted[name].size
      found += ids.size
    wrong += differing + abs(found - count)
    say(way, differing, found, start)
  for way, hosts, devices in (('eight devices', 1, 8), ('two hosts of four devices', 2, 4)):
    start = time.monotonic()
    tokenize(args.model, args.work, way.replace(' ', '_'), hosts, devices)
    same = files(args.work / 'tokens') == files(args.work / way.replace(' ', '_'))
    wrong += not same
    say(f'{way}: files {"equal" if same else "DIFFERENT"}', 0 if same else count, count, start)
  for kind in ('stablehlo', 'onnx'):
    graph(kind, args.model, args.work, tokenizer, paths, wanted)
  return 1 if wrong else 0


def say(way: str, differing: int, count: int, start: float) -> None:
  print(f'  {way:<36} {differing} of {count} tokens differ ({(time.monotonic() - start) / 60:.1f} min)', flush=True)


def draw(corpus: Path, folder: Path, seconds: float) -> list[dict]:
  """Recordings of the corpus at random until they last so long, as a folder of their own."""
  rows = [json.loads(line) for line in (corpus / 'manifest.jsonl').read_text().splitlines()]
  chosen, total = [], 0.0
  for number in np.random.default_rng(1).permutation(len(rows)):
    if total >= seconds:
      break
    chosen.append(rows[number])
    total += rows[number]['seconds']
  folder.mkdir()
  for row in chosen:
    (folder / row['path']).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(corpus / row['path'], folder / row['path'])
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in chosen))
  return chosen


def tokenize(model: str, work: Path, name: str, hosts: int = 1, devices: int = 1) -> None:
  command = [sys.executable, '-m', 'lmspt_jax', 'tokenize', f'--model={model}', f'--data=folder:{work / "speech"}',
             f'--out={work / name}', '--shard_utterances=256']
  environment = os.environ | {'XLA_FLAGS': f'{DEVICES}={devices}', 'PYTHONPATH': str(ROOT)}
  if hosts > 1:
    with socket.create_server(('127.0.0.1', 0)) as server:
      command += [f'--coordinator=127.0.0.1:{server.getsockname()[1]}', f'--num-processes={hosts}']
  started = [subprocess.Popen([*command, *([f'--process-id={host}'] if hosts > 1 else [])], env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for host in range(hosts)]
  if [process.wait() for process in started] != [0] * hosts:
    sys.exit(f'lmspt tokenize with {hosts} hosts failed')


def files(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def graph(kind: str, model: str, work: Path, tokenizer: Tokenizer, paths: dict[str, Path],
          wanted: dict[str, np.ndarray]) -> None:
  """Recordings of about the same length are filled up with zeros together, as JAX compiles for every length; what that
  changes near their ends is left out by comparing the frames that don't see the filling."""
  from exports import load  # its loading of graphs without this package

  folder = work / kind
  subprocess.run([sys.executable, '-m', 'lmspt_jax', 'export', f'--model={model}', f'--format={kind}',
                  f'--out={folder}'], check=True, env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.DEVNULL)
  encode, start = load('ONNX' if kind == 'onnx' else 'StableHLO', folder, 'encode'), time.monotonic()
  piece, reach = 2 * tokenizer.sample_rate // tokenizer.hop * tokenizer.hop, tokenizer._program('encode').reach.right
  differing = count = 0
  for name, path in paths.items():
    audio, ids = load_mono(path, tokenizer.sample_rate), wanted[name]
    # The tokenizer hears zeros up to the last frame's end; a graph with more of them hears those.
    found = encode(np.pad(audio, (0, -len(audio) % piece))[None].astype(np.float32))[0]
    frames = max(0, ids.shape[1] - reach) if len(audio) % piece > 0 else ids.shape[1]
    differing += int((found[:, :frames] != ids[:, :frames]).sum())
    count += ids[:, :frames].size
  say(f'{kind}, frames that see no filling', differing, count, start)


if __name__ == '__main__':
  sys.exit(main())
