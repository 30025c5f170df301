"""Safetensors in the layout of the authors' release: there and back, what is told from shapes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from _codec_fixture import SMALL, load_fixture
from _random_weights import random_weights
from test_codec import names_of, to_torch_layout

from lmspt_jax import Tokenizer
from lmspt_jax.cli.main import main
from lmspt_jax.config import ModelConfig, QuantizerConfig
from lmspt_jax.convert.release import release_name
from lmspt_jax.convert.release_file import METADATA, infer_config, read_release, write_release
from lmspt_jax.convert.release_file import ReleaseCheckpoint as Checkpoint
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.tokenizer import abstract_tokenizer

FSQ = QuantizerConfig(kind='fsq', fsq_levels=(4, 3, 3))
VARIANTS = {
    'release': SMALL, 'causal': dataclasses.replace(SMALL, causal=True),
    'shared encoder': dataclasses.replace(SMALL, shared_encoder=True),
    'no subtraction': dataclasses.replace(SMALL, subtract_semantic=False),
    'fsq': dataclasses.replace(SMALL, semantic=FSQ),
    'moving averages': dataclasses.replace(SMALL, semantic=dataclasses.replace(SMALL.semantic, kind='ema'))}
USAGE = {'quantizer.semantic_vocab_usage': (1, 64), 'quantizer.acoustic_vocab_usage': (3, 64)}


def checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
  rng = np.random.default_rng(seed)
  params, codebooks = abstract_tokenizer(config)[1:]
  usage = {'semantic_quantizer': rng.random((1, config.semantic.size), np.float32),
           'acoustic_quantizer': rng.random((3, 64), np.float32)}
  for quantizer in codebooks.get('semantic_quantizer', {}).get('quantizers', {}).values():
    for name in ('sums', 'mass'):  # not of a file
      quantizer.pop(name, None)
  return Checkpoint(config, random_weights(params, seed), random_weights(codebooks, seed), usage, 'CC0-1.0')


def released(path: Path, **changed: np.ndarray | None) -> dict[str, np.ndarray]:
  """Writes what the PyTorch reference would write; None takes a key out. Returns the tensors."""
  rng = np.random.default_rng(1)
  tensors = load_fixture()[1] | {key: rng.random(shape, np.float32) for key, shape in USAGE.items()}
  tensors = {key: value for key, value in (tensors | changed).items() if value is not None}
  safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
  return tensors


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_survives(variant, tmp_path):
  written = checkpoint(VARIANTS[variant])
  write_release(tmp_path / 'a.safetensors', written)
  read = read_release(tmp_path / 'a.safetensors')
  assert (read.config, read.license) == (written.config, 'CC0-1.0')
  assert names_of(read.params) == names_of(written.params)
  for tree in ('params', 'usage'):
    np.testing.assert_equal(getattr(read, tree), getattr(written, tree))
  if variant == 'moving averages':
    there, back = (c.codebooks['semantic_quantizer']['quantizers'][0] for c in (written, read))
    np.testing.assert_array_equal(back['codebook'], there['codebook'])
    np.testing.assert_array_equal(back['sums'] / back['mass'][:, None], there['codebook'])
  write_release(tmp_path / 'b.safetensors', read)
  assert (tmp_path / 'a.safetensors').read_bytes() == (tmp_path / 'b.safetensors').read_bytes()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a.safetensors', 'b.safetensors']


def test_a_file_of_the_release_comes_out_as_it_went_in(tmp_path):
  tensors = released(tmp_path / 'a.safetensors')
  read = read_release(tmp_path / 'a.safetensors')
  assert read.config == dataclasses.replace(
      SMALL, acoustic=dataclasses.replace(SMALL.acoustic, dropout=ModelConfig().acoustic.dropout))
  write_release(tmp_path / 'b.safetensors', read)
  out = safetensors.numpy.load_file(tmp_path / 'b.safetensors')
  assert out.keys() == tensors.keys()
  for key, value in tensors.items():
    assert out[key].tobytes() == value.tobytes() and out[key].shape == value.shape, key


@pytest.mark.parametrize('kept', ['semantic_encoder', 'acoustic_encoder'])
def test_a_shared_encoder_under_either_name(kept, tmp_path):
  """Of a module that stands at two places PyTorch's writer keeps one."""
  gone = ({'semantic_encoder', 'acoustic_encoder'} - {kept}).pop()
  tensors = released(tmp_path / 'a.safetensors', **{
      key: None for key in load_fixture()[1] if key.startswith(gone)})
  read = read_release(tmp_path / 'a.safetensors')
  assert read.config.shared_encoder and 'acoustic_encoder' not in read.params
  np.testing.assert_array_equal(read.params['semantic_encoder']['conv_in']['bias'], tensors[f'{kept}.block.0.bias'])


