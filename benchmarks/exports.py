"""Exported graphs against the tokenizer: codes, audio, sizes, loading, speed. Its tables: docs/results/exports.md.

    python benchmarks/exports.py --corpus=DIR [--model=RUN] [--minutes=10] [--audio=1e9] [--rounds=5]

Without --model: the release's widths (configs/lmspt_12_5hz.py) and arbitrary weights, away from where training starts.
DIR is a folder with manifest.jsonl, such as benchmarks/make_speech_corpus.py makes. JAX compiles for every length, so
the bundled recordings are filled up with zeros to multiples of two seconds, and the corpus comes in pieces of ten. Of a
frame in which codes differ, the first that does is looked into: how much nearer is the tokenizer's code than the
graph's, in float64 from the tokenizer's latent? The later ones of the frame follow from it.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import ROOT, by_turns

from _random_weights import stirred_weights  # isort: skip  (common has put tests/ on the path)
import jax
import jax.numpy as jnp
import onnxruntime
import safetensors.numpy

from lmspt_jax import Tokenizer
from lmspt_jax.config import ExperimentConfig, ModelConfig
from lmspt_jax.data.audio_io import load_mono
from lmspt_jax.export.onnx import write_onnx
from lmspt_jax.export.stablehlo import write_stablehlo
from lmspt_jax.inference.codes import Codes
from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer
from lmspt_jax.pretrained.model import TrainedModel

PIECE = 10  # seconds
GRAPHS = ('encode', 'decode', 'resynthesis')
FORMATS = {'StableHLO': write_stablehlo, 'ONNX': write_onnx}
Graph = Callable[[np.ndarray], np.ndarray]


def arbitrary(config: ModelConfig) -> Tokenizer:
  """A tokenizer of arbitrary weights, the same every time."""
  params, codebooks = stirred_weights(abstract_tokenizer(config)[1:])
  return Tokenizer(TrainedModel(ExperimentConfig(model=config), params, codebooks))


def load(kind: str, folder: Path, name: str) -> Graph:
  if kind == 'ONNX':
    session = onnxruntime.InferenceSession(folder / f'{name}.onnx')
    return lambda array: session.run(None, {session.get_inputs()[0].name: array})[0]
  graph = jax.export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes()))
  weights = jax.device_put(safetensors.numpy.load_file(folder / f'{name}.safetensors'))
  call = jax.jit(graph.call)
  return lambda array: np.asarray(call(weights, array))


def recordings(folder: Path, rate: int, seed: int | None = None) -> Iterator[np.ndarray]:
  """A folder's, float32 [N]; in the manifest's order or, with a seed, in a random one."""
  rows = [json.loads(line) for line in (folder / 'manifest.jsonl').read_text().splitlines()]
  if seed is not None:
    np.random.RandomState(seed).shuffle(rows)
  for row in rows:
    yield load_mono(folder / row['path'], rate)


def pieces(audio: Iterator[np.ndarray], size: int, count: int) -> np.ndarray:
  """Recordings joined end to end and cut into `count` of `size` samples."""
  parts, found = [], 0
  while found < size * count:
    parts.append(next(audio))
    found += len(parts[-1])
  return np.concatenate(parts)[:size * count].reshape(count, size)


class Similarities:
  """Cosine of a recording's latents and all codes, in float64 from the tokenizer's float32 latents."""

  def __init__(self, tokenizer: Tokenizer):
    config, self._arrays, self._hop = tokenizer.config.model, (tokenizer.params, tokenizer.codebooks), tokenizer.hop

    def latents(params, codebooks, audio_BN):
      out = merge_tokenizer(config, params, codebooks)(audio_BN)
      return [*jnp.moveaxis(out.semantic.latents[0], 1, 0), *jnp.moveaxis(out.acoustic.latents[0], 1, 0)]

    self._latents = jax.jit(latents)
    model = merge_tokenizer(config, *self._arrays)
    quantizers = [*model.semantic_quantizer.quantizers, *model.acoustic_quantizer.quantizers]
    self._codes = [_unit(quantizer.codebook[...]) for quantizer in quantizers]

  def __call__(self, audio_N: np.ndarray) -> list[np.ndarray]:
    """[T, S] of each codebook."""
    padded = np.pad(audio_N, (0, -len(audio_N) % self._hop))
    return [_unit(z_TD) @ codes_SD.T
            for z_TD, codes_SD in zip(self._latents(*self._arrays, padded[None]), self._codes, strict=True)]


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def compare(title: str, tokenizer: Tokenizer, graphs: dict[str, dict[str, Graph]],
            audio: list[np.ndarray]) -> list[np.ndarray]:
  """Prints a row for each format; returns the tokenizer's codes."""
  codes = [tokenizer.encode(one, sample_rate=tokenizer.sample_rate).ids for one in audio]
  similarities, total = Similarities(tokenizer), sum(ids.size for ids in codes)
  for kind, graph in graphs.items():
    differ, margins = 0, []
    for one, ours in zip(audio, codes, strict=True):
      theirs = graph['encode'](one[None])[0]
      wrong = ours != theirs
      differ += int(wrong.sum())
      found = similarities(one) if wrong.any() else []
      for t in np.flatnonzero(wrong.any(0)):
        k = int(wrong[:, t].argmax())
        margins.append(found[k][t, ours[k, t]] - found[k][t, theirs[k, t]])
    near = ', '.join(f'{margin:.1e}' for margin in sorted(margins, key=abs))
    print(f'| {title} | {kind} | {total:,} | {differ} | {len(margins)} | {near} |', flush=True)
  return codes


