"""`lmspt convert` of a Whisper to a Hugging Face folder. That `transformers` loads it is in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from _small_tower import write_tower
from _whisper_arrays import named_arrays

from lmspt_jax.cli.main import main
from lmspt_jax.convert import whisper_folder
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.convert.whisper_folder import write_whisper_folder
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES, foreign_layout, foreign_name
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.whisper import Whisper, WhisperDims, abstract_params, sinusoids

BOTH = ('encoder', 'decoder')
SMALL = WhisperDims(
    n_mels=8, width=16, heads=2, audio_layers=2, text_layers=1, vocab_size=40, audio_context=10, text_context=12)


@pytest.fixture(scope='module')
def tiny():
  return load_whisper('package:tiny.en', BOTH)


def small_folder(folder: Path, scale: float = 1.0) -> Path:
  """A small Whisper, float32, in one file, written by safetensors itself; its values are no float16's."""
  rng = np.random.default_rng(0)
  draw = lambda spec: np.float32(scale) * rng.standard_normal(spec.shape).astype(np.float32)
  tensors = {foreign_name('encoder/positions', HUGGING_FACE_NAMES): np.array(sinusoids(10, 16))}
  for path, value in named_arrays(jax.tree.map(draw, abstract_params(Whisper, SMALL))):
    tensors[foreign_name(path, HUGGING_FACE_NAMES)] = np.ascontiguousarray(foreign_layout(path, value))
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({
      'model_type': 'whisper', 'num_mel_bins': 8, 'd_model': 16, 'encoder_layers': 2, 'decoder_layers': 1,
      'vocab_size': 40, 'max_source_positions': 10, 'max_target_positions': 12, 'encoder_attention_heads': 2,
      'decoder_attention_heads': 2}))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  return folder


def test_real_weights_there_and_back(tiny, tmp_path, capsys):
  folder = tmp_path / 'hf'
  assert main(['convert', '--from=package:tiny.en', f'--to=hf:{folder}']) == 0
  assert capsys.readouterr().out == f'wrote {folder}\n'
  found = load_whisper(f'hf:{folder}', BOTH)
  assert found.dims == tiny.dims
  jax.tree.map(np.testing.assert_array_equal, found.params, tiny.params)
  assert found.tokenizer_path.read_bytes() == tiny.tokenizer_path.read_bytes()
  config = json.loads((folder / 'config.json').read_text())
  published = {  # openai/whisper-tiny.en
      'bos_token_id': 50256, 'eos_token_id': 50256, 'pad_token_id': 50256, 'decoder_start_token_id': 50257,
      'begin_suppress_tokens': [220, 50256], 'encoder_ffn_dim': 1536, 'decoder_ffn_dim': 1536, 'num_mel_bins': 80,
      'max_target_positions': 448, 'vocab_size': 51864}
  assert {name: config[name] for name in published} == published
  with safetensors.safe_open(folder / 'model.safetensors', 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}  # without it transformers refuses a file
    np.testing.assert_array_equal(file.get_tensor('model.encoder.embed_positions.weight'), sinusoids(1500, 384))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['hf']  # nothing is left beside it


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_narrow_weights(tmp_path, dtype):
  source, folder = small_folder(tmp_path / 'source'), tmp_path / 'narrow'
  assert main(['convert', f'--from=hf:{source}', f'--to=hf:{folder}', f'--dtype={dtype}']) == 0
  narrow = {'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}[dtype]
  expected = safetensors.numpy.load_file(source / 'model.safetensors')
  found = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert found.keys() == {f'model.{name}' for name in expected}
  for name, value in expected.items():
    assert found[f'model.{name}'].dtype == narrow
    np.testing.assert_array_equal(found[f'model.{name}'], value.astype(narrow))
  assert json.loads((folder / 'config.json').read_text())['torch_dtype'] == dtype
  assert not (folder / 'tokenizer.json').exists()
  assert load_whisper(f'hf:{folder}').dims == SMALL


def _line(capsys, *arguments: str) -> str:
  assert main(['convert', *arguments]) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  return error.removeprefix('lmspt: error: ').rstrip()


def test_what_can_not_be(tmp_path, capsys, tiny_run):
  source, target = small_folder(tmp_path / 'source'), f'--to=hf:{tmp_path / "new"}'
  whisper = f'--from=hf:{source}'
  release = f'--to=release:{tmp_path / "x.safetensors"}'
  assert _line(capsys, '--from=openai:a.pt', release).endswith('a Whisper (openai:) is written to hf:PATH')
  assert _line(capsys, f'--from=run:{tiny_run}', target).endswith(
      'a tokenizer (run:) is written to release:PATH or folder:PATH')
  assert '--to=openai:a.pt: use ' in _line(capsys, whisper, '--to=openai:a.pt')
  assert '--from=hf: use ' in _line(capsys, '--from=hf', target)
  assert _line(capsys, whisper, '--to=hf://org/name').startswith('--to=hf://org/name: nothing is written to the hub')
  assert '--dtype=float16: a tokenizer' in _line(capsys, f'--from=run:{tiny_run}', release, '--dtype=float16')
  assert '--model-config=a.py: a Whisper' in _line(capsys, whisper, target, '--model-config=a.py')
  tower = write_tower(tmp_path / 'tower')
  assert f'hf:{tower}: the audio tower' in _line(capsys, f'--from=hf:{tower}', target)
  assert _line(capsys, '--from=openai:absent.pt', target) == 'absent.pt: no such file; check the path'
  assert f'{source}: is there already' in _line(capsys, whisper, f'--to=hf:{source}')
  (tmp_path / 'file').touch()
  assert "can't be written (Not a directory)" in _line(capsys, whisper, f'--to=hf:{tmp_path / "file" / "new"}')
  assert not (tmp_path / 'new').exists()


def test_all_or_nothing(tmp_path, monkeypatch):
  """What float16 can't hold is said; then, as after any fault, nothing is there."""
  source = small_folder(tmp_path / 'source', scale=1e5)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(LmsptError, match='has values that float16 cannot hold'):
    write_whisper_folder(f'hf:{source}', tmp_path / 'new', 'float16')
  assert sorted(tmp_path.iterdir()) == before
  monkeypatch.setattr(whisper_folder.shutil, 'copyfile', lambda *_: (_ for _ in ()).throw(OSError(28, 'No room')))
  (source / 'tokenizer.json').write_text('{}')
  with pytest.raises(LmsptError, match=r"new: can't be written \(No room\)"):
    write_whisper_folder(f'hf:{source}', tmp_path / 'new')
  assert sorted(tmp_path.iterdir()) == before
  (tmp_path / 'new').mkdir()  # an empty folder will do
  monkeypatch.undo()
  write_whisper_folder(f'hf:{source}', tmp_path / 'new')
  assert load_whisper(f'hf:{tmp_path / "new"}', BOTH).dims == SMALL
