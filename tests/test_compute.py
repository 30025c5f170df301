"""Precision, memory, the moving average, and steps that are skipped: what surrounds the arithmetic of the train step.

That accumulation and recomputation change no number is in tests/runs/test_sharding.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from make_golden_step import DIMS, TINY, fast, recording_step, replaced, speech_batches, tiny_teacher

from lmspt_jax.checkpoint import CheckpointStore, restore_for_inference
from lmspt_jax.config import ComputeConfig, to_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.discriminators import Discriminators
from lmspt_jax.models.layers import snake
from lmspt_jax.models.tokenizer import SpeechTokenizer
from lmspt_jax.models.whisper import WhisperEncoder, bind
from lmspt_jax.training import codebooks as codebook_rules
from lmspt_jax.training.teacher import stored_params

BFLOAT16 = ComputeConfig(dtype='bfloat16')


@pytest.fixture(scope='module')
def batches():
  return speech_batches(TINY, 3)


@pytest.fixture(scope='module')
def states(batches):
  """The states before and after each of three steps."""
  _, state, step = recording_step(TINY)
  found = [state]
  for batch in batches:
    found.append(step(found[-1], batch)[0])
  return found


def flat(tree) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
          for path, x in jax.tree.leaves_with_path(tree)}


# ---------------------------------------------------------------- moving average


def test_average_of_the_steps(states):
  """Decay min(ema_decay, (1 + n) / (10 + n)) at step n, codebooks too; what is counted is the newest."""
  expected = flat(states[0].average)
  for number, state in enumerate(states[1:]):
    decay = np.float32((1 + number) / (10 + number))
    newest = flat({'params': state.generator['tokenizer'], 'codebooks': state.codebooks})
    assert newest.keys() == expected.keys()
    for path, value in newest.items():
      averaged = path.startswith('params/')
      expected[path] = decay * expected[path] + (1 - decay) * value if averaged else value
    for path, value in flat(state.average).items():
      np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)
  assert not np.allclose(expected['params/decoder/conv_in/weight_v'],
                         states[-1].generator['tokenizer']['decoder']['conv_in']['weight_v'], rtol=1e-4)


@pytest.mark.parametrize('where', ['params', 'codebooks'])
def test_a_revived_code_is_in_the_average_at_once(where):
  old, new = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
  path = (where, 'semantic_quantizer', 'quantizers', 0, 'codebook')

  def trees(table):
    leaf = lambda tree: {'codebook': table} if tree == where else {'bias': table}
    return {tree: {'semantic_quantizer': {'quantizers': {0: leaf(tree)}}} for tree in ('params', 'codebooks')}

  revived = codebook_rules.Updated(**trees(new), metrics={}, revived={path: jnp.array([False, True, False, False])})
  average = codebook_rules.moving_average(jnp.float32(0.75), trees(old), revived)
  for key in path:
    average = average[key]
  assert average[:, 0].tolist() == [0.25, 1.0, 0.25, 0.25]
  revived = dataclasses.replace(revived, revived={path: None})
  never = codebook_rules.moving_average(jnp.float32(0.75), trees(old), revived)
  assert float(never[where]['semantic_quantizer']['quantizers'][0]['codebook'][1, 0]) == 0.25


def test_the_average_is_exported(states, tmp_path):
  store = CheckpointStore(tmp_path)
  store.save(3, vars(states[-1]), {'config': to_dict(TINY), 'teacher_id': ''})
  store.close()
  average, last = (restore_for_inference(tmp_path, average=which) for which in (True, False))
  assert flat(average.params).keys() == flat(last.params).keys()
  for path, value in flat(average.params).items():
    assert np.array_equal(value, flat(states[-1].average['params'])[path])
    assert np.array_equal(flat(last.params)[path], flat(states[-1].generator['tokenizer'])[path])
  experiment = recording_step(TINY)[0]
  assert experiment.exported(states[-1]) is states[-1].average


def test_without_averaging_the_last_parameters_are_exported(states):
  experiment = recording_step(TINY)[0]
  state = dataclasses.replace(states[-1], average={})
  assert experiment.exported(state)['params'] is state.generator['tokenizer']
  assert experiment.exported(state)['codebooks'] is state.codebooks


# ---------------------------------------------------------------- steps that are skipped


def test_a_step_that_is_not_finite_changes_nothing(states, batches):
  _, _, step = recording_step(TINY)
  audio = batches[1]['audio'].copy()
  audio[2, 100] = np.nan
  state = states[1]
  for count in (1, 2):
    state, found, _ = step(state, {**batches[1], 'audio': audio})
    assert int(state.skipped_in_row) == count and int(state.step) == 1 + count
    for path, value in flat(dataclasses.replace(states[1], step=None, skipped_in_row=None)).items():
      assert np.array_equal(flat(dataclasses.replace(state, step=None, skipped_in_row=None))[path], value), path
    found = jax.device_get(found)
    flags = {name: float(total) for name, (total, _) in found.items() if name.startswith('nonfinite/')}
    assert flags['nonfinite/loss/mel'] == flags['nonfinite/gradient/generator'] == 1
    assert found['skipped'] == (1, 1) and float(found['audio_seconds'][0]) > 0
    others = [pair for name, pair in found.items()
              if not name.startswith('nonfinite/') and name not in ('skipped', 'audio_seconds')]
    assert len(others) > 10 and all(float(total) == float(weight) == 0 for total, weight in others)
  state, found, _ = step(state, batches[1])
  assert int(state.skipped_in_row) == 0 and found['skipped'] == (0, 1)
  assert not np.array_equal(state.generator['tokenizer']['decoder']['conv_in']['weight_v'],
                            states[1].generator['tokenizer']['decoder']['conv_in']['weight_v'])


def test_what_decides_over_a_step_is_computed_once(states, batches):
  """XLA:CPU copies cheap scalars, and what they are computed from, into every fusion that reads them: this one into the
  choice of each of the state's arrays. The release's step so took 288 s and 16 GB to compile, not 56 s and 4.6 GB."""
  _, state, step = recording_step(TINY)
  assert step.program(states[1], batches[1]).count(' = ') < 120 * len(jax.tree.leaves(state))


# ---------------------------------------------------------------- precision


def test_bfloat16_is_between_the_first_and_the_last_convolution(batches):
  """Audio, the encoders' last convolution, quantizers and what comes out are float32; blocks are bfloat16."""
  model = SpeechTokenizer(TINY.model, rngs=nnx.Rngs(0), compute=BFLOAT16)
  audio = jnp.asarray(batches[0]['audio'])
  encoder, dtype_of = model.semantic_encoder, lambda function, x: jax.eval_shape(function, x).dtype
  assert dtype_of(encoder.conv_in, audio[:, :, None]) == jnp.float32
  assert dtype_of(encoder.blocks[0], jnp.zeros((1, 320, 4))) == jnp.bfloat16
  assert dtype_of(model.decoder.blocks[0], jnp.zeros((1, 4, 16))) == jnp.bfloat16
  out = fast(model)(audio)
  for value in (out.audio, out.resynthesis, out.semantic.quantized, out.semantic.latents, out.acoustic.quantized):
    assert value.dtype == jnp.float32
    assert not np.array_equal(value, value.astype(jnp.bfloat16))  # and not bfloat16 numbers in float32
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype('float32')}
  exact = fast(SpeechTokenizer(TINY.model, rngs=nnx.Rngs(0)))(audio)
  np.testing.assert_allclose(out.audio, exact.audio, atol=0.02 * float(jnp.abs(exact.audio).max()))


