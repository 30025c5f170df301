"""Vector quantizers: factorised l2-normalised VQ (by gradient or moving average), FSQ, and the residual stack.

Axes: B batch, T frames, C latent channels, D code dimension, K codebooks, S codebook size.

References: ViT-VQGAN (arXiv 2110.04627) and DAC (arXiv 2306.06546) for the factorised lookup, VQ-VAE-2 (arXiv
1906.00446) for moving averages, FSQ (arXiv 2309.15505), SoundStream (arXiv 2107.03312) for quantizer dropout.
How codebooks start and how dead codes come back is in `training/codebooks.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from lmspt_jax.config import QuantizerConfig
from lmspt_jax.models.layers import PRECISION, Conv1d

# Codes that may be nearest but for rounding; frames of silence have that many that are nearly the same.
CANDIDATES = 3


class CodebookState(nnx.Variable):
  """What training knows of a codebook and gradients don't: usage counts and moving averages. Never a parameter."""


@struct.dataclass
class QuantizerOutput:
  """What a residual quantizer returns.

  Attributes:
    quantized: [B, T, C], the sum of the codebooks in use, straight through.
    codes: [B, T, K] int32.
    latents: [B, T, K, D], what each codebook was asked to represent, before lookup. No gradient.
    commitment: scalar, mean over batch, sum over codebooks of mse(z_e, sg(z_q)).
    codebook: scalar, the same of mse(sg(z_e), z_q).
  """

  quantized: Array
  codes: Array
  latents: Array
  commitment: Array
  codebook: Array


