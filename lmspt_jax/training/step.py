"""The functional distillation step: one pure function from (state, teacher, batch) to (state, metrics).

Order, as in the release (`kakao/lmspt`): one generator forward; the discriminators learn on its detached output; the
generator's loss is taken against the *updated* discriminators; one backward of that same forward. The generator's
loss is a function of what the forward returned, so its gradient is a cotangent for the forward's pullback, and no
discriminator weight gradient is computed on the way.

With compute.accumulation the batch is worked through part by part, first by the discriminators, then by the generator
against the updated ones; its forward is computed a second time there, as what the pullback needs of all parts would be
the memory of the whole batch.

Axes: B batch (global), N samples, T frames, K codebooks, D code dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from lmspt_jax import rng
from lmspt_jax.config import LossConfig
from lmspt_jax.losses.adversarial import discriminator_loss, feature_matching_loss, generator_adversarial_loss
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.metrics import Metrics, mean
from lmspt_jax.models.quantizers import active_codebooks
from lmspt_jax.sharding import SPREAD, constrain, gathered
from lmspt_jax.training import codebooks as codebook_rules
from lmspt_jax.training.codebooks import Drawn
from lmspt_jax.training.frozen import Frozen
from lmspt_jax.training.state import Experiment, TrainState

TrainStep = Callable[[TrainState, Any, dict[str, Array]], tuple[TrainState, Metrics]]


@struct.dataclass
class Forward:
  """The differentiable outputs of one generator forward.

  Attributes:
    audio: [B, N] reconstruction.
    student: what the distillation strategy compares with the teacher.
    semantic_commitment, semantic_codebook, acoustic_commitment, acoustic_codebook: scalars.
  """

  audio: Array
  student: Array
  semantic_commitment: Array
  semantic_codebook: Array
  acoustic_commitment: Array
  acoustic_codebook: Array


@struct.dataclass
class Part:
  """A share of the batch.

  Attributes:
    audio: [B, N]; num_samples: [B]; active: [B], acoustic codebooks in use.
    share: what its mean counts for in the mean over the batch; distillation_share: the same of that loss, which leaves
      padding out.
  """

  audio: Array
  num_samples: Array
  active: Array
  share: Array
  distillation_share: Array


def weigh(terms: dict[str, Array], weights: LossConfig) -> Array:
  """The generator's loss: the terms times their weights, summed."""
  return sum(getattr(weights, name) * value for name, value in terms.items())