def spread(tokenizer: Tokenizer, audio: list[np.ndarray]) -> None:
  """Prints how near ties are: the best code's lead over the second best."""
  leads, similarities = [], Similarities(tokenizer)
  for one in audio:
    for similarity_TS in similarities(one):
      best = np.partition(similarity_TS, -2, axis=-1)[:, -2:]
      leads.append(best[:, 1] - best[:, 0])
  leads = np.concatenate(leads)
  shares = ' | '.join(f'{np.mean(leads < limit):.1e}' for limit in (1e-3, 1e-4, 1e-5, 1e-6))
  print(f'| {np.median(leads):.1e} | {shares} |', flush=True)


def audio_rows(tokenizer: Tokenizer, graphs: dict[str, dict[str, Graph]], ids: list[np.ndarray]) -> None:
  """Prints the largest differences of audio over batches of one, ids [K, T] each."""
  for name, path in (('decode', 'full'), ('resynthesis', 'resynthesis')):
    worst, largest = dict.fromkeys(graphs, 0.0), 0.0
    for one in ids:
      ours = tokenizer.decode(Codes(one, one.shape[1] * tokenizer.hop, tokenizer.sample_rate, tokenizer.frame_rate),
                              path)
      largest = max(largest, float(np.abs(ours).max()))
      for kind, graph in graphs.items():
        worst[kind] = max(worst[kind], float(np.abs(graph[name](one[None])[0] - ours).max()))
    seconds = sum(one.shape[1] for one in ids) / tokenizer.frame_rate
    print(f'| {name} | {seconds:.0f} s | {largest:.2f} | ' + ' | '.join(f'{worst[kind]:.1e}' for kind in graphs) + ' |',
          flush=True)


