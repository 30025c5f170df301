"""The house's room order, read from the imports: a room imports only rooms above it, or itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / 'lmspt_jax'
ROOMS = (
    ('errors', 'version', 'files', 'config', 'rng', 'audio'),
    ('models', 'losses', 'data'),
    # convert: weights in and out, knows models alone
    ('sharding', 'optim', 'checkpoint', 'metrics', 'convert', 'hosts', 'chips'),
    # pretrained: whole models in and out, with what is known of them; measures: what is measured of recordings
    ('pretrained', 'measures'),
    ('training',),
    ('export', 'planning', 'inference'),
    ('evaluation', 'slm', 'sweeps'),
    ('cli',),
    ('demo', '__main__', '__init__'),  # __init__ is the package's front door: it looks up Tokenizer on demand
)
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
FIRST_ROW = set(ROOMS[0])  # the only row whose rooms may import each other
MAX_LINES = 400
FORBIDDEN = {'torch': 'no PyTorch', 'tensorflow': 'no TensorFlow', 'pickle': 'no pickle'}


def imports_of(source: str) -> set[str]:
  """Dotted names of everything a module imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative import: write the whole name'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def top(name: str) -> str:
  return name.partition('.')[0]


def room_of(relative: Path) -> str:
  return relative.parts[0].removesuffix('.py')


def faults(relative: Path, source: str) -> list[str]:
  """What a module imports against the order."""
  room, found = room_of(relative), []
  for name in sorted(imports_of(source)):
    if top(name) in FORBIDDEN:
      found.append(f'{relative} imports {name}: {FORBIDDEN[top(name)]}')
    elif top(name) == 'orbax' and room != 'checkpoint':
      found.append(f'{relative} imports {name}: only checkpoint knows Orbax')
    elif top(name) in ('jax', 'jaxlib', 'flax', 'optax') and room == 'data':
      found.append(f'{relative} imports {name}: data workers must start without jax')
    elif top(name) == 'lmspt_jax':
      other = name.split('.')[1] if '.' in name else '__init__'
      if other not in ROW:
        other = '__init__'  # from lmspt_jax import Tokenizer
      if other == room or (room in FIRST_ROW and other in FIRST_ROW):
        continue
      if ROW[other] >= ROW[room] and room != '__main__':
        found.append(f'{relative} imports {name}: {other} is not above {room}')
      elif room == 'data' and other == 'audio':
        found.append(f'{relative} imports {name}: audio/ is jax')
  return found


def modules() -> list[Path]:
  return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('relative', modules(), ids=str)
def test_room_order(relative):
  assert room_of(relative) in ROW, f'{relative} is in no room: add it to ROOMS'
  source = (PACKAGE / relative).read_text(encoding='utf-8')
  assert faults(relative, source) == []
  lines = source.count('\n')
  assert lines <= MAX_LINES, f'{relative} has {lines} lines: it is two rooms'


@pytest.mark.parametrize('relative, source', [
    ('config.py', 'from lmspt_jax.models.tokenizer import SpeechTokenizer'),
    ('models/codec.py', 'from lmspt_jax import optim'),
    ('models/codec.py', 'def f():\n  from lmspt_jax.losses import mel'),
    ('losses/mel.py', 'import lmspt_jax.training.loop'),
    ('optim.py', 'from orbax.checkpoint import v1'),
    ('data/sources.py', 'import jax.numpy as jnp'),
    ('data/sources.py', 'from lmspt_jax.audio.mel import mel_filters'),
    ('evaluation/wer.py', 'import torch'),
    ('convert/whisper.py', 'import pickle'),
    ('evaluation/wer.py', 'from lmspt_jax import Tokenizer'),
    ('training/loop.py', 'from lmspt_jax.cli import flags'),
])
def test_a_breach_is_seen(relative, source):
  assert len(faults(Path(relative), source)) == 1


def loaded_by(statement: str) -> set[str]:
  """Top-level modules that a fresh interpreter holds after `statement`."""
  out = subprocess.run([sys.executable, '-c', f'{statement}\nimport sys\nprint(*sys.modules)'], check=True,
                       capture_output=True, text=True, cwd=PACKAGE.parent)
  return {top(name) for name in out.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize('module', ['lmspt_jax', 'lmspt_jax.cli.main', 'lmspt_jax.cli.prepare', 'lmspt_jax.cli.flags',
                                    'lmspt_jax.cli.sweep', 'lmspt_jax.data.prepare', 'lmspt_jax.data.pipeline'])
def test_loads_without_jax(module):
  assert not loaded_by(f'import {module}') & {'jax', 'jaxlib', 'flax', 'torch', 'tensorflow'}


def test_what_a_fresh_interpreter_loads_is_seen():
  assert 'jax' in loaded_by('import lmspt_jax.models.tokenizer')
