"""The train step: whose gradient reaches whom, each quirk, codebook figures and care, and the pinned golden step."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from make_golden_step import (
  DIMS,
  FIXTURE,
  TINY,
  fast,
  golden_steps,
  recording_step,
  replaced,
  speech_batches,
  tiny_teacher,
)

from lmspt_jax import metrics as metrics_lib
from lmspt_jax import optim, rng
from lmspt_jax.audio.mel import log_mel_spectrogram
from lmspt_jax.config import ModelConfig, OptimizerConfig, QuantizerConfig, QuirksConfig
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.errors import LmsptError
from lmspt_jax.losses.adversarial import discriminator_loss, feature_matching_loss, generator_adversarial_loss
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.models import whisper
from lmspt_jax.models.quantizers import (
  FiniteScalarQuantizer,
  QuantizerOutput,
  ResidualQuantizer,
  active_codebooks,
  l2_normalise,
  nearest_codes,
)
from lmspt_jax.sharding import Placement, make_mesh
from lmspt_jax.training import codebooks as codebook_rules
from lmspt_jax.training import setup
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import FrozenTeacher, NoDistillation, make_distillation, pooling_weights

RELEASE = replaced(TINY, quirks=QuirksConfig.named('release'), teacher__strategy='pooled')
FIXED = QuirksConfig()
ADVERSARIAL = {'adversarial': 1.0, 'feature_matching': 2.0}


@pytest.fixture(scope='module')
def fixed():
  """(experiment, state 0, step) of the default quirks and the resynthesis strategy."""
  return recording_step(TINY)


@pytest.fixture(scope='module')
def release():
  """The same with all quirks on and the pooled strategy."""
  return recording_step(RELEASE)


@pytest.fixture(scope='module')
def batch():
  return speech_batches(TINY, 1)[0]


@pytest.fixture(scope='module')
def plainly(fixed, batch):
  """(generator, discriminator, weights, batch) -> gradient of the whole loss, and what the forward returned."""
  experiment, _, _ = fixed

  def loss(generator, discriminator, teacher_params, weights, batch):
    audio, model = batch['audio'], TINY.model
    active = active_codebooks(rng.stream(TINY.train.seed, 'quantizer_dropout', 0), len(audio), model.acoustic)
    out = experiment.tokenizer(generator['tokenizer'], fixed[1].codebooks)(audio, active_B=active)
    judge = experiment.discriminators(discriminator)
    fake, real = judge(out.audio), judge(audio)
    total = weights['semantic_commitment'] * out.semantic.commitment
    total += weights['semantic_codebook'] * out.semantic.codebook
    total += weights['acoustic_commitment'] * out.acoustic.commitment
    total += weights['acoustic_codebook'] * out.acoustic.codebook
    total += weights['adversarial'] * generator_adversarial_loss(fake)
    total += weights['feature_matching'] * feature_matching_loss(real, fake)
    total += weights['mel'] * multi_scale_mel_loss(out.audio, audio, model.sample_rate, (20, 40), (256, 512))
    total += weights['distillation'] * experiment.distillation.loss(
        teacher_params, audio, batch['num_samples'], out.resynthesis)
    return total, out

  compiled = fast(jax.grad(loss, has_aux=True))

  def run(generator, discriminator, weights=None, batch=batch):
    names = [f.name for f in dataclasses.fields(TINY.loss) if not f.name.startswith('mel_')]
    given = {n: getattr(TINY.loss, n) if weights is None else weights.get(n, 0.0) for n in names}
    return compiled(generator, discriminator, tiny_teacher(), {n: jnp.float32(w) for n, w in given.items()}, batch)

  return run


def size(tree):
  """Largest absolute value."""
  return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def distance(a, b):
  """Norm of the difference over the norm."""
  return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


def touched(gradients):
  """Parts of the generator whose gradient is not exactly 0."""
  parts = {**gradients['tokenizer'], 'distillation': gradients['distillation']}
  return {name for name, part in parts.items() if jax.tree.leaves(part) and size(part) > 0}


# ---------------------------------------------------------------- gradients


def test_generator_gradient_is_that_of_the_whole_loss(fixed, plainly, batch):
  _, state, step = fixed
  after, _, seen = step(state, batch)
  expected, _ = plainly(state.generator, after.discriminator)
  assert distance(seen['generator'], expected) < 1e-4
  # Leaf by leaf too: a small part must not hide behind a large one.
  for (path, got), want in zip(jax.tree.leaves_with_path(seen['generator']), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-3 * size(want) + 1e-6 * size(expected), err_msg=str(path))


def test_generator_is_judged_by_the_updated_discriminator(fixed, plainly, batch):
  _, state, step = fixed
  after, _, seen = step(state, batch, ADVERSARIAL)
  updated, _ = plainly(state.generator, after.discriminator, ADVERSARIAL)
  before, _ = plainly(state.generator, state.discriminator, ADVERSARIAL)
  assert distance(seen['generator'], updated) < 1e-4
  assert distance(seen['generator'], before) > 1e-3, distance(seen['generator'], before)


def test_discriminator_learns_on_the_detached_output(fixed, plainly, batch):
  experiment, state, step = fixed
  # Untrained discriminators hardly tell two signals apart; with larger weights they do.
  state = state.replace(discriminator=jax.tree.map(lambda x: 2 * x, state.discriminator))
  after, found, seen = step(state, batch, {})  # no generator loss at all: only the discriminator's could reach it
  assert size(seen['generator']) == 0
  _, out = plainly(state.generator, state.discriminator)

  def loss(discriminator):
    judge = experiment.discriminators(discriminator)
    return discriminator_loss(judge(batch['audio']), judge(out.audio))

  value, expected = fast(jax.value_and_grad(loss))(state.discriminator)
  assert distance(seen['discriminator'], expected) < 1e-4
  assert float(found['loss/discriminator'][0]) / 4 == pytest.approx(float(value), rel=1e-5)
  assert size(jax.tree.map(jnp.subtract, after.discriminator, state.discriminator)) > 1e-4


@pytest.mark.parametrize('weights, parts', [
    ({'distillation': 1.0}, {'semantic_encoder', 'semantic_quantizer', 'resynthesis_decoder'}),
    ({'semantic_commitment': 1.0}, {'semantic_encoder', 'semantic_quantizer'}),
    ({'semantic_codebook': 1.0}, {'semantic_quantizer'}),
    ({'acoustic_commitment': 1.0}, {'acoustic_encoder', 'acoustic_quantizer'}),
    ({'acoustic_codebook': 1.0}, {'acoustic_quantizer'}),
    ({'mel': 1.0}, {'semantic_encoder', 'semantic_quantizer', 'acoustic_encoder', 'acoustic_quantizer', 'decoder'}),
])
def test_which_term_teaches_what(fixed, batch, weights, parts):
  _, state, step = fixed
  assert touched(step(state, batch, weights)[2]['generator']) == parts


def test_pooled_distillation_bypasses_the_resynthesis(release, batch):
  _, state, step = release
  _, found, seen = step(state, batch, {'distillation': 1.0})
  assert touched(seen['generator']) == {'semantic_encoder', 'semantic_quantizer', 'distillation'}
  assert float(found['loss/distillation'][0]) > 0


def test_attached_subtraction_lets_the_acoustic_loss_reach_the_semantic_encoder(fixed, release, batch):
  for (_, state, step), reached in ((fixed, False), (release, True)):
    _, _, seen = step(state, batch, {'acoustic_commitment': 1.0})
    assert ('semantic_encoder' in touched(seen['generator'])) == reached


@pytest.mark.parametrize('strategy', ['resynthesis', 'pooled'])
def test_gradients_pass_through_the_teacher_and_stay_out_of_it(batch, strategy):
  distillation = make_distillation(replaced(TINY, teacher__strategy=strategy), DIMS)
  student = 0.5 * batch['audio'] if strategy == 'resynthesis' else np.full((4, 20, DIMS.width), 0.1, np.float32)
  gradient = fast(jax.grad(distillation.loss, argnums=(0, 1, 3)))
  to_teacher, to_original, to_student = gradient(tiny_teacher(), batch['audio'], batch['num_samples'], student)
  assert size(to_teacher) == 0 and size(to_original) == 0
  assert all(float(jnp.max(jnp.abs(row))) > 1e-6 for row in to_student)


def test_no_teacher(batch):
  config = replaced(TINY, teacher__strategy='none')
  experiment = Experiment(config, None)
  assert isinstance(experiment.distillation, NoDistillation)
  assert float(experiment.distillation.loss({}, batch['audio'], batch['num_samples'],
                                            experiment.distillation.student({}, None))) == 0
  state, found = jax.eval_shape(make_train_step(experiment), experiment.abstract_state(), {}, batch)
  assert jax.tree.structure(state) == jax.tree.structure(experiment.abstract_state())
  assert 'loss/distillation' in found


# ---------------------------------------------------------------- the teacher's window and the pooling


@pytest.fixture(scope='module')
def encode():
  """(window, batch_mel_floor) -> jitted (audio of the student) -> features, with TINY's teacher."""
  made = {}

  def run(audio, window='crop', batch_mel_floor=False):
    if (window, batch_mel_floor) not in made:
      teacher = FrozenTeacher(DIMS, 16_000, window, batch_mel_floor)
      made[window, batch_mel_floor] = fast(teacher.features)
    return np.asarray(made[window, batch_mel_floor](tiny_teacher(), audio))

  return run