def speed(tokenizer: Tokenizer, graphs: dict[str, dict[str, Graph]], audio: np.ndarray, rounds: int) -> None:
  """Prints paired timings of one piece."""
  codes = tokenizer.encode(audio, sample_rate=tokenizer.sample_rate)
  for name in GRAPHS:
    array = audio[None] if name == 'encode' else codes.ids[None]
    ours = {'encode': lambda: tokenizer.encode(audio, sample_rate=tokenizer.sample_rate),
            'decode': lambda: tokenizer.decode(codes), 'resynthesis': lambda: tokenizer.decode(codes, 'resynthesis')}
    theirs = {kind: functools.partial(graph[name], array) for kind, graph in graphs.items()}
    seconds = by_turns({'Tokenizer': ours[name], **theirs}, rounds)
    cells = [f'{np.median(seconds["Tokenizer"]):.2f} s']
    for kind in graphs:
      ratios = [a / b for a, b in zip(seconds['Tokenizer'], seconds[kind], strict=True)]
      span = f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
      cells.append(f'{np.median(seconds[kind]):.2f} s | {span}')
    print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, type=Path)
  parser.add_argument('--model', help='a run, or a .safetensors file of the release\'s layout')
  parser.add_argument('--minutes', type=float, default=10)
  parser.add_argument('--audio', type=float, default=1e9, help='seconds of decoded audio that are compared, at most')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  tokenizer = Tokenizer.from_pretrained(args.model) if args.model else arbitrary(ModelConfig())
  config, rate = tokenizer.config.model, tokenizer.sample_rate
  size = -(-PIECE * rate // config.hop) * config.hop
  bundled = [np.pad(one, (0, -len(one) % (2 * rate)))
             for one in recordings(ROOT / 'lmspt_jax' / 'assets' / 'speech_sample', rate)]
  corpus = list(pieces(recordings(args.corpus, rate, seed=0), size, round(args.minutes * 60 * rate / size)))
  with tempfile.TemporaryDirectory() as place:
    graphs: dict[str, dict[str, Graph]] = {}
    print('| format | graph | MB | all written in | loaded in | first call, 10 s |\n|---|---|---|---|---|---|')
    for kind, write in FORMATS.items():
      folder, start = Path(place) / kind, time.perf_counter()
      folder.mkdir()
      write(folder, config, tokenizer.params, tokenizer.codebooks, resynthesis=True)
      wrote, graphs[kind] = time.perf_counter() - start, {}
      for name in GRAPHS:
        start = time.perf_counter()
        graphs[kind][name] = load(kind, folder, name)
        loaded = time.perf_counter()
        array = corpus[0][None] if name == 'encode' else graphs[kind]['encode'](corpus[0][None])
        called = time.perf_counter()
        graphs[kind][name](array)
        files = sorted(folder.glob(f'{name}.*'), reverse=True)
        sizes = ' + '.join(f'{path.stat().st_size / 1e6:.2f}' for path in files)
        print(f'| {kind} | {name} | {sizes} | {wrote:.1f} s | {loaded - start:.2f} s | '
              f'{time.perf_counter() - called:.1f} s |', flush=True)
    print('\n| speech | format | codes | differ | frames | margins |\n|---|---|---|---|---|---|')
    codes = {title: compare(title, tokenizer, graphs, audio) for title, audio in (
        ('bundled, 64 recordings', bundled), (f'corpus, {args.minutes:g} min', corpus))}
    print('\n| median lead | < 1e-3 | < 1e-4 | < 1e-5 | < 1e-6 |\n|---|---|---|---|---|')
    spread(tokenizer, corpus)
    joined = np.concatenate([ids for found in codes.values() for ids in found], axis=1)
    frames = size // config.hop
    print('\n| graph | speech | largest sample | ' + ' | '.join(graphs) + ' |\n|---|---|---|---|---|')
    count = min(joined.shape[1] // frames, max(1, round(args.audio / PIECE)))
    audio_rows(tokenizer, graphs, [joined[:, i * frames:(i + 1) * frames] for i in range(count)])
    print('\n| graph | Tokenizer | ' + ' | '.join(f'{kind} | Tokenizer / {kind}' for kind in graphs)
          + ' |\n|---|---|---|---|---|---|')
    speed(tokenizer, graphs, corpus[0], args.rounds)


if __name__ == '__main__':
  main()
