"""The train step and its checkpoints on eight devices, on meshes of every kind, against one device; and the rules.

XLA decides how many devices the host has before jax starts, so `measure` runs in a process of its own:

    PYTHONPATH=tests python tests/runs/test_sharding.py OUT
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _small_tower import TOWER, tower_params
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from make_golden_step import DIMS, TINY, fast, replaced, speech_batches, tiny_teacher

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.config import ExperimentConfig, MeshConfig, OptimizerConfig
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.errors import LmsptError
from lmspt_jax.sharding import AXES, Placement, make_mesh, parameter_table, shard_batch
from lmspt_jax.training import compiled, setup
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import FrozenTeacher, stored_params

STEADY = OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4, warmup_steps=0)
# Whatever depends on the whole batch is on: usage, perplexity, moving averages, revival, dropout.
CONFIG = replaced(
    TINY, data__batch_size=8, data__crop_seconds=0.2, discriminator__fft_sizes=(), loss__mel_bins=(20,),
    loss__mel_windows=(256,), model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,), model__acoustic__kind='ema',
    # What is never drawn is dead after ten steps, by a wide margin, and revived once.
    model__semantic__revive_every=10, model__semantic__revive_below=0.02, model__semantic__usage_decay=0.5,
    model__acoustic__revive_every=10, model__acoustic__revive_below=0.02, model__acoustic__usage_decay=0.5,
    # Rates of a long training: at TINY's, twenty steps are a chaotic system, in which the last bit decides a code.
    generator_optimizer=STEADY, discriminator_optimizer=STEADY)
MESHES = {'8x1x1': MeshConfig(8, 1, 1), '4x2x1': MeshConfig(4, 2, 1), '2x2x2': MeshConfig(2, 2, 2),
          '1x8x1': MeshConfig(1, 8, 1)}
# The same step in less memory, and in bfloat16 on two meshes. None of these is a mesh of its own.
VARIANTS = {
    '2x1x2 in two parts, recomputed': ('2x1x2', dict(
        compute__accumulation=2, compute__remat_codec='block', compute__remat_discriminators='block',
        compute__remat_teacher='block')),
    '1x1x1 bfloat16': ('1x1x1', dict(compute__dtype='bfloat16')),
    '2x2x2 bfloat16': ('2x2x2', dict(compute__dtype='bfloat16'))}
STEPS = 20


# ---------------------------------------------------------------- in the process with eight devices


def measure(out: Path) -> None:
  """Writes what the tests below judge: figures.json, and arrays.npz by run and path."""
  assert jax.device_count() == 8
  gc.disable()  # a third of the time of tracing
  figures, arrays = {}, {}
  batches = speech_batches(CONFIG, STEPS)
  for batch in batches:  # padding, so that the devices' shares of real audio differ
    batch['num_samples'][-1] //= 4
    batch['audio'][-1, batch['num_samples'][-1]:] = 0

  def on(sizes: str, **changes) -> tuple[ExperimentConfig, Placement]:
    config = replaced(CONFIG, mesh=MeshConfig(*map(int, sizes.split('x'))), **changes)
    count = math.prod(dataclasses.astuple(config.mesh)[:3])
    return config, Placement(config, make_mesh(config, jax.devices()[:count]))

  runs = {'1x1x1': on('1x1x1'), **{name: on(name) for name in MESHES},
          **{name: on(sizes, **changes) for name, (sizes, changes) in VARIANTS.items()}}
  experiments = {name: Experiment(config, DIMS) for name, (config, _) in runs.items()}
  abstract = experiments['1x1x1'].abstract_state()
  shardings = {name: placement.shardings(abstract) for name, (_, placement) in runs.items()}

  init = lambda name: _host(fast(experiments[name].init, out_shardings=shardings[name])())
  start, split = init('1x1x1'), init('2x2x2')
  figures['init_error'] = max(
      float(np.max(np.abs(x - y), initial=0)) for x, y in zip(*map(jax.tree.leaves, (start, split)), strict=True))
  with jax.set_mesh(runs['1x1x1'][1].mesh):  # codebooks where the latents are, as in training
    start = _host(setup.fresh_state(experiments['1x1x1'], shardings['1x1x1'], runs['1x1x1'][1].mesh,
                                    Mixture(CONFIG.data)))
  arrays |= {f'start/{path}': x for path, x in _by_path(start).items()}
  after_one = {}
  encode = fast(lambda params, codebooks, x: experiments['1x1x1'].tokenizer(params, codebooks).encode(x))
  for name, (_, placement) in runs.items():
    run = _stepper(experiments[name], placement, shardings[name])
    state = jax.device_put(start, shardings[name])
    for step, batch in enumerate(batches):
      state, figures[f'{name}/{step}'] = run(state, batch)
      if step == 0:
        after_one[name] = _host(state)
        arrays |= {f'{name}/0/{path}': x for path, x in _by_path(after_one[name]).items()}
    figures[f'{name}/shards'] = {
        path: {'whole': x.shape, 'parts': [s.data.shape for s in x.addressable_shards],
               'bytes': x.addressable_shards[0].data.nbytes} for path, x in _by_path(state).items()}
    exported = experiments[name].exported(_host(state))
    arrays[f'{name}/codes'] = np.asarray(encode(exported['params'], exported['codebooks'], batches[0]['audio']))
    if 'bfloat16' in name:  # of the same parameters
      start_codes = fast(lambda params, codebooks, x, experiment=experiments[name]: experiment.tokenizer(
          params, codebooks).encode(x))
      with jax.set_mesh(placement.mesh):
        first = experiments[name].exported(jax.device_put(start, shardings[name]))
        audio = shard_batch(batches[0], placement.mesh, len(batches[0]['audio']))['audio']
        arrays[f'{name}/start_codes'] = np.asarray(start_codes(first['params'], first['codebooks'], audio))
  # A teacher of the other family, the same audio: what its gradient does to it.
  tower = FrozenTeacher(TOWER, 16_000, 'crop')
  reach = fast(jax.grad(lambda audio, params: jnp.sum(jnp.square(tower.features(params, audio)))))
  for name in ('1x1x1', '4x2x1', '2x2x2'):
    placement = runs[name][1]
    with jax.set_mesh(placement.mesh):
      params = jax.device_put(tower_params(), placement.teacher(tower_params()))
      audio = shard_batch(batches[0], placement.mesh, len(batches[0]['audio']))['audio']
      arrays[f'{name}/tower'] = np.asarray(reach(audio, params))
  figures['table'] = parameter_table(runs['2x2x2'][1].table(abstract))

  store = CheckpointStore(out)
  store.save(1, vars(jax.device_put(after_one['8x1x1'], shardings['8x1x1'])), {})
  store.wait()
  wanted = compiled.placed(vars(abstract), vars(shardings['2x2x2']))
  restored = TrainState(**store.restore(1, wanted)[0])
  store.close()
  figures['restored_differs'] = _differences(after_one['8x1x1'], _host(restored))
  figures['restored_elsewhere'] = [
      path for (path, x), s in zip(_by_path(restored).items(), jax.tree.leaves(wanted), strict=True)
      if x.sharding != s.sharding]
  run = _stepper(experiments['2x2x2'], runs['2x2x2'][1], shardings['2x2x2'])
  _, figures['restored/1'] = run(restored, batches[1])
  (out / 'figures.json').write_text(json.dumps(figures))
  np.savez(out / 'arrays.npz', **arrays)


def _stepper(experiment: Experiment, placement: Placement, shardings: TrainState):
  """(state, batch) -> (state, metrics), compiled as the training loop does."""
  train_step = fast(make_train_step(experiment, shardings), donate_argnums=0, out_shardings=(shardings, None))
  teacher = stored_params(tiny_teacher(), experiment.config.compute)

  def run(state, batch):
    with jax.set_mesh(placement.mesh):
      params = jax.device_put(teacher, placement.teacher(teacher))
      state, found = train_step(state, params, shard_batch(batch, placement.mesh, len(batch['audio'])))
    return state, {name: float(total) / float(weight) for name, (total, weight) in found.items()}

  return run


def _host(state: TrainState) -> TrainState:
  return jax.tree.map(np.array, state)


def _by_path(state: TrainState) -> dict[str, Any]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree.leaves_with_path(vars(state))}


def _differences(a: TrainState, b: TrainState) -> list[str]:
  return [path for (path, x), y in zip(_by_path(a).items(), jax.tree.leaves(vars(b)), strict=True)
          if x.tobytes() != y.tobytes()]


# ---------------------------------------------------------------- tests


@pytest.fixture(scope='module')
def measured(tmp_path_factory, repo):
  """(figures, arrays) of `measure`."""
  out = tmp_path_factory.mktemp('sharding')
  flags = '--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': f'{repo}{os.pathsep}{repo / "tests"}'}
  done = subprocess.run([sys.executable, __file__, out], env=environment, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, text=True, timeout=600)
  assert done.returncode == 0, done.stdout
  with np.load(out / 'arrays.npz') as arrays:
    return json.loads((out / 'figures.json').read_text()), dict(arrays)


@pytest.mark.parametrize('mesh', MESHES)
def test_metrics_are_those_of_the_whole_batch(measured, mesh):
  """Sums run in another order, so the last bits of float32 differ, and no more than that: codes are the same."""
  figures, _ = measured
  got, expected = figures[f'{mesh}/0'], figures['1x1x1/0']
  assert got.keys() == expected.keys()
  for name in expected:
    assert got[name] == pytest.approx(expected[name], rel=1e-4 if name.startswith('gradient/') else 1e-5), name
  # Were they counted per device, at most 10 frames could be seen, and the mean of eight perplexities be no more.
  assert expected['codebook/usage_semantic'] * CONFIG.model.semantic.size > 10
  assert expected['codebook/perplexity_semantic'] > 10


@pytest.mark.parametrize('mesh', ['4x2x1', '2x2x2'])
def test_an_audio_tower_hears_the_same_on_every_mesh(measured, mesh):
  _, arrays = measured
  expected = arrays['1x1x1/tower']
  np.testing.assert_allclose(arrays[f'{mesh}/tower'], expected, atol=1e-4 * np.abs(expected).max())


# float32: sums in another order. bfloat16 keeps 8 bits: the order decides the last of them, that decides a code now and
# then, and what depends on single codes moves most.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.1}
TOLERANCE_OF_CODES = {'float32': 1e-4, 'bfloat16': 0.25}


@pytest.mark.parametrize('run', [*MESHES, *VARIANTS])
def test_twenty_steps_have_the_same_losses_and_codes(measured, run):
  figures, arrays = measured
  dtype = 'bfloat16' if 'bfloat16' in run else 'float32'
  reference = '1x1x1 bfloat16' if run == '2x2x2 bfloat16' else '1x1x1'
  for step in range(STEPS):
    for name, expected in figures[f'{reference}/{step}'].items():
      if name.startswith('loss/'):
        allowed = TOLERANCE_OF_CODES if name.endswith(('commitment', 'codebook')) else TOLERANCE
        assert figures[f'{run}/{step}'][name] == pytest.approx(expected, rel=allowed[dtype]), (step, name)
  if dtype == 'float32':
    codes = arrays[f'{run}/codes']
    assert np.array_equal(codes, arrays['1x1x1/codes']) and len(np.unique(codes)) > 10
  first, last = figures['1x1x1/0'], figures[f'1x1x1/{STEPS - 1}']
  assert abs(last['loss/discriminator'] - first['loss/discriminator']) > 1e-3  # something was learnt


def test_bfloat16_codes_of_the_same_parameters_are_the_same_on_any_mesh(measured):
  one, eight = (measured[1][f'{mesh} bfloat16/start_codes'] for mesh in ('1x1x1', '2x2x2'))
  assert np.array_equal(one, eight) and len(np.unique(one)) > 10


def test_bfloat16_is_another_precision(measured):
  """And float32 none: the runs above would all be equal if dtype did nothing."""
  figures, _ = measured
  differences = [abs(figures[f'1x1x1 bfloat16/{step}']['loss/mel'] / figures[f'1x1x1/{step}']['loss/mel'] - 1)
                 for step in range(STEPS)]
  assert max(differences) > 1e-4


@pytest.mark.parametrize('mesh', [*MESHES, *(name for name in VARIANTS if 'bfloat16' not in name)])
def test_gradients_and_updated_parameters(measured, mesh):
  """Gradients (Adam's first moment is one, clipped, times 1 - beta1) agree to float32's rounding over the batch's sum.

  Adam divides each by its own size, so an element whose gradient is nothing but rounding may move anywhere within the
  learning rate: parameters are compared by how far each array has moved, of which such elements are a small share.
  """
  _, arrays = measured
  compared = {'mu': 0, 'moved': 0, 'codebooks': 0}
  for path in (key.removeprefix('start/') for key in arrays if key.startswith('start/')):
    start, got, expected = (arrays[key].astype(np.float64) for key in (
        f'start/{path}', f'{mesh}/0/{path}', f'1x1x1/0/{path}'))
    if '/mu/' in path:
      compared['mu'] += 1
      assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected), path
    elif path.startswith(('generator/', 'discriminator/')):
      compared['moved'] += 1
      assert np.linalg.norm(got - expected) <= 2e-3 * np.linalg.norm(expected - start), path
    elif path.startswith('codebooks/'):
      compared['codebooks'] += 1
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=path)
      assert path.endswith('codebook') or not np.array_equal(got, start)
  assert min(compared.values()) >= 4, compared


def test_a_fresh_state_is_the_same_on_any_mesh(measured):
  assert measured[0]['init_error'] <= 1e-6


def test_parameters_optimizer_states_and_averages_are_split(measured):
  """Kernels over fsdp and tensor by their output channels, where these divide; nothing else."""
  figures, _ = measured
  split = {}
  for mesh, ways in (('2x2x2', 4), ('4x2x1', 2), ('8x1x1', 1)):
    split[mesh] = set()
    for path, shard in figures[f'{mesh}/shards'].items():
      whole, parts = shard['whole'], shard['parts']
      assert len(parts) == 8 and all(part == parts[0] for part in parts)
      if path.endswith('weight_v') and whole[-1] % ways == 0 and ways > 1:
        assert parts[0] == [*whole[:-1], whole[-1] // ways], path
        split[mesh].add(path.partition('/')[0])
      else:
        assert parts[0] == whole, path
  everything = {'generator', 'discriminator', 'generator_opt', 'discriminator_opt', 'average'}
  assert split == {'2x2x2': everything, '4x2x1': everything, '8x1x1': set()}


def test_parameter_table_says_where_things_are(measured):
  figures, _ = measured
  *rows, total = [line for line in figures['table'].splitlines() if line]
  shards = figures['2x2x2/shards']
  listed = {row.split()[0]: row for row in rows}
  assert listed.keys() == shards.keys()
  for path, row in listed.items():
    assert int(row.split()[-1].replace(',', '')) == shards[path]['bytes'], row
    assert ('fsdp+tensor' in row) == (shards[path]['parts'][0] != shards[path]['whole']), row
    assert 'x'.join(map(str, shards[path]['whole'])) in row
  per_device = sum(shard['bytes'] for shard in shards.values())
  assert total.startswith('total bytes per device') and total.endswith(f' {per_device:,}')
  assert per_device < 0.6 * sum(shard['bytes'] for shard in figures['1x1x1/shards'].values())


def test_a_checkpoint_goes_on_on_another_mesh(measured):
  """Saved on 8x1x1, restored on 2x2x2: the same bits, split as asked, and the next step follows."""
  figures, _ = measured
  assert figures['restored_differs'] == [] and figures['restored_elsewhere'] == []
  for name, value in figures['1x1x1/1'].items():
    assert figures['restored/1'][name] == pytest.approx(value, rel=1e-4), name


# ---------------------------------------------------------------- rules, without devices


def placed(rules, path, shape, sizes=(2, 2, 2)):
  """The spec that a config's rules give an array of the teacher or the state, on a mesh of these sizes."""
  mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
  tree = jax.ShapeDtypeStruct(shape, np.float32)
  for name in reversed(path.split('/')):
    tree = {name: tree}
  (row,) = Placement(replaced(CONFIG, mesh__rules=rules), mesh).table(tree)
  assert row.path == path
  return row.spec


@pytest.mark.parametrize('path, shape, spec', [
    ('teacher/blocks/attention/query/kernel', (32, 1280, 1280), (None, 'fsdp', 'tensor')),
    ('teacher/blocks/attention/out/kernel', (32, 1280, 1280), (None, 'tensor', 'fsdp')),
    ('teacher/blocks/mlp/up/bias', (32, 5120), (None, 'tensor')),
    ('teacher/blocks/mlp/down/bias', (32, 1280), ()),
    ('teacher/conv1/kernel', (3, 128, 1280), (None, None, 'fsdp')),
    ('teacher/positions', (1500, 1280), ()),
    ('generator/tokenizer/decoder/blocks/0/upsample/weight_v', (4, 1536, 768), (None, None, ('fsdp', 'tensor'))),
    ('generator/tokenizer/decoder/conv_out/weight_v', (7, 96, 1), ()),
    ('discriminator_opt/1/0/mu/discriminators/3/convs/1/weight_v', (1, 5, 32, 128),
     (None, None, None, ('fsdp', 'tensor'))),
    ('step', (), ()),
])
def test_default_rules(path, shape, spec):
  assert placed((), path, shape) == PartitionSpec(*spec)


def test_own_rules_come_first_and_the_first_match_wins():
  path, shape = 'teacher/blocks/mlp/up/kernel', (32, 1280, 5120)
  assert placed(('mlp/.*kernel = -, -, fsdp+tensor', '^teacher = data'), path, shape) == PartitionSpec(
      None, None, ('fsdp', 'tensor'))
  assert placed(('^teacher/.*kernel$ = data',), path, shape) == PartitionSpec('data')
  assert placed(('^generator = data',), path, shape) == PartitionSpec(None, 'fsdp', 'tensor')


@pytest.mark.parametrize('rules, path, message', [
    ((), 'generator/extra/table', r'no rule for generator/extra/table \(4, 4\)'),
    (('kernel',), 'step', "'kernel' has no '='"),
    (('a( = fsdp',), 'step', "'a\\(' is no regular expression"),
    (('a = fsdp, fsdp',), 'step', 'each once at most'),
    (('a = model',), 'step', "axes are data, fsdp, tensor or '-'"),
    (('^generator = -, -, fsdp',), 'generator/x', r'fewer axes than the rule'),
])
def test_bad_rules_are_one_line(rules, path, message):
  with pytest.raises(LmsptError, match=message) as raised:
    placed(rules, path, (4, 4))
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('mesh, batch, parts, message', [
    (MeshConfig(-1, -1, 1), 8, 1, 'one of them may be -1'),
    (MeshConfig(0, 1, 1), 8, 1, 'sizes are positive'),
    (MeshConfig(1, 1, 3), 8, 1, 'there are 1 devices'),
    (MeshConfig(), 9, 2, r'batch_size = 9: .*accumulation = 2; use 8'),
])
def test_meshes_that_do_not_fit(mesh, batch, parts, message):
  config = replaced(CONFIG, mesh=mesh, data__batch_size=batch, compute__accumulation=parts)
  with pytest.raises(LmsptError, match=message):
    make_mesh(config, jax.devices()[:1])


if __name__ == '__main__':
  measure(Path(sys.argv[1]))
