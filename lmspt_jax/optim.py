"""Optimizers: AdamW, linear warm-up, cosine decay, gradients clipped by their global norm."""

from __future__ import annotations

import optax

from lmspt_jax.config import OptimizerConfig

# PyTorch's AdamW default, at which the release's discriminator trains (quirks.discriminator_default_lr).
PYTORCH_DEFAULT_LEARNING_RATE = 1e-3


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Linear from 0 over warmup_steps, then cosine to final_learning_rate at num_steps."""
  warmup = min(config.warmup_steps, max(num_steps - 1, 0))
  return optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, warmup, num_steps, config.final_learning_rate)


def optimizer(config: OptimizerConfig, num_steps: int, *,
              pytorch_default: bool = False) -> optax.GradientTransformation:
  """The update rule of one network.

  Args:
    config: hyper-parameters.
    num_steps: length of training, for the cosine.
    pytorch_default: a constant PYTORCH_DEFAULT_LEARNING_RATE in place of the schedule.
  """
  rate = PYTORCH_DEFAULT_LEARNING_RATE if pytorch_default else schedule(config, num_steps)
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay))
