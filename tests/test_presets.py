"""Every file in configs/ is a run that could start: it loads, and its whole train step lowers for eight TPU chips.

Nothing is compiled and no weight is allocated: states, teacher and batch are shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from lmspt_jax.cli.flags import load
from lmspt_jax.config import CorpusConfig, DiscriminatorConfig, ExperimentConfig, QuirksConfig, from_dict, to_dict
from lmspt_jax.models.whisper import WHISPER_SIZES, WhisperDims, WhisperEncoder, abstract_params
from lmspt_jax.sharding import AXES, Placement
from lmspt_jax.training.compiled import trace_step
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import stored_params

PRESETS = sorted(path.stem for path in (Path(__file__).resolve().parent.parent / 'configs').glob('*.py'))
FRAME_RATES = {'demo': 25, 'lmspt_12_5hz': 12.5, 'lmspt_12_5hz_causal': 12.5, 'lmspt_12_5hz_fsq': 12.5,
               'lmspt_25hz': 25, 'lmspt_6_25hz': 6.25}
SMALL_DISCRIMINATOR = DiscriminatorConfig(periods=(2,), fft_sizes=(512,), band_edges=(0.0, 1.0))
MESH = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(autouse=True)
def without_garbage_collection():
  """A trace is a million small objects that all stay: looking for dead ones among them takes a third of the time."""
  gc.disable()
  yield
  gc.enable()
  gc.collect()


@pytest.fixture
def preset(repo):
  """(name, argument='') -> config."""
  return lambda name, argument='': load(str(repo / 'configs' / f'{name}.py') + (f':{argument}' if argument else ''))


def teacher_dims(config: ExperimentConfig) -> WhisperDims:
  """Sizes of the checkpoint that a config names: 'package:tiny.en', 'hf://openai/whisper-large-v3'."""
  return WHISPER_SIZES[config.teacher.checkpoint.replace(':', '/').rpartition('/')[2].removeprefix('whisper-')]


@functools.cache  # the last test wants the shapes of one again
def experiment_of(config: ExperimentConfig, dims: WhisperDims):
  """(experiment, abstract state)."""
  experiment = Experiment(config, dims)
  return experiment, experiment.abstract_state()


def count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_preset_is_listed_here():
  assert PRESETS == sorted(FRAME_RATES)


@pytest.mark.parametrize('name', PRESETS)
def test_frame_rate_and_names(preset, name):
  config = preset(name)
  assert config.name == name
  assert config.model.frame_rate == FRAME_RATES[name]
  assert config.quirks == QuirksConfig.named('fixed')
  assert config.crop_samples % config.model.hop == 0
  assert from_dict(ExperimentConfig, to_dict(config)) == config  # what the workdir holds is the config


def test_release_turns_the_quirks_on(preset):
  fixed, release = preset('lmspt_12_5hz'), preset('lmspt_12_5hz', 'release')
  assert all(dataclasses.astuple(release.quirks))
  assert release.teacher.window == 'full' and fixed.teacher.window == 'crop'
  assert (release.compute.dtype, release.train.ema_decay) == ('float32', 0)  # as the authors trained
  assert dataclasses.replace(release, **{
      part: getattr(fixed, part) for part in ('quirks', 'teacher', 'compute', 'train')}) == fixed


def test_the_demo_takes_other_data(preset):
  for argument, uri in (((), 'package:speech_sample'), (('folder:a:b',), 'folder:a:b')):
    data = preset('demo', *argument).data
    assert data.train == (CorpusConfig(uri),) and data.held_out == uri


@pytest.mark.parametrize('name', PRESETS)
def test_the_whole_step_lowers_for_eight_chips(preset, name):
  config, release = preset(name), preset('lmspt_12_5hz')
  dims = teacher_dims(config)
  # Most of the time goes into tracing what the presets share with the release: there alone it is whole.
  if config != release and config.teacher == release.teacher:
    dims = dataclasses.replace(dims, audio_layers=2)
  if config != release and config.discriminator == release.discriminator:
    config = dataclasses.replace(config, discriminator=SMALL_DISCRIMINATOR)
  experiment, state = experiment_of(config, dims)
  placement = Placement(config, MESH)
  shardings = placement.shardings(state)
  teacher = jax.eval_shape(lambda params: stored_params(params, config.compute), abstract_params(WhisperEncoder, dims))
  with jax.sharding.use_abstract_mesh(MESH):
    traced = trace_step(make_train_step(experiment, shardings), config, placement, state, shardings, teacher)

  after, metrics = traced.out_info
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
  assert jax.tree.all(same)  # the next step takes what this one returns
  assert {f'loss/{key}' for key in ('generator', 'discriminator', 'mel', 'distillation')} <= metrics.keys()
  assert all(total.shape == weight.shape == () for total, weight in metrics.values())

  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert '"data"=2, "fsdp"=2, "tensor"=2' in text and '{"data", "fsdp"}' in text and '{"fsdp", "tensor"}' in text
  assert ('bf16' in text) == (config.compute.dtype == 'bfloat16')

  # Split over four, a chip holds about a quarter of the state: what can't be split is small.
  whole, here = count(state), sum(
      math.prod(s.shard_shape(x.shape)) for x, s in zip(*map(jax.tree.leaves, (state, shardings)), strict=True))
  assert whole / 4 <= here < 0.28 * whole


def test_12_5hz_is_the_releases_size(preset):
  config = preset('lmspt_12_5hz')
  state = experiment_of(config, teacher_dims(config))[1]
  assert count(state.generator['tokenizer']) == 74_652_220
  assert round(count(state.discriminator) / 1e6, 2) == 42.52
  assert count(state.generator['distillation']) == 0
