"""The train step and its checkpoints on eight devices, split in two ways, against one device.

XLA decides how many devices the host has before jax starts, so `measure` runs in a process of its own:

    python tests/test_sharding.py OUT
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from make_golden_step import DIMS, TINY, fast, replaced, speech_batches, tiny_teacher

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.config import MeshConfig
from lmspt_jax.sharding import make_mesh, parameter_table, shard_batch, state_shardings
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step

# Whatever depends on the whole batch is on: usage, perplexity, moving averages, revival (from the first step), dropout.
CONFIG = replaced(
    TINY, data__batch_size=8, data__crop_seconds=0.2, discriminator__fft_sizes=(), loss__mel_bins=(20,),
    loss__mel_windows=(256,), model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,), model__acoustic__kind='ema',
    model__semantic__revive_every=1, model__semantic__revive_below=0.95,
    model__acoustic__revive_every=1, model__acoustic__revive_below=0.95)
MESHES = {'data=8': MeshConfig(data=8, fsdp=1), 'data=4 x fsdp=2': MeshConfig(data=4, fsdp=2)}
STEPS = 2


# ---------------------------------------------------------------- in the process with eight devices


def measure(out: Path) -> None:
  """Writes what the tests below judge: figures.json, and arrays.npz by mesh and path."""
  assert jax.device_count() == 8
  gc.disable()  # a third of the time of tracing
  figures, arrays = {}, {}
  batches = speech_batches(CONFIG, STEPS)
  for batch in batches:  # padding, so that the devices' shares of real audio differ
    batch['num_samples'][-1] //= 4
    batch['audio'][-1, batch['num_samples'][-1]:] = 0

  experiment = Experiment(CONFIG, DIMS)
  abstract = experiment.abstract_state()
  one = jax.make_mesh((1, 1), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
  meshes = {'one': one, **{name: make_mesh(config, CONFIG.data.batch_size) for name, config in MESHES.items()}}
  shardings = {name: state_shardings(abstract, mesh) for name, mesh in meshes.items()}
  run = {name: _stepper(experiment, mesh, shardings[name]) for name, mesh in meshes.items()}

  start, split = (_host(fast(experiment.init, out_shardings=shardings[name])()) for name in ('one', 'data=4 x fsdp=2'))
  figures['init_error'] = max(
      float(np.max(np.abs(x - y), initial=0)) for x, y in zip(*map(jax.tree.leaves, (start, split)), strict=True))
  arrays |= {f'start/{path}': x for path, x in _by_path(start).items()}
  saved = {}
  for name in meshes:
    state = jax.device_put(start, shardings[name])
    for step, batch in enumerate(batches):
      state, figures[f'{name}/{step}'] = run[name](state, batch)
      saved[name, step] = _host(state)
      arrays |= {f'{name}/{step}/{path}': x for path, x in _by_path(saved[name, step]).items()}
    figures[f'{name}/shards'] = {
        path: {'whole': x.shape, 'parts': [s.data.shape for s in x.addressable_shards],
               'bytes': x.addressable_shards[0].data.nbytes} for path, x in _by_path(state).items()}
  figures['table'] = parameter_table(abstract, meshes['data=4 x fsdp=2'])

  store = CheckpointStore(out)
  first = jax.device_put(saved['data=8', 0], shardings['data=8'])
  store.save(1, vars(first), {})
  store.wait()
  wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), vars(abstract),
                        vars(shardings['data=4 x fsdp=2']))
  restored = TrainState(**store.restore(1, wanted)[0])
  store.close()
  figures['restored_differs'] = _differences(saved['data=8', 0], _host(restored))
  figures['restored_elsewhere'] = [
      path for (path, x), s in zip(_by_path(restored).items(), jax.tree.leaves(wanted), strict=True)
      if x.sharding != s.sharding]
  _, figures['restored/1'] = run['data=4 x fsdp=2'](restored, batches[1])
  (out / 'figures.json').write_text(json.dumps(figures))
  np.savez(out / 'arrays.npz', **arrays)


def _stepper(experiment: Experiment, mesh: Mesh, shardings: TrainState):
  """(state, batch) -> (state, metrics), compiled as the training loop does."""
  compiled = fast(make_train_step(experiment), donate_argnums=0, out_shardings=(shardings, None))

  def run(state, batch):
    with jax.set_mesh(mesh):
      params = jax.device_put(tiny_teacher(), state_shardings(tiny_teacher(), mesh))
      state, found = compiled(state, params, shard_batch(batch, mesh))
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
  environment = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(repo)}
  done = subprocess.run([sys.executable, __file__, out], env=environment, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, text=True, timeout=600)
  assert done.returncode == 0, done.stdout
  with np.load(out / 'arrays.npz') as arrays:
    return json.loads((out / 'figures.json').read_text()), dict(arrays)


@pytest.mark.parametrize('step', range(STEPS))
@pytest.mark.parametrize('mesh', MESHES)
def test_metrics_are_those_of_the_whole_batch(measured, mesh, step):
  """Sums run in another order, so the last bits of float32 differ, and no more than that: codes are the same."""
  figures, _ = measured
  got, expected = figures[f'{mesh}/{step}'], figures[f'one/{step}']
  assert got.keys() == expected.keys()
  for name in expected:
    assert got[name] == pytest.approx(expected[name], rel=1e-4 if name.startswith('gradient/') else 1e-5), name
  # Were they counted per device, at most 10 frames could be seen, and the mean of eight perplexities be no more.
  assert expected['codebook/usage_semantic'] * CONFIG.model.semantic.size > 10
  assert expected['codebook/perplexity_semantic'] > 10


@pytest.mark.parametrize('mesh', MESHES)
def test_gradients_and_updated_parameters(measured, mesh):
  """Gradients (Adam's first moment is one, clipped, times 1 - beta1) agree to float32's rounding over the batch's sum.

  Adam divides each by its own size, so an element whose gradient is nothing but rounding may move anywhere within the
  learning rate: parameters are compared by how far each array has moved, of which such elements are a small share.
  """
  _, arrays = measured
  compared = {'mu': 0, 'moved': 0, 'codebooks': 0}
  for path in (key.removeprefix('start/') for key in arrays if key.startswith('start/')):
    start, got, expected = (arrays[key].astype(np.float64) for key in (
        f'start/{path}', f'{mesh}/0/{path}', f'one/0/{path}'))
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


def test_parameters_and_optimizer_states_are_split_over_fsdp(measured):
  figures, _ = measured
  split = 0
  for path, shard in figures['data=4 x fsdp=2/shards'].items():
    whole, parts = shard['whole'], shard['parts']
    assert len(parts) == 8 and all(part == parts[0] for part in parts)
    if len(whole) >= 2 and any(size % 2 == 0 for size in whole):
      assert np.prod(parts[0]) * 2 == np.prod(whole), path
      split += 1
    else:
      assert parts[0] == whole, path
  assert split > 50
  for path, shard in figures['data=8/shards'].items():
    assert len(shard['parts']) == 8 and all(part == shard['whole'] for part in shard['parts']), path


def test_parameter_table_says_where_things_are(measured):
  figures, _ = measured
  *rows, total = [line for line in figures['table'].splitlines() if line]
  shards = figures['data=4 x fsdp=2/shards']
  listed = {row.split()[0]: row for row in rows}
  assert listed.keys() == shards.keys()
  for path, row in listed.items():
    assert int(row.split()[-1].replace(',', '')) == shards[path]['bytes'], row
    assert ("'fsdp'" in row) == (shards[path]['parts'][0] != shards[path]['whole']), row
    assert str(tuple(shards[path]['whole'])) in row
  per_device = sum(shard['bytes'] for shard in shards.values())
  assert total.startswith('total bytes per device') and total.endswith(f' {per_device:,}')
  assert per_device < 0.6 * sum(shard['bytes'] for shard in figures['one/shards'].values())


def test_a_checkpoint_goes_on_on_another_mesh(measured):
  """Saved on data=8, restored on data=4 x fsdp=2: the same bits, split as asked, and the next step follows."""
  figures, _ = measured
  assert figures['restored_differs'] == [] and figures['restored_elsewhere'] == []
  for name, value in figures['one/1'].items():
    assert figures['restored/1'][name] == pytest.approx(value, rel=1e-4), name


if __name__ == '__main__':
  measure(Path(sys.argv[1]))