def test_crop_sees_its_own_positions_and_full_thirty_seconds(batch, encode):
  audio = batch['audio'][:2]
  crop, full = encode(audio), encode(audio, 'full')
  assert crop.shape == (2, 20, 32) and full.shape == (2, 1500, 32)
  direct = fast(lambda p, x: whisper.bind(whisper.WhisperEncoder, DIMS, p)(log_mel_spectrogram(x, 80)))
  np.testing.assert_allclose(crop, direct(tiny_teacher(), audio), atol=1e-5)
  padded = np.pad(audio, ((0, 0), (0, 480_000 - 6400)))
  np.testing.assert_allclose(full, direct(tiny_teacher(), padded), atol=1e-5)
  assert np.abs(crop - full[:, :20]).max() > 1e-2  # 30 s of positions attend to one another
  ragged = encode(audio[:, :6401 - 320])  # part of a position is a position
  assert ragged.shape[1] == 20


@pytest.mark.parametrize('over_padding', [False, True])
def test_loss_over_padding(batch, encode, over_padding):
  audio, num_samples = batch['audio'][:2], np.array([6400, 3000], np.int32)
  student = audio * np.float32(0.3)
  config = replaced(TINY, teacher__window='full', quirks__loss_over_padding=over_padding)
  found = fast(make_distillation(config, DIMS).loss)(tiny_teacher(), audio, num_samples, student)
  square = np.square(encode(student, 'full') - encode(audio, 'full')).mean(-1)
  kept = np.concatenate([square[0, :20], square[1, :10]])  # position 9 starts at 2880, before the end
  expected = square.mean() if over_padding else kept.mean()
  assert float(found) == pytest.approx(float(expected), rel=1e-3)
  assert abs(square.mean() / kept.mean() - 1) > 0.2  # so the two cannot be mistaken for each other


