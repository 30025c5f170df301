"""Training that starts from another model, with parts of it frozen. Real speech, an untrained teacher of one layer."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import soundfile
from make_golden_step import DIMS, TINY, fast, replaced, speech_batches, tiny_teacher, write_teacher

from lmspt_jax import LmsptError, Tokenizer
from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.cli.main import main
from lmspt_jax.config import InitConfig, to_dict
from lmspt_jax.pretrained.loading import load
from lmspt_jax.sharding import Placement, make_mesh
from lmspt_jax.training.fine_tuning import started_from
from lmspt_jax.training.frozen import Frozen
from lmspt_jax.training.loop import train
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step

# One stride, one mel scale, no spectra: it is mostly compiled.
CONFIG = replaced(
    TINY, data__batch_size=2, data__crop_seconds=0.2, discriminator__fft_sizes=(), loss__mel_bins=(20,),
    loss__mel_windows=(256,), model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,))


def flat(tree: Any) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(a: Any, b: Any) -> None:
  a, b = flat(a), flat(b)
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.fixture(scope='module')
def trained():
  """The state after three steps of CONFIG."""
  experiment = Experiment(CONFIG, DIMS)
  state, step = fast(experiment.init)(), fast(make_train_step(experiment))
  for batch in speech_batches(CONFIG, 3):
    state, _ = step(state, tiny_teacher(), batch)
  return state


@pytest.fixture(scope='module')
def run(trained, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('run')
  store = CheckpointStore(workdir)
  store.save(3, vars(trained), {'config': to_dict(CONFIG), 'teacher_id': 'teacher'})
  store.close()
  return workdir


@functools.cache
def fresh_state(config):
  return fast(Experiment(config, DIMS).init)()


def start(**changes: Any):
  """(fresh state, the state that training starts from)."""
  config = replaced(CONFIG, **changes).check()
  experiment, mesh = Experiment(config, DIMS), make_mesh(config, jax.devices()[:1])
  shardings = Placement(config, mesh).shardings(experiment.abstract_state())
  fresh = fresh_state(dataclasses.replace(config, init=InitConfig()))
  return fresh, started_from(config, experiment, jax.device_put(fresh, shardings), shardings)


def refuse(words: str, **changes: Any) -> None:
  """It ends, before anything is computed, with one line."""
  config = replaced(CONFIG, **changes).check()
  experiment = Experiment(config, DIMS)
  shardings = Placement(config, make_mesh(config, jax.devices()[:1])).shardings(experiment.abstract_state())
  with pytest.raises(LmsptError, match=words) as error:
    started_from(config, experiment, experiment.abstract_state(), shardings)
  assert '\n' not in str(error.value)


# ---------------------------------------------------------------- starting from another model


def test_from_a_runs_average(run, trained):
  fresh, state = start(init__model=str(run))
  assert_equal(state.generator['tokenizer'], trained.average['params'])
  assert_equal(state.codebooks, trained.average['codebooks'])
  assert_equal(state.average, trained.average)
  for part in ('discriminator', 'generator_opt', 'discriminator_opt', 'step'):
    assert_equal(getattr(state, part), getattr(fresh, part))


def test_from_a_runs_last_step_with_all_it_had(run, trained):
  _, state = start(init__model=str(run), init__weights='last', init__discriminators=True, init__optimizers=True)
  assert_equal(state.generator, trained.generator)
  assert_equal(state.discriminator, trained.discriminator)
  for part in ('generator_opt', 'discriminator_opt'):
    ours, theirs = getattr(state, part), getattr(trained, part)
    assert_equal(optax.tree.get(ours, 'mu'), optax.tree.get(theirs, 'mu'))
    assert_equal(optax.tree.get(ours, 'nu'), optax.tree.get(theirs, 'nu'))
    counts = {path[-1].tuple_name: int(count) for path, count in optax.tree.get_all_with_path(ours, 'count')}
    assert counts == {'ScaleByAdamState': 3, 'ScaleByScheduleState': 0}  # the schedule begins anew
  assert int(state.step) == 0
  buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(buffers)) == len(buffers), 'the train step donates them, each once'


def test_the_discriminators_alone(run, trained):
  fresh, state = start(init__model=str(run), init__discriminators=True)
  assert_equal(state.discriminator, trained.discriminator)
  assert_equal(state.generator['tokenizer'], trained.average['params'])
  assert_equal(state.discriminator_opt, fresh.discriminator_opt)


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_from_an_export(kind, run, tmp_path):
  folder = tmp_path / 'export'
  assert main(['export', f'--model={run}', '--format=safetensors', f'--out={folder}']) == 0
  model = folder if kind == 'folder' else folder / 'model.safetensors'
  _, state = start(init__model=str(model))
  assert_equal(state.generator['tokenizer'], load(run).params)
  refuse(f'init.discriminators = True: {re.escape(str(model))}: not a run', init__model=str(model),
         init__discriminators=True)


def test_other_widths_are_listed(run, tmp_path):
  refuse(r'init.model = .*: model.encoder_channels: 4 there, 8 now, model.latent_dim: 16 there, 32 now, '
         r'tokenizer/\S+ \[.+?\] there, \[.+?\] now.* and \d+ more; use its widths', init__model=str(run),
         model__encoder_channels=8, model__latent_dim=32)
  refuse(r'discriminator/\S*/1/\S* absent there, \[.*\] now', init__model=str(run), init__discriminators=True,
         discriminator__periods=(3, 5))
  refuse('no such model', init__model=str(tmp_path / 'absent'))


def test_what_shapes_do_not_tell_is_said(run, capsys):
  start(init__model=str(run), model__subtract_semantic=False, model__acoustic__dropout=0.25)
  out = capsys.readouterr().out
  assert 'trained with another subtract_semantic' in out and 'dropout' not in out


@pytest.mark.parametrize('changes, words', [
    ({'init__optimizers': True}, 'init.optimizers = True: give init.model'),
    ({'init__model': 'a', 'init__optimizers': True}, 'needs init.discriminators=true and init.weights'),
    ({'init__model': 'a', 'init__weights': 'best'}, "init.weights = 'best'"),
    ({'train__freeze': '('}, r"train.freeze = '\(': no regular expression")])
def test_settings_that_cannot_be(changes, words):
  with pytest.raises(LmsptError, match=words):
    replaced(CONFIG, **changes).check()


# ---------------------------------------------------------------- frozen parts


def test_frozen_arrays_stay_to_the_bit():
  """With all on that changes arrays: weight decay, revival, averages; codes by moving average and by gradient."""
  config = replaced(
      CONFIG, train__freeze='semantic_|acoustic_quantizer/quantizers/1/|discriminators/0/', model__semantic__kind='ema',
      model__semantic__revive_every=1, model__semantic__revive_below=1.5, model__acoustic__revive_every=1,
      model__acoustic__revive_below=1.5, discriminator__periods=(3, 5)).check()
  experiment = Experiment(config, DIMS)
  first = fast(experiment.init)()
  step, state = fast(make_train_step(experiment)), first
  for batch in speech_batches(config, 2):
    state, _ = step(state, tiny_teacher(), batch)
  frozen, moved = re.compile(config.train.freeze), []
  before = {part: getattr(first, part) for part in ('generator', 'codebooks', 'discriminator', 'average')}
  now = flat({part: getattr(state, part) for part in before})
  for name, value in flat(before).items():
    if frozen.search(name):
      np.testing.assert_array_equal(now[name], value, err_msg=name)
    elif not np.array_equal(now[name], value):
      moved.append(name)
  for words in ('generator/tokenizer/decoder', 'acoustic_quantizer/quantizers/0/codebook', 'discriminators/1',
                'average/params/decoder', 'resynthesis_decoder'):
    assert any(words in name for name in moved), words
  held = [name for name in now if frozen.search(name) and name.endswith('codebook')]
  assert len(held) == 4, held  # one of each kind, and their averages


def test_an_expression_that_finds_nothing(trained):
  with pytest.raises(LmsptError, match=r"train.freeze = 'encoders': is found in no path of generator"):
    Frozen('encoders').check(trained)
  Frozen('').check(trained)


def test_fine_tuned(run, speech_folder, tmp_path, monkeypatch):
  """The semantic side is frozen: its codes stay, the sound changes; and the run goes on like any other."""
  monkeypatch.setattr('lmspt_jax.training.loop.compile_step', lambda lowered, *_: lowered.compile(
      {'xla_backend_optimization_level': 0}))
  config = replaced(
      CONFIG, init__model=str(run), train__freeze='semantic_', train__num_steps=4, train__checkpoint_every=2,
      teacher__checkpoint=write_teacher(tmp_path / 'teacher'), generator_optimizer__learning_rate=1e-2).check()
  train(config, tmp_path / 'tuned')
  before, after = Tokenizer.from_pretrained(run), Tokenizer.from_pretrained(tmp_path / 'tuned')
  audio, rate = soundfile.read(speech_folder / 'audio' / 'asterisk-conf-invalid.flac', dtype='float32')
  codes, again = before.encode(audio, sample_rate=rate), after.encode(audio, sample_rate=rate)
  np.testing.assert_array_equal(codes.ids[0], again.ids[0])
  assert len(np.unique(codes.ids[0])) > 3 and (codes.ids[1:] != again.ids[1:]).any()
  assert np.abs(before.decode(codes) - after.decode(dataclasses.replace(codes, model_hash=''))).max() > 1e-4
  train(config, tmp_path / 'tuned')  # trained to the end: nothing to do, and nothing is started anew
  assert Tokenizer.from_pretrained(tmp_path / 'tuned').model_hash == after.model_hash
