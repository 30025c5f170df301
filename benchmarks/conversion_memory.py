"""Peak memory of `lmspt convert` against the size of the weights.

    python benchmarks/conversion_memory.py [--layers=6] [--width=768]

A tokenizer of the release's widths with random weights goes from a run to a release file, and from there to a folder. A
random Whisper, as a Hugging Face folder and, where torch is installed, as an openai-whisper file, goes to Hugging Face
folders. Each conversion runs in a process of its own, which says the most it has had resident (VmHWM of
/proc/self/status, for `getrusage` starts with the parent's; with the pages of the source file that it has mapped). The
same command on a small model is the floor: Python, jax, flax.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))
from _tiny_run import write_run  # isort: skip
from _whisper_arrays import named_arrays  # isort: skip

from lmspt_jax.cli import flags
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, OPENAI_NAMES, Rules, foreign_layout, foreign_name
from lmspt_jax.models.whisper import Whisper, WhisperDims, abstract_params, sinusoids

ROOT = Path(__file__).resolve().parents[1]
MEASURED = '''
import sys
from pathlib import Path
from lmspt_jax.cli.main import main
status = main(sys.argv[1:])
print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
sys.exit(status)
'''


def random_tensors(dims: WhisperDims, rules: Rules) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  draw = lambda spec: rng.standard_normal(spec.shape, np.float32)
  out = {foreign_name('encoder/positions', rules): np.array(sinusoids(dims.audio_context, dims.width))}
  for path, value in named_arrays(jax.tree.map(draw, abstract_params(Whisper, dims))):
    out[foreign_name(path, rules)] = np.ascontiguousarray(foreign_layout(path, value))
  return out


def write_hugging_face(folder: Path, dims: WhisperDims) -> str:
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({
      'model_type': 'whisper', 'num_mel_bins': dims.n_mels, 'd_model': dims.width, 'encoder_layers': dims.audio_layers,
      'decoder_layers': dims.text_layers, 'vocab_size': dims.vocab_size, 'max_source_positions': dims.audio_context,
      'max_target_positions': dims.text_context, 'encoder_attention_heads': dims.heads,
      'decoder_attention_heads': dims.heads}))
  safetensors.numpy.save_file(random_tensors(dims, HUGGING_FACE_NAMES), folder / 'model.safetensors')
  return f'hf:{folder}'


def write_openai(path: Path, dims: WhisperDims) -> str:
  import torch

  sizes = {'n_mels': dims.n_mels, 'n_audio_ctx': dims.audio_context, 'n_audio_state': dims.width,
           'n_audio_head': dims.heads, 'n_audio_layer': dims.audio_layers, 'n_vocab': dims.vocab_size,
           'n_text_ctx': dims.text_context, 'n_text_state': dims.width, 'n_text_head': dims.heads,
           'n_text_layer': dims.text_layers}
  tensors = {name: torch.from_numpy(value) for name, value in random_tensors(dims, OPENAI_NAMES).items()}
  torch.save({'dims': sizes, 'model_state_dict': tensors}, path)
  return f'openai:{path}'


def peak(source: str, target: str, *flags: str) -> int:
  """Bytes."""
  command = [sys.executable, '-c', MEASURED, 'convert', f'--from={source}', f'--to={target}', *flags]
  done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
  return 1024 * int(done.stdout.splitlines()[-1])


def show(name: str, found: int, floor: int, copy: int) -> None:
  print(f'{name}: peak {found / 2**20:5.0f} MiB, floor {floor / 2**20:4.0f} MiB, above it {(found - floor) / copy:.2f} '
        'copies of the weights', flush=True)


def measure_tokenizer(here: Path) -> None:
  release = flags.load(str(ROOT / 'configs' / 'lmspt_12_5hz.py')).model
  runs = {'large': write_run(here / 'large', model=release), 'small': write_run(here / 'small')}
  peaks = {}
  for size, run in runs.items():
    file, folder = here / f'{size}.safetensors', here / f'{size}-folder'
    peaks['run -> release', size] = peak(f'run:{run}', f'release:{file}')
    if size == 'large':  # the small one's dilations are not told from its shapes
      peaks['release -> folder', size] = peak(f'release:{file}', f'folder:{folder}')
  copy = (here / 'large.safetensors').stat().st_size
  print(f'tokenizer of the release: {copy / 2**20:.0f} MiB')
  floor = peaks['run -> release', 'small']
  for name in ('run -> release', 'release -> folder'):
    show(name, peaks[name, 'large'], floor, copy)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--layers', type=int, default=6, help='of encoder and decoder each')
  parser.add_argument('--width', type=int, default=768)
  args = parser.parse_args()
  dims = WhisperDims(n_mels=80, width=args.width, heads=args.width // 64, audio_layers=args.layers,
                     text_layers=args.layers, vocab_size=51865)
  small = dataclasses.replace(dims, width=64, heads=1, audio_layers=1, text_layers=1, vocab_size=100)
  with tempfile.TemporaryDirectory() as temporary:
    here = Path(temporary)
    measure_tokenizer(here)
    sources = {'hf': write_hugging_face(here / 'source', dims)}
    floors = {'hf': write_hugging_face(here / 'small-whisper', small)}
    if importlib.util.find_spec('torch'):
      sources['openai'], floors['openai'] = write_openai(here / 'a.pt', dims), write_openai(here / 'small.pt', small)
    copy = (here / 'source/model.safetensors').stat().st_size
    largest = 4 * dims.vocab_size * dims.width
    print(f'Whisper: {copy / 2**20:.0f} MiB in float32, the largest tensor {largest / 2**20:.0f} MiB')
    for kind, source in sources.items():
      for dtype in ('float32', 'float16'):
        floor = peak(floors[kind], f'hf:{here / f"{kind}-{dtype}-small"}', f'--dtype={dtype}')
        show(f'{kind} -> hf {dtype}', peak(source, f'hf:{here / f"{kind}-{dtype}"}', f'--dtype={dtype}'), floor, copy)


if __name__ == '__main__':
  main()