@pytest.mark.parametrize('on', [False, True])
def test_batch_mel_floor(batch, encode, on):
  """A quiet item beside a loud one is floored by its mate only with the quirk; the original never is."""
  quiet, loud = batch['audio'][:1] * np.float32(1e-4), batch['audio'][1:2]
  alone, beside = encode(quiet, batch_mel_floor=on)[0], encode(np.concatenate([quiet, loud]), batch_mel_floor=on)[0]
  assert (np.abs(alone - beside).max() > 1e-2) == on
  config = replaced(TINY, quirks__batch_mel_floor=on)
  targets = fast(make_distillation(config, DIMS).teacher.targets)
  np.testing.assert_allclose(targets(tiny_teacher(), np.concatenate([quiet, loud]))[0],
                             targets(tiny_teacher(), quiet)[0], atol=1e-4)


@pytest.mark.parametrize('rate', [25, 12.5, 6.25, 24, 50, 75])
def test_pooling_weights_are_shares_of_time(rate):
  positions, frames = 80, int(80 * 0.02 * rate)
  weights = pooling_weights(frames, positions, 1 / rate, 0.02)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
  fine = 3000  # per frame: which position does each instant fall into?
  instants = (np.arange(frames)[:, None] + (np.arange(fine) + 0.5) / fine) / rate
  counted = np.stack([np.bincount((row / 0.02).astype(int), minlength=positions)[:positions] for row in instants])
  np.testing.assert_allclose(weights, counted / fine, atol=2e-3)


