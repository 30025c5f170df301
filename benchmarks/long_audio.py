"""Memory and time of `lmspt encode` and `lmspt decode` by length, and whether pieces equal the whole.

    python benchmarks/long_audio.py --work=runs/long_audio

Bundled real speech end to end, again and again, as 16-bit FLAC at 48 kHz, so that it is resampled. The model is the
demo's preset with random weights. Every command is a process of its own, measured by the kernel (peak resident memory).
Ten minutes are also computed at once, by the module compiled for that length: in the form that the windows compute
(`models/folding.py`), and in the one that is trained.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parents[1]
FILE_RATE = 48_000

# What needs JAX runs in children: a process inherits the peak memory of the one that starts it.
MAKE_MODEL = """
from same_tokens import preset
from _tiny_run import write_run
import sys
write_run(sys.argv[1], model=preset('demo'))
"""
COMPARE = """
import sys
import jax, jax.numpy as jnp, numpy as np, soundfile
from flax import nnx
from lmspt_jax import Tokenizer
from lmspt_jax.data.audio_io import load_mono
from lmspt_jax.inference.codes import read_codes
from lmspt_jax.models.quantizers import l2_normalise
from lmspt_jax.models.tokenizer import merge_tokenizer
tokenizer = Tokenizer.from_pretrained(sys.argv[1])
audio, codes = load_mono(sys.argv[2], tokenizer.sample_rate), read_codes(sys.argv[3])
assert codes.num_samples == len(audio)
padded = np.pad(audio, (0, -len(audio) % tokenizer.hop))[None]
wave = soundfile.read(sys.argv[4], dtype='float32')[0]
plain = lambda: merge_tokenizer(tokenizer.config.model, tokenizer.params, tokenizer.codebooks)
for name, model in (('folded as in the windows', lambda: nnx.merge(*tokenizer._folded)), ('as trained', plain)):
  @jax.jit
  def encode(x):
    outputs = model()._quantize(x, None, None, False)
    return [jnp.concatenate([getattr(o, part) for o in outputs], axis=2)[0] for part in ('codes', 'latents')]
  ids, latents = map(np.asarray, encode(padded))
  heard = np.asarray(jax.jit(lambda ids: model().decode(ids))(codes.ids[None])[0])[:len(audio)]
  differs = ids != codes.ids.T
  margins = []
  for t in np.flatnonzero(differs.any(axis=1)):
    k = np.flatnonzero(differs[t])[0]  # what follows in that frame follows from it
    quantizer = [*plain().semantic_quantizer.quantizers, *plain().acoustic_quantizer.quantizers][k]
    similarity = np.sort(l2_normalise(latents[t, k]) @ l2_normalise(quantizer.codebook[...]).T)
    margins.append(f'{similarity[-1] - similarity[-2]:.0e}')
  print(f'  at once, {name}: {differs.sum()} of {ids.size} codes differ, in {len(margins)} frames, whose first one had '
        f'margins of {", ".join(margins) or "-"}; audio within {np.abs(wave - heard).max():.1e} of a peak of '
        f'{np.abs(heard).max():.2f} (half a 16-bit step is 1.5e-05)')
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--work', type=Path, required=True, help='folder for files')
  parser.add_argument('--minutes', type=float, nargs='+', default=[5, 10, 20, 60])
  args = parser.parse_args()
  args.work.mkdir(parents=True, exist_ok=True)
  model = args.work / 'model'
  if not model.exists():
    _python('-c', MAKE_MODEL, str(model))
  print(f'{"minutes":>8}{"verb":>8}{"peak MB":>9}{"/ first":>9}{"seconds":>9}{"ms per audio second":>21}')
  first: dict[str, float] = {}
  for minutes in args.minutes:
    audio, codes, wave = (args.work / f'{minutes:g}{suffix}' for suffix in ('.flac', '.npz', '.wav'))
    _write(audio, minutes)
    for verb, source in (('encode', audio), ('decode', codes)):
      megabytes, seconds = _python('-m', 'lmspt_jax', verb, f'--model={model}', f'--out={args.work}', str(source))
      first.setdefault(verb, megabytes)
      print(f'{minutes:>8g}{verb:>8}{megabytes:>9.0f}{megabytes / first[verb]:>9.3f}{seconds:>9.1f}'
            f'{seconds / minutes / 60 * 1000:>21.1f}', flush=True)
    if minutes == 10:
      _python('-c', COMPARE, str(model), str(audio), str(codes), str(wave), show=True)
    audio.unlink()


def _write(path: Path, minutes: float) -> None:
  samples = sorted((ROOT / 'lmspt_jax' / 'assets' / 'speech_sample' / 'audio').glob('*.flac'))
  left, turn = round(minutes * 60 * FILE_RATE), 0
  with soundfile.SoundFile(path, 'w', samplerate=FILE_RATE, channels=1, subtype='PCM_16') as file:
    while left:
      speech = np.repeat(soundfile.read(samples[turn % len(samples)], dtype='int16')[0], 3)[:left]  # 16 to 48 kHz
      file.write(speech)
      left, turn = left - len(speech), turn + 1


def _python(*arguments: str, show: bool = False) -> tuple[float, float]:
  """(peak resident megabytes, seconds) of a Python process."""
  paths = [ROOT, ROOT / 'benchmarks', ROOT / 'tests', *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(map(str, paths))}
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=None if show else subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f'{arguments} failed')
  return usage.ru_maxrss / 1024, time.perf_counter() - start


if __name__ == '__main__':
  main()
