"""Causal models frame by frame: whether pieces equal the whole, and how long one frame takes.

    python benchmarks/streaming.py --work=runs/streaming [--presets demo release]

Weights are random and stirred: speed does not depend on them. `demo` is configs/demo.py's model and `release`
configs/lmspt_12_5hz_causal.py's, both causal. Real bundled speech is pushed in pieces of 1 sample (a few frames of it),
7, a hop - 1, a hop, a hop + 1, one second, ten seconds and random lengths, and compared with `Tokenizer.encode` and
`decode` of the whole. Then single frames are pushed one by one, each timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from common import speech
from same_tokens import preset


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--work', type=Path, required=True)
  parser.add_argument('--presets', nargs='+', default=['demo', 'release'])
  parser.add_argument('--seconds', type=float, default=12, help='of speech that pieces are compared on')
  parser.add_argument('--frames', type=int, default=200, help='that are timed')
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  for name in args.presets:
    tokenizer = _tokenizer(name, args.work)
    codes = _compare(name, tokenizer, args.seconds)
    _time(name, tokenizer, codes, args.frames)


def _tokenizer(name: str, work: Path):
  from _random_weights import stirred_weights
  from _tiny_run import write_run

  from lmspt_jax import Tokenizer
  from lmspt_jax.models.tokenizer import abstract_tokenizer

  config = dataclasses.replace(preset(name), causal=True)
  with tempfile.TemporaryDirectory(dir=work) as folder:  # a run's workdir, for all that is not weights
    tokenizer = Tokenizer.from_pretrained(write_run(Path(folder) / 'run', model=config))
  params, codebooks = stirred_weights(abstract_tokenizer(config)[1:])
  return Tokenizer(dataclasses.replace(tokenizer.model, params=params, codebooks=codebooks))


def _compare(name: str, tokenizer, seconds: float):
  rate, hop = tokenizer.sample_rate, tokenizer.hop
  audio = speech(1, seconds, rate)[0][:-hop // 3]
  whole = tokenizer.encode(audio, sample_rate=rate)
  heard = tokenizer.decode(whole)
  short = tokenizer.encode(audio[:3 * hop + 5], sample_rate=rate)
  used = [len(np.unique(ids_T)) for ids_T in whole.ids]
  print(f'{name}: {len(audio) / rate:.2f} s, {whole.ids.shape[1]} frames, different codes by codebook {used}',
        flush=True)
  pieces = {'1 sample': 1, '7': 7, 'a hop - 1': hop - 1, 'a hop': hop, 'a hop + 1': hop + 1, '1 s': rate,
            '10 s': 10 * rate, 'random': None}
  for title, length in pieces.items():
    given, wanted = (audio[:3 * hop + 5], short) if length == 1 else (audio, whole)
    lengths = [length] * (len(given) // length) if length else np.random.default_rng(0).choice(
        [0, 1, 100, hop, 3 * hop + 7], len(given) // hop)
    parts, state = [], tokenizer.start()
    for piece in np.split(given, np.cumsum(lengths)):
      codes, state = tokenizer.push(piece, state)
      parts.append(codes)
    parts.append(tokenizer.finish(state))
    ids = np.concatenate([part.ids for part in parts], axis=1)
    state, out = tokenizer.start_decoding(), []
    for part in parts:
      samples, state = tokenizer.push_codes(part, state)
      out.append(samples)
    out = np.concatenate(out)
    wave = tokenizer.decode(short) if length == 1 else heard
    print(f'  pieces of {title:<10} {(ids != wanted.ids).sum()} of {ids.size} codes differ; speech within '
          f'{np.abs(out - wave).max():.1e} of a peak of {np.abs(wave).max():.2f}', flush=True)
  return whole


def _time(name: str, tokenizer, codes, frames: int) -> None:
  frame_ms = 1000 / tokenizer.frame_rate
  audio = speech(1, (frames + 5) * tokenizer.hop / tokenizer.sample_rate, tokenizer.sample_rate)[0]
  for verb in ('encode', 'decode'):
    state = tokenizer.start() if verb == 'encode' else tokenizer.start_decoding()
    times, busy = [], []
    for t in range(frames + 5):
      piece = audio[t * tokenizer.hop:(t + 1) * tokenizer.hop] if verb == 'encode' else dataclasses.replace(
          codes, ids=codes.ids[:, t % (codes.ids.shape[1] - 1)][:, None], num_samples=tokenizer.hop)
      start, used = time.perf_counter(), time.process_time()
      _, state = (tokenizer.push if verb == 'encode' else tokenizer.push_codes)(piece, state)
      times.append(time.perf_counter() - start)
      busy.append(time.process_time() - used)
    ms = 1000 * np.array(times[5:])
    median, high, worst = np.median(ms), np.percentile(ms, 95), ms.max()
    print(f'  {verb} one frame of {frame_ms:g} ms: best {ms.min():.1f} ms, median {median:.1f}, 95th percentile '
          f'{high:.1f}, worst {worst:.1f}; real-time factor {ms.min() / frame_ms:.2f}, {median / frame_ms:.2f}, '
          f'{high / frame_ms:.2f}, {worst / frame_ms:.2f}; CPU time {1000 * np.median(busy[5:]):.1f} ms a frame; '
          f'load of the machine {os.getloadavg()[0]:.1f}', flush=True)


if __name__ == '__main__':
  main()
