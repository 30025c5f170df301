"""Least-squares adversarial losses and feature matching, as in DAC (arXiv 2306.06546) and the LM-SPT release.

Arguments are what `Discriminators` returns: for each sub-discriminator a list of feature maps of any shape, the last
being the logits. Every loss is a float32 scalar, averaged over a map and summed over maps and sub-discriminators.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Maps = Sequence[Sequence[Array]]


def discriminator_loss(real: Maps, fake: Maps) -> Float[Array, '']:
  """mean(D(fake)^2) + mean((1 - D(real))^2). The generator's output must be stopped before it reaches D."""
  return _sum(_mean_square(f[-1]) + _mean_square(1 - r[-1]) for r, f in zip(real, fake, strict=True))


def generator_adversarial_loss(fake: Maps) -> Float[Array, '']:
  """mean((1 - D(fake))^2)."""
  return _sum(_mean_square(1 - f[-1]) for f in fake)


def feature_matching_loss(real: Maps, fake: Maps) -> Float[Array, '']:
  """Mean absolute difference of every feature map but the logits; no gradient flows into `real`."""
  return _sum(
      jnp.mean(jnp.abs(f.astype(jnp.float32) - jax.lax.stop_gradient(r).astype(jnp.float32)))
      for reals, fakes in zip(real, fake, strict=True) for r, f in zip(reals[:-1], fakes[:-1], strict=True))


def _mean_square(x: Array) -> Array:
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


def _sum(terms) -> Array:
  return sum(terms, jnp.zeros((), jnp.float32))
