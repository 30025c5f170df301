"""The functional distillation step: one pure function from (state, teacher, batch) to (state, metrics).

Order, as in the release (`kakao/lmspt`): one generator forward; the discriminators learn on its detached output; the
generator's loss is taken against the *updated* discriminators; one backward of that same forward. The generator's
loss is a function of what the forward returned, so its gradient is a cotangent for the forward's pullback, and no
discriminator weight gradient is computed on the way.

Axes: B batch (global), N samples, T frames.
"""

from __future__ import annotations

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
from lmspt_jax.training import codebooks as codebook_rules
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


def weigh(terms: dict[str, Array], weights: LossConfig) -> Array:
  """The generator's loss: the terms times their weights, summed."""
  return sum(getattr(weights, name) * value for name, value in terms.items())


def make_train_step(experiment: Experiment) -> TrainStep:
  """The step of an experiment, to be jitted with the state donated.

  The batch holds `audio` float32 [B, N] in [-1, 1] at the model's rate, N a multiple of the hop, and `num_samples`
  int32 [B], how many of them are real (the rest is zero padding).
  """
  config = experiment.config
  model, loss, quirks = config.model, config.loss, config.quirks

  def train_step(state: TrainState, teacher_params: Any, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
    audio_BN, num_samples_B = batch['audio'], batch['num_samples']
    step_key = lambda name: rng.stream(config.train.seed, name, state.step)
    active_B = active_codebooks(step_key('quantizer_dropout'), audio_BN.shape[0], model.acoustic)

    def generate(params):
      out = experiment.tokenizer(params['tokenizer'], state.codebooks)(
          audio_BN, active_B=active_B, attached_subtraction=quirks.attached_subtraction)
      student = experiment.distillation.student(params['distillation'], out)
      forward = Forward(out.audio, student, out.semantic.commitment, out.semantic.codebook,
                        out.acoustic.commitment, out.acoustic.codebook)
      return forward, {'semantic': out.semantic, 'acoustic': out.acoustic}

    forward, pull_back, quantized = jax.vjp(generate, state.generator, has_aux=True)

    # ---------------------------------------------------------------- discriminators
    fake_BN = jax.lax.stop_gradient(forward.audio)

    def discriminate(params):
      maps = experiment.discriminators(params)(jnp.concatenate([audio_BN, fake_BN]))
      real, fake = (jax.tree.map(lambda x, part=part: jnp.split(x, 2)[part], maps) for part in (0, 1))
      return discriminator_loss(real, fake)

    d_loss, d_gradients = jax.value_and_grad(discriminate)(state.discriminator)
    d_updates, discriminator_opt = experiment.discriminator_tx.update(
        d_gradients, state.discriminator_opt, state.discriminator)
    discriminator = optax.apply_updates(state.discriminator, d_updates)

    # ---------------------------------------------------------------- generator
    def generator_loss(forward: Forward):
      judge = experiment.discriminators(discriminator)
      fake, real = judge(forward.audio), judge(audio_BN)
      terms = {
          'semantic_commitment': forward.semantic_commitment, 'semantic_codebook': forward.semantic_codebook,
          'acoustic_commitment': forward.acoustic_commitment, 'acoustic_codebook': forward.acoustic_codebook,
          'adversarial': generator_adversarial_loss(fake), 'feature_matching': feature_matching_loss(real, fake),
          'mel': multi_scale_mel_loss(forward.audio, audio_BN, model.sample_rate, loss.mel_bins, loss.mel_windows),
          'distillation': experiment.distillation.loss(teacher_params, audio_BN, num_samples_B, forward.student),
      }
      return weigh(terms, loss), terms

    (g_loss, terms), cotangent = jax.value_and_grad(generator_loss, has_aux=True)(forward)
    (g_gradients,) = pull_back(cotangent)
    g_updates, generator_opt = experiment.generator_tx.update(g_gradients, state.generator_opt, state.generator)
    generator = optax.apply_updates(state.generator, g_updates)

    # ---------------------------------------------------------------- codebooks
    frames = quantized['semantic'].codes.shape[1]
    mask_BT = (jnp.arange(frames) * model.hop < num_samples_B[:, None]).astype(jnp.float32)
    tokenizer, codebooks, usage = codebook_rules.update(
        step_key('revival'), state.step, config.train.num_steps, model, quirks, generator['tokenizer'],
        state.codebooks, quantized, mask_BT)

    items = jnp.asarray(audio_BN.shape[0], jnp.float32)
    metrics = {f'loss/{name}': mean(value, items) for name, value in terms.items()}
    metrics |= {
        'loss/generator': mean(g_loss, items), 'loss/discriminator': mean(d_loss, items),
        'gradient/generator': mean(optax.tree.norm(g_gradients)),
        'gradient/discriminator': mean(optax.tree.norm(d_gradients)),
        'audio_seconds': (jnp.sum(num_samples_B) / model.sample_rate, jnp.ones(()))}
    metrics |= {f'codebook/{name}': pair for name, pair in usage.items()}
    new_state = TrainState(
        step=state.step + 1, generator={**generator, 'tokenizer': tokenizer}, codebooks=codebooks,
        discriminator=discriminator, generator_opt=generator_opt, discriminator_opt=discriminator_opt)
    return new_state, metrics

  return train_step