@pytest.mark.parametrize('frame_rate, hop', [(25, 960), (12.5, 1920), (6.25, 3840), (24, 1000)])
def test_pooled_strategy_at_any_frame_rate(speech_folder, frame_rate, hop):
  model = ModelConfig(sample_rate=24_000, encoder_strides=(hop,), latent_dim=8)
  config = replaced(TINY, model=model, teacher__strategy='pooled')
  distillation = make_distillation(config, DIMS)
  frames = 4
  assert config.model.frame_rate == frame_rate
  audio = 0.1 * np.sin(np.arange(2 * frames * hop, dtype=np.float32).reshape(2, -1) ** 1.3)
  params = distillation.init(jax.random.key(0))
  output = dataclasses.make_dataclass('Output', ['semantic'])(QuantizerOutput(np.ones((2, frames, 8), np.float32),
                                                                             *[None] * 4))
  student = distillation.student(params, output)
  assert student.shape == (2, frames, DIMS.width)
  targets = np.asarray(fast(distillation.teacher.targets)(tiny_teacher(), audio))
  share = pooling_weights(frames, targets.shape[1], hop / 24_000, 0.02)
  if not 50 % frame_rate:  # whole positions: a plain mean of each frame's
    group = int(50 / frame_rate)
    np.testing.assert_allclose(np.einsum('tp,bpd->btd', share, targets),
                               targets.reshape(2, frames, group, -1).mean(2), atol=1e-5)
  num_samples = np.array([frames * hop, hop + 1], np.int32)  # the second item has two real frames
  square = np.square(student - np.einsum('tp,bpd->btd', share, targets)).mean(-1)
  expected = np.concatenate([square[0], square[1, :2]]).mean()
  found = fast(distillation.loss)(tiny_teacher(), audio, num_samples, student)
  assert float(found) == pytest.approx(float(expected), rel=1e-3)


# ---------------------------------------------------------------- quirks


def test_release_turns_every_quirk_on_and_fixed_none():
  assert all(dataclasses.asdict(QuirksConfig.named('release')).values())
  assert not any(dataclasses.asdict(QuirksConfig.named('fixed')).values())
  assert QuirksConfig.named('fixed') == QuirksConfig() == TINY.quirks
  with pytest.raises(LmsptError, match="quirks = 'both'"):
    QuirksConfig.named('both')


@pytest.mark.parametrize('on', [False, True])
def test_discriminator_default_lr(on):
  slow = OptimizerConfig(learning_rate=2e-4, final_learning_rate=5e-5, warmup_steps=100, weight_decay=0.0)
  config = replaced(TINY, discriminator_optimizer=slow, generator_optimizer=slow, train__num_steps=1000,
                    quirks__discriminator_default_lr=on)
  experiment = Experiment(config, DIMS)
  params = {'w': jnp.ones(3)}
  for tx, default in ((experiment.discriminator_tx, on), (experiment.generator_tx, False)):
    state, sizes = tx.init(params), []
    for _ in range(3):  # a constant gradient: Adam's update is the learning rate
      updates, state = tx.update({'w': jnp.full(3, 0.1)}, state, params)
      sizes.append(-float(updates['w'][0]))
    expected = [1e-3] * 3 if default else [0.0, 2e-6, 4e-6]
    np.testing.assert_allclose(sizes, expected, rtol=1e-3, atol=1e-12)


