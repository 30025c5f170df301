"""Codes of all bundled speech: against PyTorch on whole recordings, and by number of threads, devices and rows.

    python benchmarks/same_tokens.py --work=runs/same_tokens [--presets demo release]

Weights are PyTorch's initial ones, stirred. Every recording is encoded by the reference as a whole and by `Tokenizer`
(windows); then all of them end to end as one long recording. Margins are those by which the best code's cosine
similarity beats the second best's: below 1e-4 another backend's rounding may decide otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT

from lmspt_jax.config import ModelConfig, from_config_dict

NEAR = 1e-4


def preset(name: str) -> ModelConfig:
  """'demo' or 'release'; codebooks as parameters, which a file in the release's layout has."""
  if name == 'release':
    return ModelConfig()
  model = from_config_dict(runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']()).model
  plain = lambda quantizer: dataclasses.replace(quantizer, kind='vq')
  return dataclasses.replace(model, semantic=plain(model.semantic), acoustic=plain(model.acoustic))


def recordings(rate: int) -> list[np.ndarray]:
  """All bundled speech at `rate`, whole frames or not."""
  from lmspt_jax.data.audio_io import load_mono
  return [load_mono(path, rate) for path in sorted((ROOT / 'lmspt_jax/assets/speech_sample/audio').glob('*.flac'))]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--work', type=Path, required=True)
  parser.add_argument('--presets', nargs='+', default=['demo', 'release'])
  parser.add_argument('--long', type=float, default=120, help='seconds of the long recording')
  parser.add_argument('--recordings', type=int, help='so many of the bundled ones (default: all)')
  parser.add_argument('--no_processes', action='store_true', help='leave out threads, devices and rows')
  parser.add_argument('--digest', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.digest:
    return _digest(args.presets[0], args.work, *map(int, args.digest.split(',')))
  args.work.mkdir(parents=True, exist_ok=True)
  for name in args.presets:
    _compare(name, args.work / f'{name}.safetensors', args.long, args.recordings)
    if not args.no_processes:
      _by_process(name, args.work / f'{name}.safetensors')


def _compare(name: str, weights: Path, long_seconds: float, count: int | None) -> None:
  import _torch_tokenizer
  import safetensors.torch
  import torch

  from lmspt_jax import Tokenizer

  config = preset(name)
  reference = _torch_tokenizer.make(config)
  safetensors.torch.save_model(reference, str(weights))
  tokenizer = Tokenizer.from_pretrained(weights, config)
  speech = recordings(config.sample_rate)
  long, speech = np.concatenate(speech)[:round(long_seconds * config.sample_rate)], speech[:count]
  codes = tokenizer.encode([*speech, long], sample_rate=config.sample_rate)
  decoded = tokenizer.decode(codes)
  margins = _margins(tokenizer, [*speech, long])
  rows = []
  for audio, one, wave, margin_KT in zip([*speech, long], codes, decoded, margins, strict=True):
    padded = torch.from_numpy(np.pad(audio, (0, -len(audio) % config.hop)))[None]
    with torch.inference_mode():
      ids = reference.encode(padded).numpy()[0]
      heard = reference.decode(torch.from_numpy(one.ids).long()[None]).numpy()[0]
    n = min(len(heard), len(wave))
    rows.append((ids.size, int((ids != one.ids).sum()), np.abs(wave[:n] - heard[:n]).max(), np.abs(heard).max(),
                 margin_KT.ravel(), margin_KT[ids != one.ids].max(initial=0)))
  frames = sum(one.ids.shape[1] for one in codes[:-1])
  sizes = {method: tokenizer._program(method).sizes for method in ('encode', 'decode')}
  semantic = len(np.unique(np.concatenate([one.ids[0] for one in codes])))
  reach = [tuple(tokenizer._program(method).reach) for method in sizes]
  print(f'{name}: {len(speech)} recordings, {frames} frames, {semantic} semantic codes; windows {sizes}, reach {reach}')
  for title, part in (('recordings', rows[:-1]), (f'{len(long) / config.sample_rate:g} s in one', rows[-1:])):
    margin = np.concatenate([row[4] for row in part])
    print(f'  {title:<14} {sum(row[1] for row in part)} of {sum(row[0] for row in part)} codes differ from PyTorch\'s '
          f'(largest margin there {max(row[5] for row in part):.1e}); audio within {max(row[2] for row in part):.1e} '
          f'of a peak of {max(row[3] for row in part):.2f}; margins below {NEAR:g}: '
          f'{np.mean(margin < NEAR):.3%}, below 1e-6: {np.mean(margin < 1e-6):.4%}', flush=True)


def _margins(tokenizer: Any, speech: list[np.ndarray]) -> list[np.ndarray]:
  """[K, T] of each recording, in the tokenizer's own windows."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from lmspt_jax.inference.windows import WindowedProgram
  from lmspt_jax.models.layers import PRECISION
  from lmspt_jax.models.quantizers import l2_normalise

  def margins(weights, audio_BTV, inside):
    model = nnx.merge(tokenizer._folded[0], *weights)
    outputs = model._quantize(audio_BTV.reshape(len(audio_BTV), -1), inside, None, False)
    found = []
    for stack, output in zip((model.semantic_quantizer, model.acoustic_quantizer), outputs, strict=True):
      for k, quantizer in enumerate(stack.quantizers):
        similarity = jnp.einsum('btd,sd->bts', l2_normalise(output.latents[:, :, k]), quantizer.directions[...],
                                precision=PRECISION)
        best = jax.lax.top_k(similarity, 2)[0]
        found.append(best[..., 0] - best[..., 1])
    return jnp.stack(found, axis=-1)

  encode = tokenizer._program('encode')
  program = WindowedProgram(margins, tokenizer._weights, encode.reach, encode.gap, rows=1, streams=1,
                            devices=jax.local_devices()[:1])
  found: list[dict[int, np.ndarray]] = [{} for _ in speech]
  hop = tokenizer.hop
  for item, start, part in program([np.pad(audio, (0, -len(audio) % hop)).reshape(-1, hop)] for audio in speech):
    found[item][start] = part
  return [np.concatenate([part for _, part in sorted(parts.items())]).T for parts in found]


def _by_process(name: str, weights: Path) -> None:
  """Digests of codes and speech in processes of their own: threads and devices are fixed when JAX starts."""
  print(f'  {"threads":>8}{"devices":>8}{"rows":>6}   sha256 of codes, of speech')
  for threads, devices, rows in ((1, 1, 1), (2, 1, 1), (3, 1, 1), (8, 1, 1), (16, 1, 1), (2, 8, 1), (2, 1, 2)):
    done = subprocess.run(
        [sys.executable, __file__, f'--work={weights}', f'--presets={name}', f'--digest={devices},{rows}'],
        env={**os.environ, 'NPROC': str(threads), 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True)
    print(f'  {threads:>8}{devices:>8}{rows:>6}   {done.stdout.strip() or done.stderr[-300:]}', flush=True)


def _digest(name: str, weights: Path, devices: int, rows: int) -> None:
  import jax
  jax.config.update('jax_num_cpu_devices', devices)
  from lmspt_jax import Tokenizer
  tokenizer = Tokenizer.from_pretrained(weights, preset(name))
  for method in ('encode', 'decode'):
    tokenizer._program(method)._rows = rows
  speech = recordings(tokenizer.sample_rate)
  speech = [*speech[:8], np.concatenate(speech)[:30 * tokenizer.sample_rate]]
  codes = tokenizer.encode(speech, sample_rate=tokenizer.sample_rate)
  audio = tokenizer.decode(codes)
  print(*(hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest()[:16]
          for parts in ([one.ids for one in codes], audio)))


if __name__ == '__main__':
  main()