def test_names_of_causal_and_fsq_arrays():
  causal = names_of(abstract_tokenizer(VARIANTS['causal'])[1])
  keys = {release_name(name, VARIANTS['causal']) for name in causal}
  assert {'semantic_encoder.block.0.conv.weight_g', 'acoustic_encoder.block.1.block.4.conv.weight_v',
          'decoder.model.2.block.1.conv.bias', 'aux_decoder.model.1.block.2.block.3.conv.weight_v',
          'decoder.model.2.block.2.block.0.alpha', 'quantizer.rvq_rest.quantizers.0.in_proj.weight_v'} <= keys
  fsq = {release_name(name, VARIANTS['fsq']) for name in names_of(abstract_tokenizer(VARIANTS['fsq'])[1])}
  assert 'quantizer.rvq_first.in_proj.weight_g' in fsq and not any('rvq_first.quantizers' in key for key in fsq)


# ---------------------------------------------------------------- what shapes tell


@pytest.mark.parametrize('config', [ModelConfig(), ModelConfig(causal=True)], ids=['release', 'causal'])
def test_the_releases_config_from_its_shapes(config):
  tree = abstract_tokenizer(config)[1]
  shapes = {release_name(name, config): to_torch_layout(name, np.broadcast_to(np.float32(0), leaf.shape)).shape
            for name, leaf in zip(names_of(tree), _leaves(tree), strict=True)}
  assert infer_config(shapes, 'x') == config


def _leaves(tree):
  import jax
  return jax.tree.leaves(tree)


def test_an_fsq_needs_its_levels(tmp_path):
  path = tmp_path / 'a.safetensors'
  write_release(path, checkpoint(VARIANTS['fsq']))
  safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)  # without metadata
  with pytest.raises(LmsptError, match="an FSQ, whose levels can't be told"):
    read_release(path)
  assert read_release(path, VARIANTS['fsq']).config.semantic == FSQ


def test_a_config_that_is_not_the_files(tmp_path):
  released(tmp_path / 'a.safetensors')
  for config, text in ((dataclasses.replace(SMALL, latent_dim=64), 'misshaped: .* and [0-9]+ more$'),
                       (VARIANTS['causal'], 'missing: .*; unexpected: .*'),
                       (VARIANTS['shared encoder'], 'unexpected: acoustic_encoder')):
    with pytest.raises(LmsptError, match=text):
      read_release(tmp_path / 'a.safetensors', config)


# ---------------------------------------------------------------- what is refused

BIAS = 'decoder.model.1.block.1.bias'


@pytest.mark.parametrize('changed, text', [
    ({BIAS: None}, f'missing: {BIAS}$'), ({BIAS: np.zeros(3, np.float32)}, rf'misshaped: {BIAS} \(3,\)$'),
    ({'decoder.model.0.weight_g': np.zeros(32, np.float32)}, r'misshaped: decoder.model.0.weight_g \(32,\)$'),
    ({'decoder.extra': np.zeros(3, np.float32)}, 'unexpected: decoder.extra$'),
    ({BIAS: np.full(16, np.nan, np.float32)}, f'{BIAS} holds values that are not finite'),
    ({BIAS: np.zeros(16)}, f'{BIAS} is F64: release weights are F32 or F16$'),
    ({'decoder.model.0.weight_v': None}, "no tensor 'decoder.model.0.weight_v': not in the layout"),
    ({'aux_decoder.model.1.block.1.weight_v': np.zeros((16, 8, 14), np.float32)}, 'no sample rate at which'),
    ({'quantizer.rvq_rest.quantizers.0.codebook.weight': np.zeros(64, np.float32)}, r'has shape \[64\]')])