def make_train_step(experiment: Experiment, shardings: TrainState | None = None) -> TrainStep:
  """The step of an experiment, to be jitted with the state donated.

  The batch holds `audio` float32 [B, N] in [-1, 1] at the model's rate, N a multiple of the hop, and `num_samples`
  int32 [B], how many of them are real (the rest is zero padding). On a mesh (`jax.set_mesh`), gradients are summed
  straight into `shardings`.

  A step whose losses or gradients are not finite changes nothing but `step` and `skipped_in_row`: its metrics have no
  weight, but for `skipped` and `nonfinite/NAME` (1 or 0) and `audio_seconds`.
  """
  config = experiment.config
  model, loss, quirks, parts = config.model, config.loss, config.quirks, config.compute.accumulation
  frozen = Frozen(config.train.freeze)

  def generate(params, codebooks, part: Part):
    params = frozen.hold('generator', params)
    with jax.named_scope('codec'):
      out = experiment.tokenizer(params['tokenizer'], codebooks)(
          part.audio, active_B=part.active, attached_subtraction=quirks.attached_subtraction)
    student = experiment.distillation.student(params['distillation'], out)
    forward = Forward(out.audio, student, out.semantic.commitment, out.semantic.codebook,
                      out.acoustic.commitment, out.acoustic.codebook)
    return forward, {name: Drawn(q.codes, q.latents) for name, q in
                     (('semantic', out.semantic), ('acoustic', out.acoustic))}

  def discriminate(params, audio_BN, fake_BN):
    params = frozen.hold('discriminator', params)
    with jax.named_scope('discriminators'):
      # Every item beside its copy: one half after the other would move audio between the devices of a mesh.
      pairs = jnp.stack([audio_BN, fake_BN], axis=1).reshape(-1, audio_BN.shape[1])
      maps = experiment.discriminators(params)(pairs)
      real, fake = (jax.tree.map(lambda x, part=part: x.reshape(-1, 2, *x.shape[1:])[:, part], maps) for part in (0, 1))
      return discriminator_loss(real, fake)

  def judge(forward: Forward, discriminator, teacher_params, part: Part):
    """A part's share of the generator's loss, and of its terms."""
    with jax.named_scope('discriminators'):
      judges = experiment.discriminators(discriminator)
      fake, real = judges(forward.audio), judges(part.audio)
    with jax.named_scope('teacher'):
      distance = experiment.distillation.loss(teacher_params, part.audio, part.num_samples, forward.student)
    terms = {
        'semantic_commitment': forward.semantic_commitment, 'semantic_codebook': forward.semantic_codebook,
        'acoustic_commitment': forward.acoustic_commitment, 'acoustic_codebook': forward.acoustic_codebook,
        'adversarial': generator_adversarial_loss(fake), 'feature_matching': feature_matching_loss(real, fake),
        'mel': multi_scale_mel_loss(forward.audio, part.audio, model.sample_rate, loss.mel_bins, loss.mel_windows)}
    terms = {name: value * part.share for name, value in terms.items()}
    terms['distillation'] = distance * part.distillation_share
    return weigh(terms, loss), terms

  def split(whole: Part) -> Part:
    """Parts along a new first axis. Every part takes rows of every device, so that no audio moves."""
    apart = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    audio, num_samples, active = map(apart, (whole.audio, whole.num_samples, whole.active))
    weights = jax.vmap(lambda n: experiment.distillation.weight(n, audio.shape[-1]))(num_samples)
    total = jnp.sum(weights)
    return Part(audio, num_samples, active, jnp.full((parts,), 1 / parts),
                weights / jnp.where(total > 0, total, 1.0))

  def join(x: Array) -> Array:
    """The inverse of `split` for one array."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

  def into_shards(gradients, where: str):
    if shardings is None:
      return gradients
    # Summed whole, then cut (the compiler makes one operation of it). Without that stop the parameters' splits would
    # spread into the backward pass, and activations be gathered over the mesh.
    return jax.lax.with_sharding_constraint(gathered(gradients), getattr(shardings, where))

  def update(transformation, gradients, opt_state, params):
    with jax.named_scope('optimizer'):
      updates, opt_state = transformation.update(gradients, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

  def train_step(state: TrainState, teacher_params: Any, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
    audio_BN, num_samples_B = constrain((batch['audio'], batch['num_samples']), SPREAD)
    step_key = lambda name: rng.stream(config.train.seed, name, state.step)
    active_B = active_codebooks(step_key('quantizer_dropout'), audio_BN.shape[0], model.acoustic)
    whole = Part(audio_BN, num_samples_B, active_B, jnp.ones(()), jnp.ones(()))
    generator, discriminator = gathered(state.generator), gathered(state.discriminator)

    def learn_discriminator(part, forward):
      found = jax.value_and_grad(discriminate)(discriminator, part.audio, jax.lax.stop_gradient(forward.audio))
      return jax.tree.map(lambda x: x * part.share, found)

    def learn_discriminator_anew(part):
      forward, drawn = generate(generator, state.codebooks, part)
      return learn_discriminator(part, forward), drawn

    def learn_generator_anew(part):
      objective = lambda params: judge(generate(params, state.codebooks, part)[0], judges, teacher_params, part)
      return jax.value_and_grad(objective, has_aux=True)(generator), None

    # ---------------------------------------------------------------- discriminators, then the generator against them
    if parts == 1:
      forward, pull_back, drawn = jax.vjp(lambda p: generate(p, state.codebooks, whole), generator, has_aux=True)
      d_loss, d_gradients = learn_discriminator(whole, forward)
    else:
      several = split(whole)
      (d_loss, d_gradients), drawn = _summed(learn_discriminator_anew, several)
      drawn = jax.tree.map(join, drawn)
    d_gradients = into_shards(d_gradients, 'discriminator')
    new_discriminator, discriminator_opt = update(
        experiment.discriminator_tx, d_gradients, state.discriminator_opt, state.discriminator)
    new_discriminator = frozen.keep('discriminator', new_discriminator, state.discriminator)
    judges = gathered(new_discriminator)

    if parts == 1:
      (g_loss, terms), cotangent = jax.value_and_grad(judge, has_aux=True)(forward, judges, teacher_params, whole)
      (g_gradients,) = pull_back(cotangent)
    else:
      ((g_loss, terms), g_gradients), _ = _summed(learn_generator_anew, several)
    g_gradients = into_shards(g_gradients, 'generator')
    new_generator, generator_opt = update(experiment.generator_tx, g_gradients, state.generator_opt, state.generator)

    # ---------------------------------------------------------------- codebooks, moving average
    frames = drawn['semantic'].codes.shape[1]
    mask_BT = (jnp.arange(frames) * model.hop < num_samples_B[:, None]).astype(jnp.float32)
    updated = codebook_rules.update(
        step_key('revival'), state.step, config.train.num_steps, model, quirks, new_generator['tokenizer'],
        state.codebooks, drawn, mask_BT)
    new_generator = frozen.keep('generator', {**new_generator, 'tokenizer': updated.params}, state.generator)
    updated = updated.replace(params=new_generator['tokenizer'],
                              codebooks=frozen.keep('codebooks', updated.codebooks, state.codebooks))
    average = state.average
    if average:
      # Short at first, so that the start is soon forgotten.
      decay = jnp.minimum(config.train.ema_decay, (1.0 + state.step) / (10.0 + state.step))
      average = codebook_rules.moving_average(decay, average, updated)

    # ---------------------------------------------------------------- unless something is not finite
    losses = {**{f'loss/{name}': value for name, value in terms.items()},
              'loss/generator': g_loss, 'loss/discriminator': d_loss}
    norms = {'gradient/generator': optax.tree.norm(g_gradients), 'gradient/discriminator': optax.tree.norm(d_gradients)}
    broken = {name: ~jnp.isfinite(value) for name, value in {**losses, **norms}.items()}
    # NaN where one of them is not finite, else 0. XLA:CPU copies cheap scalars into the choice of every leaf below: it
    # would be all that the losses are summed from. It does not copy a root.
    skipped = jnp.isnan(optax.tree.norm([0 * value for value in (*losses.values(), *norms.values())]))
    new_state = TrainState(
        step=state.step, generator=new_generator, codebooks=updated.codebooks,
        discriminator=new_discriminator, generator_opt=generator_opt, discriminator_opt=discriminator_opt,
        average=average, skipped_in_row=jnp.zeros((), jnp.int32))
    new_state = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), new_state, state)
    new_state = dataclasses.replace(new_state, step=state.step + 1,
                                    skipped_in_row=jnp.where(skipped, state.skipped_in_row + 1, 0))

    items = jnp.asarray(audio_BN.shape[0], jnp.float32)
    metrics = {name: mean(value, items) for name, value in losses.items()}
    metrics |= {name: mean(value) for name, value in norms.items()}
    metrics |= {f'codebook/{name}': pair for name, pair in updated.metrics.items()}
    metrics = jax.tree.map(lambda x: jnp.where(skipped, 0.0, x), metrics)
    metrics |= {'skipped': mean(skipped.astype(jnp.float32)),
                'audio_seconds': (jnp.sum(num_samples_B) / model.sample_rate, jnp.ones(()))}
    metrics |= {f'nonfinite/{name}': mean(value.astype(jnp.float32)) for name, value in broken.items()}
    return new_state, metrics

  return train_step


def _summed(function: Callable[[Part], tuple[Any, Any]], parts: Part) -> tuple[Any, Any]:
  """`function` over the parts, one after the other: the sum of its first results, the second ones stacked."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(lambda: function(jax.tree.map(lambda x: x[0], parts))[0]))

  def add(total, part):
    found, rest = function(part)
    return jax.tree.map(jnp.add, total, found), rest

  return jax.lax.scan(add, zeros, parts)
