"""Notebooks: valid, and their cells run from top to bottom on a tiny model."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest

import lmspt_jax
from lmspt_jax.cli.main import main
from lmspt_jax.data.sources import open_source

FOLDER = Path(__file__).resolve().parent.parent / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


def code_cells(path):
  """(id, tags, source) of every code cell."""
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [(c['id'], c['metadata'].get('tags', []), ''.join(c['source'])) for c in cells if c['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_is_a_valid_notebook(path):
  notebook = json.loads(path.read_text(encoding='utf-8'))
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(set(ids)) == len(ids)  # first: validation would mend it
  nbformat.validate(notebook)


@pytest.fixture
def jupyter(monkeypatch):
  """Stand-ins for Jupyter's players and for processes: (sounds to play, verbs run)."""
  monkeypatch.setenv('MPLBACKEND', 'Agg')
  players, verbs = [], []

  class Audio:
    def __init__(self, data, rate=None):
      assert isinstance(data, str) == (rate is None) and (rate is not None or Path(data).is_file())
      players.append((data, rate))

  module = types.ModuleType('IPython.display')
  module.Audio, module.display = Audio, lambda player: None
  monkeypatch.setitem(sys.modules, 'IPython.display', module)

  def run(argv, **kwargs):  # here, without starting Python and JAX three times more
    assert argv[:3] == [sys.executable, '-m', 'lmspt_jax'] and kwargs == {'capture_output': True, 'text': True}
    verbs.append(argv[3])
    return subprocess.CompletedProcess(argv, main(argv[3:]), '', '')

  import matplotlib.font_manager  # noqa: F401  (starts a process of its own, once)
  monkeypatch.setattr(subprocess, 'run', run)
  return players, verbs


def test_quickstart_runs(jupyter, monkeypatch, tiny_run, tmp_path, capsys):
  players, verbs = jupyter
  monkeypatch.chdir(FOLDER)  # where Jupyter starts a notebook
  namespace = {}
  for name, tags, source in code_cells(FOLDER / 'quickstart.ipynb'):
    exec(compile(source, f'quickstart.ipynb, cell {name}', 'exec'), namespace)  # noqa: S102
    if 'parameters' in tags:
      assert os.path.abspath(namespace['MODEL']) == str(FOLDER.parent / 'runs' / 'demo' / 'run'), 'of make demo'
      audio = Path(namespace['AUDIO'])
      assert audio.is_file()
      held_out = open_source('package:speech_sample', 'valid')
      assert audio.stem in {held_out[i].id for i in range(len(held_out))}, 'said to be held out'
      namespace |= {'MODEL': str(tiny_run), 'OUT': str(tmp_path)}

  printed = capsys.readouterr().out
  assert 'made above: True' in printed
  assert verbs == ['info', 'encode', 'decode']
  rates = [rate for _, rate in players]
  assert rates == [16_000, 16_000, 24_000, 24_000, 16_000, None]
  assert all(np.isfinite(data).all() and np.abs(data).max() > 1e-4 for data, rate in players if rate)
  codes = namespace['codes']
  assert type(codes) is lmspt_jax.Codes
  original = namespace['audio'].shape[-1]
  assert [data.shape[-1] for data, rate in players if rate] == [original] * 2 + [codes.num_samples] * 2 + [original]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'asterisk-speed-dial-empty.npz', 'first_second.npz', 'first_second.wav']