def test_bfloat16_discriminators_and_teacher():
  audio = jnp.asarray(speech_batches(TINY, 1)[0]['audio'])
  judges = Discriminators(TINY.discriminator, 16_000, rngs=nnx.Rngs(0), compute=BFLOAT16)
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(judges, audio))} == {jnp.dtype('bfloat16')}

  teacher = stored_params(tiny_teacher(), BFLOAT16)
  dtypes = {path.rpartition('/')[2]: leaf.dtype for path, leaf in flat(teacher).items()}
  assert dtypes == {'kernel': jnp.bfloat16, 'bias': np.float32, 'scale': np.float32}
  mel = jnp.asarray(np.sin(np.arange(2 * 40 * 80, dtype=np.float32)).reshape(2, 40, 80))
  features = fast(bind(WhisperEncoder, DIMS, teacher, dtype=jnp.bfloat16))(mel)
  exact = fast(bind(WhisperEncoder, DIMS, tiny_teacher()))(mel)
  assert features.dtype == jnp.float32
  error = float(jnp.abs(features - exact).max() / jnp.abs(exact).max())
  assert 1e-5 < error < 0.02


def test_snake_gradient_is_that_of_its_formula():
  x = jnp.linspace(-4, 4, 60).reshape(2, 10, 3)
  alpha = jnp.array([0.3, 1.0, 2.5])
  plain = lambda x, alpha: x + jnp.square(jnp.sin(alpha * x)) / (alpha + 1e-9)
  weigh = lambda f: lambda x, alpha: jnp.sum(f(x, alpha) * jnp.cos(3 * x + 1))
  for got, expected in zip(*(jax.grad(weigh(f), argnums=(0, 1))(x, alpha) for f in (snake, plain)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
  narrow = snake(x.astype(jnp.bfloat16), alpha)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype(jnp.float32), plain(x, alpha), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize('changes, message', [
    (dict(compute__dtype='float16'), r"compute\.dtype = 'float16': use 'float32' or 'bfloat16'"),
    (dict(compute__accumulation=3), r'compute\.accumulation = 3: must divide data\.batch_size, 4'),
    (dict(compute__accumulation=2, quirks__batch_mel_floor=True), r'batch_mel_floor looks at the whole batch'),
    (dict(compute__remat_codec='all'), r"compute\.remat_codec = 'all': use one of"),
    (dict(train__ema_decay=1.0), r'train\.ema_decay = 1\.0'),
])
def test_bad_settings(changes, message):
  with pytest.raises(LmsptError, match=message):
    replaced(TINY, **changes).check()