def test_schedule_warms_up_and_ends_where_it_says():
  rate = optim.schedule(OptimizerConfig(), 1000)
  assert [float(rate(s)) for s in (0, 50, 100, 1000)] == pytest.approx([0, 1e-4, 2e-4, 5e-5], abs=1e-9)
  assert float(rate(550)) == pytest.approx((2e-4 + 5e-5) / 2, rel=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
  tx, params = optim.optimizer(OptimizerConfig(clip_norm=1.0), 10), {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  _, state = tx.update({'a': jnp.full(2, 30.0), 'b': jnp.full(2, 40.0)}, tx.init(params), params)
  moments = optax.tree.get(state, 'mu')
  assert float(optax.tree.norm(moments)) == pytest.approx(1.0 - OptimizerConfig().beta1, rel=1e-5)
  assert float(moments['b'][0] / moments['a'][0]) == pytest.approx(4 / 3)


@pytest.mark.parametrize('on', [False, True])
def test_dead_codes_decides_where_codebooks_start(fixed, on):
  """In the loop: k-means centroids of real latents, or the random codes of initialisation."""
  config = replaced(TINY, quirks__dead_codes=on)
  experiment, state = Experiment(config, DIMS), fixed[1]
  experiment.init = lambda: state
  mesh = make_mesh(config)
  shardings = Placement(config, mesh).shardings(experiment.abstract_state())
  fresh = setup.fresh_state(experiment, shardings, mesh, Mixture(config.data))
  batches = speech_batches(config, 2)
  codes_of = fast(lambda p, c, x: experiment.tokenizer(p, c).encode(x))

  def distinct(state):
    codes = np.concatenate([codes_of(state.generator['tokenizer'], state.codebooks, b['audio']) for b in batches], 2)
    return [len(np.unique(codes[:, k])) for k in range(codes.shape[1])]

  same = jax.tree.map(lambda a, b: bool((a == b).all()), fresh.generator['tokenizer'], state.generator['tokenizer'])
  changed = {jax.tree_util.keystr(path, simple=True, separator='.')
             for path, equal in jax.tree.leaves_with_path(same) if not equal}
  lookups = ['semantic_quantizer.quantizers.0', *(f'acoustic_quantizer.quantizers.{i}' for i in range(2))]
  standardised = ['semantic_encoder.conv_out', 'acoustic_encoder.conv_out', *(f'{name}.in_proj' for name in lookups)]
  moved = {f'{name}.codebook' for name in lookups} | {
      f'{name}.{leaf}' for name in standardised for leaf in ('weight_g', 'bias')}
  assert changed == (set() if on else moved)
  if not on:
    assert all(d > 0.9 * n for d, n in zip(distinct(fresh), (32, 16, 16), strict=True))
    assert sum(distinct(fresh)) > 1.2 * sum(distinct(state))


# ---------------------------------------------------------------- codebook figures


def per_codebook(codes_BTK, mask_BT, size):
  """(mean share of codes drawn, mean perplexity) by plain numpy."""
  usage, perplexity = [], []
  for k in range(codes_BTK.shape[-1]):
    counts = np.bincount(codes_BTK[..., k][mask_BT], minlength=size)
    usage.append((counts > 0).mean())
    p = counts[counts > 0] / counts.sum()
    perplexity.append(np.exp(-(p * np.log(p)).sum()))
  return np.mean(usage), np.mean(perplexity)


def test_usage_and_perplexity_leave_padding_out(fixed, plainly, batch):
  _, state, step = fixed
  short = {**batch, 'num_samples': np.array([6400, 3200, 961, 1], np.int32)}
  _, found, _ = step(state, short)
  _, out = plainly(state.generator, state.discriminator)
  mask = np.arange(20) < np.array([20, 10, 4, 1])[:, None]
  figures = metrics_lib.result(jax.device_get(found))
  assert figures['audio_seconds'] == pytest.approx(sum(short['num_samples']) / 16_000)
  for part, size in (('semantic', 32), ('acoustic', 16)):
    codes = np.asarray(getattr(out, part).codes)
    expected = per_codebook(codes, mask, size)
    got = figures[f'codebook/usage_{part}'], figures[f'codebook/perplexity_{part}']
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert abs(got[1] - per_codebook(codes, mask | True, size)[1]) > 0.1  # padding would have shown


_update = fast(codebook_rules.update, static_argnums=(2, 3, 4))


def care(codes_BTK, latents_BTKD, tables, *, quantizer, mask=None, step=0, num_steps=100, quirks=FIXED,
         states=None, seed=0):
  """`codebooks.update` on an acoustic quantizer alone: (tables, states, figures of the acoustic part)."""
  other = QuantizerConfig(kind='fsq', fsq_levels=(2, 2))
  model = dataclasses.replace(ModelConfig(), semantic=other, acoustic=quantizer)
  K, (B, T) = len(tables), codes_BTK.shape[:2]
  if states is None:
    states = [{'counts': jnp.ones(quantizer.size)} for _ in range(K)]
    if quantizer.kind == 'ema':
      states = [{**s, 'codebook': t, 'sums': t, 'mass': jnp.ones(quantizer.size)}
                for s, t in zip(states, tables, strict=True)]
  params = {'acoustic_quantizer': {'quantizers': {i: {'codebook': t} for i, t in enumerate(tables)}}}
  books = {'acoustic_quantizer': {'quantizers': dict(enumerate(states))}}
  outputs = {
      'acoustic': codebook_rules.Drawn(jnp.asarray(codes_BTK), jnp.asarray(latents_BTKD)),
      'semantic': codebook_rules.Drawn(jnp.zeros((B, T, 1), int), jnp.zeros((B, T, 1, 2)))}
  mask = jnp.ones((B, T)) if mask is None else jnp.asarray(mask, jnp.float32)
  updated = _update(
      jax.random.key(seed), jnp.asarray(step), num_steps, model, quirks, params, books, outputs, mask)
  after = [updated.codebooks['acoustic_quantizer']['quantizers'][i] for i in range(K)]
  kept = updated.params['acoustic_quantizer']['quantizers']
  tables = [after[i]['codebook'] if quantizer.kind == 'ema' else kept[i]['codebook'] for i in range(K)]
  return tables, after, metrics_lib.result({k: v for k, v in updated.metrics.items() if k.endswith('acoustic')})


def test_pooled_usage_is_over_all_codebooks_and_never_falls():
  quantizer = QuantizerConfig(num_codebooks=2, codebook_size=8)
  tables, latents = [jnp.ones((8, 8))] * 2, np.ones((1, 4, 2, 8), np.float32)
  first = np.array([[[0, 1], [0, 2], [0, 3], [0, 3]]])
  second = np.array([[[0, 7]] * 4])
  pooled = QuirksConfig(pooled_usage=True)
  _, _, right = care(first, latents, tables, quantizer=quantizer)
  assert right['usage_acoustic'] == pytest.approx((1 + 3) / 2 / 8)
  _, states, figures = care(first, latents, tables, quantizer=quantizer, quirks=pooled)
  assert figures['usage_acoustic'] == pytest.approx(4 / 8)  # 0 by the first, 1 2 3 by the second
  _, states, figures = care(second, latents, tables, quantizer=quantizer, quirks=pooled, states=states)
  assert figures['usage_acoustic'] == pytest.approx(5 / 8)  # what was drawn once counts for ever
  _, _, right = care(second, latents, tables, quantizer=quantizer)
  assert right['usage_acoustic'] == pytest.approx((1 + 1) / 2 / 8)


def test_metrics_are_merged_before_they_are_divided():
  a = {'x': metrics_lib.mean(jnp.float32(2.0), 3), 'once': (1.0, 2.0)}
  b = {'x': metrics_lib.mean(jnp.float32(6.0), 1), 'empty': (0.0, 0.0)}
  found = metrics_lib.result(metrics_lib.merge(a, b))
  assert found['x'] == pytest.approx((2 * 3 + 6 * 1) / 4) and found['once'] == 0.5 and np.isnan(found['empty'])
  assert metrics_lib.perplexity(np.array([3, 3, 3, 0])) == pytest.approx(3)
  assert metrics_lib.perplexity(np.zeros(4)) == 1
  skewed = np.array([8, 1, 1])
  assert metrics_lib.perplexity(skewed) == pytest.approx(float(codebook_rules.counts_perplexity(jnp.asarray(skewed))))
  assert metrics_lib.perplexity(skewed) == pytest.approx(0.8 ** -0.8 * 0.1 ** -0.2)


# ---------------------------------------------------------------- quantizers in training


def test_quantizer_dropout_counts():
  config = QuantizerConfig(num_codebooks=7, dropout=0.5)
  drawn = np.stack([active_codebooks(jax.random.key(i), 9, config) for i in range(60)])
  assert (drawn[:, 4:] == 7).all()  # int(0.5 * 9) = 4 items
  assert set(drawn[:, :4].ravel()) == set(range(1, 8))
  assert (np.asarray(active_codebooks(jax.random.key(0), 9, dataclasses.replace(config, dropout=0.0))) == 7).all()


def test_quantizer_dropout_masks_sum_and_losses_but_not_the_residual():
  config = QuantizerConfig(num_codebooks=3, codebook_size=16, code_dim=4)
  quantizer = ResidualQuantizer(8, config, rngs=nnx.Rngs(0))
  run = fast(lambda z, active=None: quantizer(z, active))
  z = jax.random.normal(jax.random.key(1), (4, 5, 8))
  active = jnp.array([1, 2, 3, 3])
  full, some = run(z), run(z, active)
  assert np.array_equal(full.codes, some.codes) and np.array_equal(full.latents, some.latents)
  terms = np.stack([np.asarray(quantizer.quantizers[i].lookup(full.codes[..., i])) for i in range(3)])
  mask = np.arange(3)[:, None] < np.asarray(active)
  np.testing.assert_allclose(some.quantized, (terms * mask[..., None, None]).sum(0), atol=1e-5)
  tables = np.stack([np.asarray(q.codebook[...]) for q in quantizer.quantizers])
  z_q = np.stack([tables[i][np.asarray(full.codes)[..., i]] for i in range(3)])
  error = np.square(np.moveaxis(np.asarray(full.latents), 2, 0) - z_q).mean((2, 3))  # [K, B]
  np.testing.assert_allclose([some.commitment, some.codebook], (error * mask).mean(1).sum(), rtol=1e-5)
  np.testing.assert_allclose(full.commitment, error.mean(1).sum(), rtol=1e-5)


def test_moving_averages_are_numpys():
  quantizer = QuantizerConfig(kind='ema', num_codebooks=1, codebook_size=6, code_dim=3, ema_decay=0.9, revive_below=0)
  generator = np.random.default_rng(0)
  table = generator.standard_normal((6, 3)).astype(np.float32)
  codes = np.array([[[0], [0], [1], [2]], [[2], [4], [5], [5]]])
  latents = generator.standard_normal((2, 4, 1, 3)).astype(np.float32)
  mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
  tables, states, found = care(codes, latents, [jnp.asarray(table)], quantizer=quantizer, mask=mask)
  mass, sums = np.full(6, 0.9), 0.9 * table
  for code, latent, real in zip(codes.ravel(), latents.reshape(-1, 3), mask.ravel(), strict=True):
    mass[code] += 0.1 * real
    sums[code] += 0.1 * real * latent
  np.testing.assert_allclose(states[0]['mass'], mass, rtol=1e-6)
  np.testing.assert_allclose(states[0]['sums'], sums, rtol=1e-5)
  np.testing.assert_allclose(tables[0], sums / mass[:, None], rtol=1e-5)
  np.testing.assert_allclose(np.asarray(tables[0])[[3, 5]], table[[3, 5]], rtol=1e-6)  # not drawn, or in padding only
  counts = np.bincount(codes.ravel(), weights=mask.ravel(), minlength=6)
  np.testing.assert_allclose(states[0]['counts'], 0.9 + 0.1 * counts * 6 / counts.sum(), rtol=1e-6)
  assert found['usage_acoustic'] == pytest.approx(4 / 6)


@pytest.mark.parametrize('levels', [(8, 8, 8, 6, 5), (3, 2), (5,)])
def test_fsq_codes_round_trip(levels):
  """Every code: its latent is quantized to itself; and nothing outside of the grid is ever returned."""
  dim, count = len(levels), int(np.prod(levels))
  config = QuantizerConfig(kind='fsq', fsq_levels=levels)
  quantizer = FiniteScalarQuantizer(dim, config, rngs=nnx.Rngs(0))
  for projection in (quantizer.in_proj, quantizer.out_proj):  # the identity
    projection.weight_v[...], projection.weight_g[...] = jnp.eye(dim)[None], jnp.ones(dim)
  codes = jnp.arange(count)[None]
  grid = np.asarray(quantizer.lookup(codes))
  assert len(np.unique(grid[0].round(4), axis=0)) == count
  assert grid.min() == -1.0 and grid.max() <= 1.0
  # Undo the bound of the paper's appendix A to find the input that lands on each grid point.
  sizes = np.array(levels)
  reach, half = (sizes - 1) * 1.001 / 2, sizes // 2
  offset = np.where(sizes % 2 == 0, 0.5, 0.0)
  z = np.arctanh(np.clip((grid * half + offset) / reach, -0.9999, 0.9999)) - np.arctanh(offset / reach)
  run = fast(lambda z: quantizer(z))
  quantized, found, _, commitment, codebook = run(jnp.asarray(z, jnp.float32))
  assert np.array_equal(found, codes)
  np.testing.assert_allclose(quantized, grid, atol=1e-5)
  near_zero = run(jnp.full((1, 2, dim), jnp.array([[-0.05], [0.05]])))[0]
  assert not np.any(near_zero)  # the middle level is around 0 for even and odd numbers of levels
  assert not np.any(commitment) and not np.any(codebook)
  corners = np.array(list(itertools.product((-1e3, 1e3), repeat=dim)), np.float32)[None]
  quantized, found, *_ = run(jnp.asarray(corners))
  assert found.min() == 0 and found.max() == count - 1
  np.testing.assert_allclose(quantized, quantizer.lookup(found), atol=1e-5)


# ---------------------------------------------------------------- codebook care


def clustered(clusters=32, per_cluster=16, dim=4, seed=0):
  generator = np.random.default_rng(seed)
  centres = generator.standard_normal((clusters, dim)) * 3
  return (np.repeat(centres, per_cluster, 0)
          + 0.05 * generator.standard_normal((clusters * per_cluster, dim))).astype(np.float32)


def test_kmeans_centroids_are_their_points_means():
  points = clustered()
  table = np.asarray(fast(codebook_rules.kmeans, static_argnums=2)(jax.random.key(0), points, 32))
  codes = np.asarray(nearest_codes(points, l2_normalise(table)))
  counts = np.bincount(codes, minlength=32)
  assert (counts > 0).sum() >= 28
  means = np.stack([points[codes == s].mean(0) if counts[s] else table[s] for s in range(32)])
  np.testing.assert_allclose(table, means, atol=1e-3)


def test_kmeans_with_fewer_points_than_codes_repeats_none():
  table = np.asarray(codebook_rules.kmeans(jax.random.key(0), clustered(3, 2), 32))
  assert table.shape == (32, 4) and len(np.unique(table, axis=0)) == 32


def revived(quantizer, steps, quirks=FIXED):
  """Perplexities over `steps` steps of a codebook that starts collapsed, on latents of 32 clusters."""
  points = clustered()
  latents = points.reshape(4, -1, 1, 4)
  table = jnp.asarray(points[0] + 0.001 * np.random.default_rng(1).standard_normal((32, 4)), jnp.float32)
  tables, states, figures = [table], None, []
  for step in range(steps):
    codes = nearest_codes(latents, l2_normalise(tables[0]))
    tables, states, found = care(codes, latents, tables, quantizer=quantizer, step=step, states=states, quirks=quirks,
                                 seed=step)
    figures.append(found['perplexity_acoustic'])
  return figures


@pytest.mark.parametrize('kind', ['vq', 'ema'])
def test_a_collapsed_codebook_comes_alive(kind):
  quantizer = QuantizerConfig(kind=kind, num_codebooks=1, codebook_size=32, code_dim=4, revive_below=0.3,
                              revive_every=5, usage_decay=0.5)
  figures = revived(quantizer, 30)
  assert max(figures[:4]) < 8 and figures[-1] > 20
  assert max(revived(quantizer, 15, quirks=QuirksConfig(dead_codes=True))) < 12


def test_revival_keeps_to_its_schedule():
  quantizer = QuantizerConfig(num_codebooks=1, codebook_size=4, code_dim=4, revive_every=5, revive_until=0.5)
  table = jnp.asarray(np.arange(16).reshape(4, 4), jnp.float32)
  latents = np.full((1, 6, 1, 4), 7.0, np.float32)
  latents[0, 3:] = np.nan  # padding: no code may be drawn from it
  codes, mask = np.zeros((1, 6, 1), int), np.array([[1, 1, 1, 0, 0, 0]])
  dead = [{'counts': jnp.array([1.0, 0.0, 0.0, 0.5])}]
  for step, replaces in ((4, True), (49, True), (3, False), (5, False), (54, False), (99, False)):
    for quirks in (QuirksConfig(), QuirksConfig(dead_codes=True)):
      tables, states, _ = care(codes, latents, [table], quantizer=quantizer, step=step, mask=mask, states=dead,
                               quirks=quirks)
      on = replaces and not quirks.dead_codes
      expected = np.where([[False], [on], [on], [False]], 7.0, table)
      np.testing.assert_array_equal(tables[0], expected)
      assert (np.asarray(states[0]['counts'])[1:3] == (1.0 if on else 0.0)).all()


# ---------------------------------------------------------------- golden


GOLDEN = '''
The figures of a fixed training step changed. Right after a change that is *meant* to move them (initialisation, a loss,
the order inside the step, a random stream, the bundled speech), look at each, then pin them again:

    python tests/make_golden_step.py

Any other change must leave them as they are.
'''


def test_golden_step():
  expected = json.loads(FIXTURE.read_text())
  for number, (got, want) in enumerate(zip(golden_steps(), expected, strict=True)):
    assert got == pytest.approx(want, rel=2e-3), f'step {number}. {GOLDEN}'