def test_one_line_says_what_is_wrong(changed, text, tmp_path):
  released(tmp_path / 'a.safetensors', **changed)
  with pytest.raises(LmsptError, match=text) as error:
    read_release(tmp_path / 'a.safetensors')
  assert str(error.value).startswith(f'{tmp_path / "a.safetensors"}: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('content', [
    b'', b'\x80\x02}q\x00.', b'\xff' * 64, struct.pack('<Q', 1 << 40) + b'{}', struct.pack('<Q', 2) + b'{}',
    struct.pack('<Q', 60) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:60]])
def test_what_is_no_such_file(content, tmp_path):
  (tmp_path / 'a.safetensors').write_bytes(content)
  with pytest.raises(LmsptError, match=r'cannot be read as safetensors|no tensor of an encoder'):
    read_release(tmp_path / 'a.safetensors')
  with pytest.raises(LmsptError, match='no such file'):
    read_release(tmp_path / 'b.safetensors')


@pytest.mark.parametrize('metadata, words', [
    ('{', 'not JSON'), ('[' * 100_000, 'not JSON'), ('[]', "has no 'model'"), ('{"model": {}}', "'license'"),
    ({'hops': 3}, 'unknown config field'), ({'latent_dim': 'a'}, 'latent_dim'),
    ({'encoder_strides': [2] * 5000}, 'give at most 16 numbers'), ({'decoder_rates': [2]}, 'model.decoder_rates')])
def test_metadata_that_is_no_config(metadata, words, tmp_path):
  text = metadata if isinstance(metadata, str) else json.dumps({'model': metadata, 'license': ''})
  tensors = released(tmp_path / 'a.safetensors')
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / 'a.safetensors',
                              {METADATA: text})
  with pytest.raises(LmsptError, match=words):
    read_release(tmp_path / 'a.safetensors')


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(LmsptError, match="can't be written"):
    write_release(tmp_path / 'absent' / 'a.safetensors', checkpoint(SMALL))


# ---------------------------------------------------------------- from the command line


def test_a_run_becomes_a_file_with_the_same_codes(tiny_run, tiny_tokenizer, speech_folder, tmp_path, capsys):
  path, audio = tmp_path / 'tiny.safetensors', speech_folder / 'audio' / 'asterisk-conf-invalid.flac'
  assert main(['convert', f'--from=run:{tiny_run}', f'--to=release:{path}']) == 0
  for model, out in ((tiny_run, tmp_path / 'run'), (path, tmp_path / 'file')):
    assert main(['encode', f'--model={model}', f'--out={out}', str(audio)]) == 0
  codes, again = (np.load(tmp_path / name / f'{audio.stem}.npz') for name in ('run', 'file'))
  np.testing.assert_array_equal(codes['ids'], again['ids'])
  assert len(np.unique(codes['ids'])) > 5
  capsys.readouterr()
  assert main(['info', str(path)]) == 0
  assert 'names no training data' in capsys.readouterr().out  # the run's, carried along
  usage = read_release(path).usage['acoustic_quantizer']
  assert usage.shape == (3, 16) and np.allclose(usage.sum(), 1)  # nothing counted: a fair share for each


def test_the_releases_own_file_is_a_model(tmp_path, capsys):
  released(tmp_path / 'lmspt.safetensors')
  model = Tokenizer.from_pretrained(tmp_path / 'lmspt.safetensors')
  assert (model.sample_rate, model.hop, model.codebook_sizes) == (24_000, 240, (64, 64, 64, 64))
  assert main(['info', str(tmp_path / 'lmspt.safetensors')]) == 0
  out = capsys.readouterr().out
  assert "authors' own weights are CC-BY-NC-4.0" in out and 'not named in the file' in out


@pytest.mark.parametrize('flags, text', [
    (['--from=run', '--to=release:a.safetensors'], '--from=run: use run:PATH or release:PATH or folder:PATH or'),
    (['--from=run:a', '--to=hub:b'], '--to=hub:b: use release:PATH or folder:PATH or hf:PATH'),
    (['--from=run:a', '--to=release:b'], 'ends in .safetensors'),
    (['--from=run:absent', '--to=release:b.safetensors'], 'absent: not a run'),
    (['--from=release:absent', '--to=release:b.safetensors'], 'ends in .safetensors')])
def test_conversions_that_cannot_be(flags, text, capsys, repo, monkeypatch):
  monkeypatch.chdir(repo)
  assert main(['convert', *flags]) == 1
  error = capsys.readouterr().err
  assert text in error and error.count('\n') == 1