def l2_normalise(x: Array) -> Array:
  """x / max(|x|, 1e-12) over the last axis (torch.nn.functional.normalize), with a finite gradient at 0."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-24))


def nearest_codes(latents_BTD: Float[Array, '*B D'], directions_SD: Float[Array, 'S D']) -> Int[Array, '*B']:
  """The code of largest cosine similarity; of equal ones the first.

  Training brings codes closer together than float32 tells similarities near 1 apart, and then any change in rounding
  (another backend, an exported graph) would change the code. So the most similar ones are compared once more, by what
  they differ in, which float32 tells apart as well as anything.

  Args:
    directions_SD: the codes, of length 1.
  """
  latents_BTD, directions_SD = jax.lax.stop_gradient((latents_BTD, directions_SD))
  similarity = jnp.einsum('...d,sd->...s', l2_normalise(latents_BTD), directions_SD, precision=PRECISION)
  found = []
  for _ in range(min(CANDIDATES, len(directions_SD))):
    found.append(jnp.argmax(similarity, axis=-1))
    taken = jnp.arange(similarity.shape[-1]) == found[-1][..., None]
    similarity = jnp.where(taken, -jnp.inf, similarity)
  codes_BTN = jnp.stack(found, axis=-1)  # N candidates
  candidates_BTND = jnp.take(directions_SD, codes_BTN, axis=0)
  gains_BTN = jnp.sum(latents_BTD[..., None, :] * (candidates_BTND - candidates_BTND[..., :1, :]), axis=-1)
  best_BT1 = jnp.argmax(gains_BTN, axis=-1, keepdims=True)
  # A compiler may make something else than 0 of the difference of equal codes.
  equal_BTN = jnp.all(candidates_BTND == jnp.take_along_axis(candidates_BTND, best_BT1[..., None], axis=-2), axis=-1)
  return jnp.min(jnp.where(equal_BTN, codes_BTN, len(directions_SD)), axis=-1).astype(jnp.int32)


def straight_through(z_e: Array, z_q: Array) -> Array:
  """The value of z_q with the gradient of z_e."""
  return z_e + jax.lax.stop_gradient(z_q - z_e)


class VectorQuantizer(nnx.Module):
  """One factorised codebook: project to D, nearest code by cosine, the code itself (not normalised), project back.

  `directions` [S, D] are the codes at length 1, in a folded model (`folding`); None where they change, in training.
  """

  def __init__(self, latent_dim: int, config: QuantizerConfig, *, rngs: nnx.Rngs):
    self.in_proj = Conv1d(latent_dim, config.dim, 1, rngs=rngs)
    self.out_proj = Conv1d(config.dim, latent_dim, 1, rngs=rngs)
    table_SD = jax.random.normal(rngs.params(), (config.size, config.dim), jnp.float32)  # as torch.nn.Embedding
    self.learnt_by_gradient = config.kind == 'vq'
    self.codebook = nnx.Param(table_SD) if self.learnt_by_gradient else CodebookState(table_SD)
    self.directions = nnx.data(None)
    # How often each code is drawn, 1 being a fair share; it decides which codes are dead.
    self.counts = CodebookState(jnp.ones((config.size,), jnp.float32))
    if not self.learnt_by_gradient:  # a code is sums / mass, both moving averages over steps
      self.sums = CodebookState(table_SD)
      self.mass = CodebookState(jnp.ones((config.size,), jnp.float32))

  def lookup(self, codes_BT: Int[Array, 'B T']) -> Float[Array, 'B T C']:
    """Codes to latents."""
    return self.out_proj(jnp.take(self.codebook[...], codes_BT, axis=0))

  def __call__(self, z_BTC: Float[Array, 'B T C']) -> tuple[Array, Array, Array, Array, Array]:
    """Returns quantized [B, T, C], codes [B, T], latents [B, T, D], and per-item losses commitment, codebook [B]."""
    z_e = self.in_proj(z_BTC)
    directions_SD = l2_normalise(self.codebook[...]) if self.directions is None else self.directions[...]
    codes_BT = nearest_codes(z_e, directions_SD)
    z_q = jnp.take(self.codebook[...], codes_BT, axis=0)
    commitment_B = jnp.mean(jnp.square(z_e - jax.lax.stop_gradient(z_q)), axis=(1, 2))
    if self.learnt_by_gradient:
      codebook_B = jnp.mean(jnp.square(jax.lax.stop_gradient(z_e) - z_q), axis=(1, 2))
    else:
      codebook_B = jnp.zeros_like(commitment_B)
    return self.out_proj(straight_through(z_e, z_q)), codes_BT, jax.lax.stop_gradient(z_e), commitment_B, codebook_B


class FiniteScalarQuantizer(nnx.Module):
  """FSQ: each of D bounded dimensions rounded to one of its levels; the code is their mixed-radix number."""

  def __init__(self, latent_dim: int, config: QuantizerConfig, *, rngs: nnx.Rngs):
    self.in_proj = Conv1d(latent_dim, config.dim, 1, rngs=rngs)
    self.out_proj = Conv1d(config.dim, latent_dim, 1, rngs=rngs)
    self.levels = config.fsq_levels

  def radix(self) -> tuple[Int[Array, 'D'], Int[Array, 'D']]:
    """(levels, basis): digit i of a code counts from 0 to levels[i] - 1 and weighs basis[i]."""
    levels = jnp.array(self.levels)
    basis = jnp.array([math.prod(self.levels[:i]) for i in range(len(self.levels))])
    return levels, basis

  def bounds(self) -> tuple[Float[Array, 'D'], Float[Array, 'D']]:
    """(reach, offset): before rounding a dimension is between -reach - offset and reach - offset.

    The bound reaches just past the outermost level, so that every level is a rounding target (paper, appendix A).
    """
    levels, _ = self.radix()
    return (levels - 1) * (1 + 1e-3) / 2, jnp.where(levels % 2 == 0, 0.5, 0.0)

  def lookup(self, codes_BT: Int[Array, 'B T']) -> Float[Array, 'B T C']:
    """Codes to latents."""
    levels, basis = self.radix()
    half = levels // 2
    digits = (codes_BT[..., None] // basis) % levels
    return self.out_proj((digits - half) / half.astype(jnp.float32))

  def __call__(self, z_BTC: Float[Array, 'B T C']) -> tuple[Array, Array, Array, Array, Array]:
    """As `VectorQuantizer.__call__`; both losses are 0."""
    (levels, basis), (reach, offset) = self.radix(), self.bounds()
    z_e = self.in_proj(z_BTC)
    bounded = jnp.tanh(z_e + jnp.arctanh(offset / reach)) * reach - offset
    whole = jnp.round(bounded)
    half = levels // 2
    codes_BT = jnp.sum((whole.astype(jnp.int32) + half) * basis, axis=-1).astype(jnp.int32)
    z_q = straight_through(bounded, whole) / half
    zero_B = jnp.zeros(z_BTC.shape[0], jnp.float32)
    return self.out_proj(z_q), codes_BT, jax.lax.stop_gradient(z_e), zero_B, zero_B


class ResidualQuantizer(nnx.Module):
  """Codebooks in sequence, each on what the earlier ones left over."""

  def __init__(self, latent_dim: int, config: QuantizerConfig, *, rngs: nnx.Rngs):
    one = FiniteScalarQuantizer if config.kind == 'fsq' else VectorQuantizer
    self.quantizers = nnx.List([one(latent_dim, config, rngs=rngs) for _ in range(config.num_codebooks)])

  def __call__(self, z_BTC: Float[Array, 'B T C'], active_B: Int[Array, 'B'] | None = None) -> QuantizerOutput:
    """Quantizes.

    Args:
      z_BTC: latents.
      active_B: how many codebooks each item uses (quantizer dropout); None uses all. An item's unused codebooks add
        nothing to its sum and its losses, but still follow the residual, as in the release.
    """
    batch = z_BTC.shape[0]
    residual, quantized = z_BTC, jnp.zeros_like(z_BTC)
    commitment = codebook = jnp.zeros((), jnp.float32)
    codes, latents = [], []
    for i, quantizer in enumerate(self.quantizers):
      z_q, codes_BT, z_e, commitment_B, codebook_B = quantizer(residual)
      mask_B = jnp.ones(batch, jnp.float32) if active_B is None else (i < active_B).astype(jnp.float32)
      quantized = quantized + z_q * mask_B[:, None, None]
      residual = residual - z_q
      commitment = commitment + jnp.mean(commitment_B * mask_B)
      codebook = codebook + jnp.mean(codebook_B * mask_B)
      codes.append(codes_BT)
      latents.append(z_e)
    return QuantizerOutput(quantized, jnp.stack(codes, -1), jnp.stack(latents, 2), commitment, codebook)

  def lookup(self, codes_BTK: Int[Array, 'B T K']) -> Float[Array, 'B T C']:
    """The sum of the first K codebooks' latents; K may be smaller than the number of codebooks.

    A negative code adds nothing. Exported graphs, whose K is not known when they are written, leave codebooks out so.
    """
    return sum(jnp.where(codes_BTK[..., i, None] < 0, 0.0, q.lookup(codes_BTK[..., i]))
               for i, q in zip(range(codes_BTK.shape[-1]), self.quantizers, strict=False))


def active_codebooks(key: Array, batch: int, config: QuantizerConfig) -> Int[Array, 'B']:
  """Quantizer dropout: the first int(dropout * batch) items use a random number of codebooks in 1..K, the rest all."""
  drawn = jax.random.randint(key, (batch,), 1, config.num_codebooks + 1)
  return jnp.where(jnp.arange(batch) < int(config.dropout * batch), drawn, config.num_codebooks).astype(jnp.int32)
