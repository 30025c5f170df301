"""Exported graphs, in both formats: the tokenizer's own codes and audio, of every variant, without the package."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import _codec_fixture
import jax
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import soundfile
from _random_weights import stirred_weights

from lmspt_jax import Tokenizer
from lmspt_jax.config import ExperimentConfig, ModelConfig, QuantizerConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.export.onnx import write_onnx
from lmspt_jax.export.stablehlo import write_stablehlo
from lmspt_jax.inference.codes import Codes
from lmspt_jax.models.folding import directions
from lmspt_jax.models.quantizers import nearest_codes
from lmspt_jax.models.tokenizer import abstract_tokenizer
from lmspt_jax.pretrained.model import TrainedModel

# An odd rate, so that the decoder comes out short; more codes than a byte holds.
BASE = dataclasses.replace(_codec_fixture.SMALL, dilations=(1, 3),
                           semantic=QuantizerConfig(codebook_size=512))
VARIANTS = {
    'release': BASE,
    'causal, shared encoder, moving averages': dataclasses.replace(
        BASE, causal=True, shared_encoder=True, semantic=dataclasses.replace(BASE.semantic, kind='ema')),
    'no subtraction, FSQ': dataclasses.replace(
        BASE, subtract_semantic=False, semantic=QuantizerConfig(kind='fsq', fsq_levels=(8, 5, 7, 2))),
    'causal, moving averages, FSQ': dataclasses.replace(
        BASE, causal=True, semantic=QuantizerConfig(kind='fsq', fsq_levels=(8, 8, 8)),
        acoustic=dataclasses.replace(BASE.acoustic, kind='ema'))}
FORMATS = {'stablehlo': write_stablehlo, 'onnx': write_onnx}


def stirred(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """(params, codebooks)."""
  return stirred_weights(abstract_tokenizer(config)[1:])


def call(folder: Path, name: str, array: np.ndarray) -> np.ndarray:
  """Runs the graph that is in the folder, whichever format it has."""
  path = folder / f'{name}.onnx'
  if path.exists():
    return onnxruntime.InferenceSession(path).run(None, {'audio' if name == 'encode' else 'ids': array})[0]
  graph = jax.export.deserialize(bytearray((folder / f'{name}.stablehlo').read_bytes()))
  return np.asarray(graph.call(safetensors.numpy.load_file(folder / f'{name}.safetensors'), array))


def whole(model: Tokenizer, ids_KT: np.ndarray) -> Codes:
  return Codes(ids_KT, ids_KT.shape[1] * model.hop, model.sample_rate, model.frame_rate)


@pytest.fixture(scope='module')
def release(tmp_path_factory) -> tuple[Tokenizer, dict[str, Path]]:
  """A small model of the release's kind, and a folder for each format."""
  params, codebooks = stirred(BASE)
  folders = {kind: tmp_path_factory.mktemp(kind) for kind in FORMATS}
  for kind, write in FORMATS.items():
    write(folders[kind], BASE, params, codebooks, resynthesis=True)
  return Tokenizer(TrainedModel(ExperimentConfig(model=BASE), params, codebooks)), folders


@pytest.mark.parametrize('variant', VARIANTS)
def test_codes_and_audio_are_the_tokenizers(variant, tmp_path):
  config = VARIANTS[variant]
  params, codebooks = stirred(config)
  model = Tokenizer(TrainedModel(ExperimentConfig(model=config), params, codebooks))
  speech = _codec_fixture.speech()[:, :9 * config.hop - 7]  # 3 recordings, not of whole frames
  codes = model.encode(list(speech), sample_rate=model.sample_rate)
  ids = np.stack([one.ids for one in codes])
  assert ids.shape == (3, 4, 9) and ids.max() > 255 and all(len(np.unique(ids[:, k])) > 8 for k in range(4))
  one_sample = model.encode(speech[0, 2000:2001], sample_rate=model.sample_rate).ids
  audio = np.stack([model.decode(whole(model, one)) for one in ids])
  resynthesis = np.stack([model.decode(whole(model, one), 'resynthesis') for one in ids])
  assert audio.std() > 0.01 and resynthesis.std() > 0.003
  for kind, write in FORMATS.items():
    folder = tmp_path / kind
    folder.mkdir()
    write(folder, config, params, codebooks, resynthesis=True)
    found = call(folder, 'encode', speech)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids, kind)
    np.testing.assert_array_equal(call(folder, 'encode', speech[:1, 2000:2001])[0], one_sample, kind)
    for name, expected in (('decode', audio), ('resynthesis', resynthesis)):
      found = call(folder, name, ids)
      assert (found.dtype, found.shape) == (np.float32, expected.shape), (kind, name)
      # StableHLO is the same program of another length: not even the last bits differ.
      np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if kind == 'onnx' else 0, err_msg=f'{kind} {name}')


@pytest.mark.parametrize('kind', FORMATS)
def test_fewer_codebooks(kind, release):
  model, folders = release
  ids = model.encode(_codec_fixture.speech()[1], sample_rate=model.sample_rate).ids[:, :5]
  semantic = call(folders[kind], 'decode', ids[None, :1])[0]
  np.testing.assert_allclose(semantic, model.decode(whole(model, ids), 'semantic'), rtol=0, atol=1e-5)
  two = call(folders[kind], 'decode', ids[None, :2])[0]
  np.testing.assert_allclose(two, model.decode(whole(model, ids[:2])), rtol=0, atol=1e-5)
  assert np.abs(two - semantic).max() > 1e-3
  np.testing.assert_array_equal(call(folders[kind], 'resynthesis', ids[None, :1]),
                                call(folders[kind], 'resynthesis', ids[None]))
  with pytest.raises((ValueError, onnxruntime.capi.onnxruntime_pybind11_state.Fail)):
    call(folders[kind], 'decode', np.zeros((1, 5, 3), np.int32))


