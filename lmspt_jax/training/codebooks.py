"""Keeping codebooks alive: k-means start, usage statistics, moving averages and revival, as pure functions.

Axes: B batch, T frames, K codebooks, S codebook size, D code dimension, P points.

A small run of a factorised VQ that starts from random codes ends up drawing a handful of them: the untrained
encoder's latents are tiny and point nearly one way, and a code that is never drawn gets no gradient. So the layers
that make the latents start standardised on the first batches (weight norm's data-dependent initialisation, arXiv
1602.07868, section 3), codes start where the latents are (Jukebox, arXiv 2005.00341, section 3.2), and a code that
falls out of use is moved onto a latent of the current batch (SoundStream, arXiv 2107.03312, section 3.3).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lmspt_jax.config import ModelConfig, QuantizerConfig, QuirksConfig
from lmspt_jax.models.quantizers import l2_normalise, nearest_codes

PARTS = {'semantic': 'semantic_quantizer', 'acoustic': 'acoustic_quantizer'}


@struct.dataclass
class Drawn:
  """What a residual quantizer drew for the global batch: codes int32 [B, T, K] and latents float32 [B, T, K, D]."""

  codes: Array
  latents: Array


@struct.dataclass
class Updated:
  """What `update` returns.

  Attributes:
    params, codebooks: tokenizer parameters and codebook states, changed.
    metrics: per part `usage_PART`, share of a codebook's codes drawn in this global batch, and `perplexity_PART`, both
      averaged over its codebooks, and `least_perplexity_PART`, of the one that is worth least. With
      `quirks.pooled_usage`, usage is the release's: codes that any codebook has ever drawn.
    revived: by each codebook's path in {'params', 'codebooks'}, which of its codes were replaced: bool [S], or None
      where none ever is.
  """

  params: dict[str, Any]
  codebooks: dict[str, Any]
  metrics: dict[str, tuple[Array, Array]]
  revived: dict[tuple[Any, ...], Array | None]


def count_codes(codes_BT: Int[Array, 'B T'], mask_BT: Float[Array, 'B T'], size: int) -> Float[Array, 'S']:
  """How often each code is drawn in the (global) batch, padding left out."""
  return jnp.zeros((size,), jnp.float32).at[codes_BT.reshape(-1)].add(mask_BT.reshape(-1))


def counts_perplexity(counts_S: Float[Array, 'S']) -> Float[Array, '']:
  """exp of the entropy of a histogram."""
  p = counts_S / jnp.maximum(jnp.sum(counts_S), 1)
  return jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20))))


def kmeans(key: Array, points_PD: Float[Array, 'P D'], size: int, iterations: int = 10) -> Float[Array, 'S D']:
  """Spherical k-means: centroids of points that are near by cosine, at the points' own scale.

  With fewer points than codes, points are reused with a little noise, so that no two codes are the same.
  """
  count = points_PD.shape[0]
  draw_key, noise_key = jax.random.split(key)
  if count >= size:
    start_SD = points_PD[jax.random.permutation(draw_key, count)[:size]]
  else:
    start_SD = points_PD[jax.random.randint(draw_key, (size,), 0, count)]
    start_SD += 0.01 * jnp.std(points_PD) * jax.random.normal(noise_key, start_SD.shape)
    return start_SD

  def lloyd(_, centroids_SD):
    codes_P = nearest_codes(points_PD, l2_normalise(centroids_SD))
    counts_S = jnp.zeros((size,)).at[codes_P].add(1.0)
    sums_SD = jnp.zeros_like(centroids_SD).at[codes_P].add(points_PD)
    return jnp.where(counts_S[:, None] > 0, sums_SD / jnp.maximum(counts_S, 1)[:, None], centroids_SD)

  return jax.lax.fori_loop(0, iterations, lloyd, start_SD)


def initialise(key: Array, config: ModelConfig, params: dict[str, Any], codebooks: dict[str, Any],
               latents: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Standardises the layers before each lookup and starts every codebook at k-means centroids, one after the other.

  A residual quantizer's second codebook sees what the first leaves over, so each needs passes of its own.

  Args:
    key: randomness.
    config: the model's.
    params: tokenizer parameters. Returned changed.
    codebooks: codebook states. Returned changed.
    latents: function (params, codebooks) -> {'semantic': [P, K, D], 'acoustic': [P, K, D], 'semantic_encoder':
      [P, C], 'acoustic_encoder': [P, C]} of several batches; a shared encoder has no 'acoustic_encoder'.
  """
  for part, name in PARTS.items():
    quantizer: QuantizerConfig = getattr(config, part)
    if not quantizer.data_init:
      continue
    if f'{part}_encoder' in params:
      params = _standardise(params, (f'{part}_encoder', 'conv_out'), latents(params, codebooks)[f'{part}_encoder'])
    for i in range(quantizer.num_codebooks):
      params = _standardise(params, (name, 'quantizers', i, 'in_proj'), latents(params, codebooks)[part][:, i])
      if quantizer.kind == 'fsq':
        continue
      key, use = jax.random.split(key)
      points_PD = latents(params, codebooks)[part][:, i]
      table_SD = jax.jit(kmeans, static_argnums=2)(use, points_PD, quantizer.codebook_size)
      if quantizer.kind == 'vq':
        params = _replace(params, (name, 'quantizers', i, 'codebook'), table_SD)
      else:
        codebooks = _replace(codebooks, (name, 'quantizers', i, 'codebook'), table_SD)
        sums_SD = jnp.copy(table_SD)  # a buffer of its own: the train step donates both
        codebooks = _replace(codebooks, (name, 'quantizers', i, 'sums'), sums_SD)
  return params, codebooks