def test_codes_nearer_to_each_other_than_float32_tells():
  """Pairs of codes of which a third of the latents has equal similarities in float32; float64 says which is nearer."""
  generator = np.random.default_rng(0)
  codes_SD = generator.standard_normal((64, 8)).astype(np.float32)
  codes_SD[1::2] = codes_SD[::2] + 3e-4 * generator.standard_normal((32, 8)).astype(np.float32)
  codes_SD = directions(codes_SD)
  latents_ND = codes_SD[generator.integers(0, 64, 4000)]
  latents_ND += (1e-4 * generator.standard_normal(latents_ND.shape)).astype(np.float32)
  similarity_NS = np.asarray(latents_ND, np.float64) @ np.asarray(codes_SD, np.float64).T
  expected_N = similarity_NS.argmax(1)
  two_N2 = np.sort(similarity_NS, axis=1)[:, -2:]
  assert np.mean(np.float32(two_N2[:, 0]) == np.float32(two_N2[:, 1])) > 0.3
  apart_N = two_N2[:, 1] - two_N2[:, 0] > 1e-10
  found_N = np.asarray(jax.jit(nearest_codes)(latents_ND, codes_SD))
  np.testing.assert_array_equal(found_N[apart_N], expected_N[apart_N])


@pytest.mark.parametrize('kind', FORMATS)
def test_equally_near_codes_are_the_lowest_index(kind, tmp_path):
  params, codebooks = stirred(BASE)
  for part in ('semantic_quantizer', 'acoustic_quantizer'):
    for quantizer in params[part]['quantizers'].values():
      half = len(quantizer['codebook']) // 2
      quantizer['codebook'] = np.tile(quantizer['codebook'][:half], (2, 1))
  FORMATS[kind](tmp_path, BASE, params, codebooks, resynthesis=False)
  ids = call(tmp_path, 'encode', _codec_fixture.speech()[:, :9 * BASE.hop])
  assert ids[:, 0].max() < 256 and 16 < ids[:, 1:].max() < 32
  assert not list(tmp_path.glob('resynthesis*')) and list(tmp_path.glob('decode*'))


# What a user of a format does not have.
ABSENT = {'stablehlo': ('lmspt_jax', 'flax'), 'onnx': ('lmspt_jax', 'flax', 'jax', 'jaxlib', 'onnx')}


@pytest.mark.parametrize('kind', FORMATS)
def test_the_lines_of_the_documentation_without_the_package(kind, release, repo, tmp_path):
  model, folders = release
  section = {'stablehlo': 'StableHLO', 'onnx': 'ONNX'}[kind]
  text = (repo / 'docs' / 'export.md').read_text()
  lines = re.search(rf'^## {section}\n.*?^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)[1]
  for path in folders[kind].iterdir():
    (tmp_path / path.name).symlink_to(path)
  audio = _codec_fixture.speech()[2, :5 * model.hop - 100]
  soundfile.write(tmp_path / 'speech.wav', audio, model.sample_rate, subtype='FLOAT')
  (tmp_path / 'program.py').write_text(
      f'import sys\nsys.modules.update(dict.fromkeys({ABSENT[kind]}))  # importing them raises ImportError\n{lines}\n'
      "import numpy\nnumpy.savez('found.npz', ids=ids, decoded=decoded)\n")
  done = subprocess.run([sys.executable, 'program.py'], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  codes = model.encode(audio, sample_rate=model.sample_rate)
  with np.load(tmp_path / 'found.npz') as found:
    np.testing.assert_array_equal(found['ids'][0], codes.ids)
    np.testing.assert_allclose(found['decoded'][0, :len(audio)], model.decode(codes), rtol=0, atol=1e-5)
  assert soundfile.info(tmp_path / 'decoded.wav').frames == len(audio)


def test_stablehlo_is_for_all_platforms(release):
  graph = jax.export.deserialize(bytearray((release[1]['stablehlo'] / 'decode.stablehlo').read_bytes()))
  assert graph.platforms == ('cpu', 'cuda', 'tpu')
  text = graph.mlir_module()
  assert text.count('"stablehlo.case"(%arg0)') >= 3  # by platform, in each upsampling
  assert set(re.findall(r'convolution.*lhs_dilate = \[(\d+)', text)) == {'5', '6', '8'}


@pytest.mark.parametrize('kind', FORMATS)
def test_equal_models_are_equal_files_that_name_no_place(kind, release, tmp_path):
  model, folders = release
  files = FORMATS[kind](tmp_path, model.config.model, model.params, model.codebooks, resynthesis=True)
  assert sorted(path.name for path in files) == sorted(path.name for path in folders[kind].iterdir())
  for path in files:
    content = path.read_bytes()
    assert content == (folders[kind] / path.name).read_bytes(), path.name
    assert b'.py' not in content


def test_faults_are_one_line(release, tmp_path, monkeypatch):
  model, _ = release
  with pytest.raises(LmsptError, match=r"absent/encode.onnx: can't be written \(No such file"):
    write_onnx(tmp_path / 'absent', model.config.model, model.params, model.codebooks, resynthesis=False)
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(LmsptError, match=r"pip install 'lmspt_jax\[onnx\]'") as error:
    write_onnx(tmp_path, model.config.model, model.params, model.codebooks, resynthesis=False)
  assert '\n' not in str(error.value)