def update(key: Array, step: Array, num_steps: int, config: ModelConfig, quirks: QuirksConfig, params: dict[str, Any],
           codebooks: dict[str, Any], outputs: dict[str, Drawn], mask_BT: Float[Array, 'B T']) -> Updated:
  """After the optimizer: statistics, moving averages, revival.

  Args:
    key: this step's randomness.
    step: steps done before this one.
    num_steps: length of training; revival ends at revive_until of it.
    config: the model's.
    quirks: the release's faults that are on.
    params: tokenizer parameters after the optimizer's update.
    codebooks: states before this step.
    outputs: what the quantizers drew in this step.
    mask_BT: 1 for frames of real audio.
  """
  metrics, revived = {}, {}
  for part, name in PARTS.items():
    quantizer: QuantizerConfig = getattr(config, part)
    output = outputs[part]
    drawn, perplexities, ever = [], [], []
    for i in range(quantizer.num_codebooks):
      codes_BT, latents_BTD = output.codes[..., i], output.latents[..., i, :]
      counts_S = count_codes(codes_BT, mask_BT, quantizer.size)
      drawn.append(jnp.mean(counts_S > 0))
      perplexities.append(counts_perplexity(counts_S))
      if quantizer.kind == 'fsq':
        continue
      state = dict(codebooks[name]['quantizers'][i])
      fair_S = counts_S * (quantizer.size / jnp.maximum(jnp.sum(counts_S), 1))
      if quirks.pooled_usage:
        state['counts'] = state['counts'] + counts_S
        ever.append(state['counts'] > 1)  # they start at 1
      else:
        state['counts'] = quantizer.usage_decay * state['counts'] + (1 - quantizer.usage_decay) * fair_S
      table_SD = params[name]['quantizers'][i]['codebook'] if quantizer.kind == 'vq' else state['codebook']
      if quantizer.kind == 'ema':
        state, table_SD = _moving_average(quantizer, state, codes_BT, latents_BTD, mask_BT)
      dead_S = None
      if quantizer.revive_below > 0 and not quirks.dead_codes and not quirks.pooled_usage:
        due = (step % quantizer.revive_every == quantizer.revive_every - 1) & (
            step < quantizer.revive_until * num_steps)
        dead_S = due & (state['counts'] < quantizer.revive_below)
        use = jax.random.fold_in(jax.random.fold_in(key, sorted(PARTS).index(part)), i)
        table_SD = jnp.where(dead_S[:, None], _draw_latents(use, latents_BTD, mask_BT, quantizer.size), table_SD)
        state['counts'] = jnp.where(dead_S, 1.0, state['counts'])
        if quantizer.kind == 'ema':
          state['sums'] = jnp.where(dead_S[:, None], table_SD, state['sums'])
          state['mass'] = jnp.where(dead_S, 1.0, state['mass'])
      if quantizer.kind == 'vq':
        params = _replace(params, (name, 'quantizers', i, 'codebook'), table_SD)
      else:
        state['codebook'] = table_SD
      revived['params' if quantizer.kind == 'vq' else 'codebooks', name, 'quantizers', i, 'codebook'] = dead_S
      codebooks = _replace(codebooks, (name, 'quantizers', i), state)
    usage = jnp.mean(jnp.any(jnp.stack(ever), axis=0)) if ever else jnp.mean(jnp.stack(drawn))
    metrics[f'usage_{part}'] = (usage, jnp.ones(()))
    metrics[f'perplexity_{part}'] = (jnp.mean(jnp.stack(perplexities)), jnp.ones(()))
    metrics[f'least_perplexity_{part}'] = (jnp.min(jnp.stack(perplexities)), jnp.ones(()))
  return Updated(params, codebooks, metrics, revived)


def _moving_average(quantizer: QuantizerConfig, state: dict[str, Array], codes_BT: Array, latents_BTD: Array,
                    mask_BT: Array) -> tuple[dict[str, Array], Array]:
  decay, size = quantizer.ema_decay, quantizer.size
  one_hot_counts_S = count_codes(codes_BT, mask_BT, size)
  weighted = latents_BTD * mask_BT[..., None]
  sums_SD = jnp.zeros_like(state['sums']).at[codes_BT.reshape(-1)].add(weighted.reshape(-1, weighted.shape[-1]))
  state['mass'] = decay * state['mass'] + (1 - decay) * one_hot_counts_S
  state['sums'] = decay * state['sums'] + (1 - decay) * sums_SD
  # A code that is never drawn decays in sum and mass alike and stays where it is.
  return state, state['sums'] / jnp.maximum(state['mass'], 1e-8)[:, None]


def moving_average(decay: Array, old: dict[str, Any], new: Updated) -> dict[str, Any]:
  """Averages {'params', 'codebooks'} over steps, codebooks like parameters; counts and sums are the newest.

  A code that was moved elsewhere is there at once: on its way from its old place it would be nobody's code.
  """
  mean = lambda a, b: a + (1 - decay) * (b - a)  # of equal numbers it is that number, to the bit
  now = {'params': new.params, 'codebooks': new.codebooks}
  average = {'params': jax.tree.map(mean, old['params'], new.params), 'codebooks': new.codebooks}
  for path, mask_S in new.revived.items():
    table_SD = mean(_at(old, path), _at(now, path))
    if mask_S is not None:
      table_SD = jnp.where(mask_S[:, None], _at(now, path), table_SD)
    average = _replace(average, path, table_SD)
  return average


def _draw_latents(key: Array, latents_BTD: Array, mask_BT: Array, count: int) -> Float[Array, 'S D']:
  """`count` latents of real audio, each as likely; by the cumulative count, as a draw per pair would take gigabytes."""
  points_PD = latents_BTD.reshape(-1, latents_BTD.shape[-1])
  upto_P = jnp.cumsum(mask_BT.reshape(-1))
  drawn = jax.random.uniform(key, (count,)) * upto_P[-1]
  return points_PD[jnp.minimum(jnp.searchsorted(upto_P, drawn, side='right'), len(points_PD) - 1)]


def _standardise(params: dict[str, Any], layer: tuple[Any, ...], outputs_PC: Float[Array, 'P C']) -> dict[str, Any]:
  """Gives a weight-normalised layer outputs of mean 0 and variance 1 per channel, from what it gives now."""
  here = _at(params, layer)
  mean_C, deviation_C = jnp.mean(outputs_PC, axis=0), jnp.maximum(jnp.std(outputs_PC, axis=0), 1e-8)
  return _replace(params, layer, {**here, 'weight_g': here['weight_g'] / deviation_C,
                                  'bias': (here['bias'] - mean_C) / deviation_C})


def _at(tree: dict[Any, Any], path: tuple[Any, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _replace(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> dict[Any, Any]:
  """A copy of nested dictionaries with one entry exchanged; the rest is shared."""
  head, *rest = path
  return {**tree, head: _replace(tree[head], tuple(rest), value) if rest else value}
