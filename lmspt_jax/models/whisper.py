"""Whisper in Flax NNX (arXiv 2212.04356): the frozen teacher's encoder, and the decoder that scores transcripts.

Axis letters: B batch, T mel frames or encoder positions, F mel bands, L text tokens, S cached tokens, D width,
H heads, V vocabulary. Everything is float32, but for an encoder that is asked for another dtype: then its products
are of that, and of a narrower one norms, softmax and the sums over blocks stay float32. Modules are used functionally:
`bind` puts parameters (a jit argument) into a module inside the traced function, and nothing is random or mutable
after construction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike as DType


@dataclass(frozen=True)
class WhisperDims:
  """Sizes of a Whisper model; width must be a multiple of heads."""

  n_mels: int
  width: int
  heads: int
  audio_layers: int
  text_layers: int
  vocab_size: int
  audio_context: int = 1500  # encoder positions: 30 s at 50 Hz
  text_context: int = 448  # tokens
  positions_per_second: ClassVar[int] = 50

  @property
  def multilingual(self) -> bool:
    """English-only models have one token less."""
    return self.vocab_size >= 51865


def _dims(width: int, layers: int, n_mels: int = 80, vocab: int = 51865, text_layers: int | None = None) -> WhisperDims:
  return WhisperDims(n_mels, width, width // 64, layers, layers if text_layers is None else text_layers, vocab)


WHISPER_SIZES = {
  'tiny.en': _dims(384, 4, vocab=51864),
  'tiny': _dims(384, 4),
  'base.en': _dims(512, 6, vocab=51864),
  'base': _dims(512, 6),
  'small.en': _dims(768, 12, vocab=51864),
  'small': _dims(768, 12),
  'medium.en': _dims(1024, 24, vocab=51864),
  'medium': _dims(1024, 24),
  'large-v1': _dims(1280, 32),
  'large-v2': _dims(1280, 32),
  'large-v3': _dims(1280, 32, n_mels=128, vocab=51866),
  'large-v3-turbo': _dims(1280, 32, n_mels=128, vocab=51866, text_layers=4),
}


@functools.lru_cache(maxsize=8)
def sinusoids(length: int, width: int) -> np.ndarray:
  """Encoder positions, read-only float32 [length, width]: sines then cosines, time scales from 1 to 10,000."""
  scales = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2 - 1))
  angles = np.arange(length)[:, None] * scales
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
  table.flags.writeable = False  # the cache hands the same array to everyone
  return table


def _at_least_float32(dtype: DType) -> DType:
  return jnp.promote_types(dtype, jnp.float32)


def _norm(width: int, rngs: nnx.Rngs, dtype: DType = jnp.float32) -> nnx.LayerNorm:
  # The fast variance, E[x^2] - E[x]^2, loses digits on Whisper's few very large channels.
  return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=_at_least_float32(dtype), rngs=rngs)


class Attention(nnx.Module):
  """Multi-head attention, split so that keys and values can be cached. The key projection has no bias."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
    self.heads = heads
    self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
    self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def keys_values(self, x_BTD: Array) -> tuple[Array, Array]:
    """[B, T, D] -> keys and values, each [B, H, T, D / H]: heads first, so that no product transposes them."""
    return self._split(self.key(x_BTD)), self._split(self.value(x_BTD))

  def attend(self, x_BLD: Array, k_BHSd: Array, v_BHSd: Array, mask_LS: Array | None = None) -> Array:
    """[B, L, D] against keys and values [B, H, S, D / H] -> [B, L, D]; mask is True where attention is allowed."""
    q_BHLd = self._split(self.query(x_BLD))
    scores_BHLS = jnp.matmul(q_BHLd * q_BHLd.shape[-1] ** -0.5, jnp.swapaxes(k_BHSd, 2, 3))
    if mask_LS is not None:
      scores_BHLS = jnp.where(mask_LS, scores_BHLS, -jnp.inf)
    shares_BHLS = jax.nn.softmax(scores_BHLS.astype(_at_least_float32(scores_BHLS.dtype)), axis=-1).astype(v_BHSd.dtype)
    mixed_BHLd = jnp.matmul(shares_BHLS, v_BHSd)
    return self.out(jnp.swapaxes(mixed_BHLd, 1, 2).reshape(x_BLD.shape))

  def _split(self, x_BTD: Array) -> Array:
    return jnp.swapaxes(x_BTD.reshape(*x_BTD.shape[:-1], self.heads, -1), 1, 2)


class FeedForward(nnx.Module):
  """Two layers with an exact GELU between, four times as wide."""

  def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
    self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x_BTD: Array) -> Array:
    return self.down(jax.nn.gelu(self.up(x_BTD), approximate=False))


class EncoderBlock(nnx.Module):
  """Pre-norm transformer block, [B, T, D] -> [B, T, D]."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
    self.attention_norm = _norm(width, rngs, dtype)
    self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
    self.mlp_norm = _norm(width, rngs, dtype)
    self.mlp = FeedForward(width, dtype=dtype, rngs=rngs)

  def __call__(self, x_BTD: Array) -> Array:
    y_BTD = self.attention_norm(x_BTD)
    x_BTD = x_BTD + self.attention.attend(y_BTD, *self.attention.keys_values(y_BTD))
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class WhisperEncoder(nnx.Module):
  """Log-mel to features at half its frame rate (50 Hz).

  The blocks' parameters are stacked, their first axis is the layer, and one scan runs over them: 32 layers compile,
  and are gathered over a mesh, as one.

  Args:
    dims: sizes.
    rngs: stream `params`.
    dtype: of the products.
    remat: of a block's forward pass only the input is kept for the backward pass.
    gather: makes a layer's parameters into what they are used as, where a mesh splits them, by sharding constraints;
      once more in the backward pass, for which only the split ones are kept.
  """

  def __init__(self, dims: WhisperDims, *, rngs: nnx.Rngs, dtype: DType = jnp.float32, remat: bool = False,
               gather: Callable[[nnx.State], nnx.State] | None = None):
    self.audio_context, self.width, self.remat, self.gather = dims.audio_context, dims.width, remat, gather
    self.conv1 = nnx.Conv(dims.n_mels, dims.width, kernel_size=(3,), padding=1, dtype=dtype, rngs=rngs)
    self.conv2 = nnx.Conv(dims.width, dims.width, kernel_size=(3,), strides=2, padding=1, dtype=dtype, rngs=rngs)
    blocks = [nnx.split(EncoderBlock(dims.width, dims.heads, dtype=dtype, rngs=rngs)) for _ in range(dims.audio_layers)]
    self.blocks = nnx.merge(blocks[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s for _, s in blocks)))
    self.norm = _norm(dims.width, rngs, dtype)

  def __call__(self, mel_BTF: Array) -> Array:
    """float32 log-mel [B, T, n_mels] at 100 Hz -> float32 [B, ceil(T / 2), width].

    A crop shorter than 30 s takes the first ceil(T / 2) positions and attends to itself only. Raises ValueError for
    more than 2 * audio_context frames.
    """
    return self.norm(self.hidden(mel_BTF))

  def hidden(self, mel_BTF: Array) -> Array:
    """What the blocks give, [B, ceil(T / 2), width], before the last norm."""
    positions = -(-mel_BTF.shape[1] // 2)
    if positions > self.audio_context:
      raise ValueError(f'{mel_BTF.shape[1]} mel frames are more than the {2 * self.audio_context} the encoder takes')
    x_BTD = jax.nn.gelu(self.conv1(mel_BTF), approximate=False)
    x_BTD = jax.nn.gelu(self.conv2(x_BTD), approximate=False)
    x_BTD = x_BTD.astype(_at_least_float32(x_BTD.dtype))
    x_BTD = x_BTD + self.position_table()[:positions]
    graphdef, layers = nnx.split(self.blocks)

    def run(x_BTD: Array, layer: nnx.State) -> tuple[Array, None]:
      return nnx.merge(graphdef, layer if self.gather is None else self.gather(layer))(x_BTD), None

    # Inside a scan nothing is merged with the forward pass: no barrier against it is needed.
    if self.remat:
      run = jax.checkpoint(run, prevent_cse=False)
    elif self.gather is not None:
      run = jax.checkpoint(run, prevent_cse=False, policy=_keep_all_but_constrained)
    return jax.lax.scan(run, x_BTD, layers)[0]

  def position_table(self) -> np.ndarray | Array:
    """What is added to the positions, float32 [audio_context, width]."""
    return sinusoids(self.audio_context, self.width)


def _keep_all_but_constrained(primitive: Any, *_: Any, **__: Any) -> bool:
  """For the backward pass: everything but what a sharding constraint made."""
  return primitive.name != 'sharding_constraint'


class KeyValueCache(NamedTuple):
  """What a decoder remembers between calls; one entry per layer. A pytree, so it can be a loop's carry."""

  self_keys: tuple[Array, ...]  # [B, H, S, D / H], positions not yet written are zero
  self_values: tuple[Array, ...]
  cross_keys: tuple[Array, ...]  # [B, H, T, D / H], of the encoded audio; B / beams rows of it
  cross_values: tuple[Array, ...]


class DecoderBlock(nnx.Module):
  """Pre-norm block with causal self-attention and attention to the encoded audio."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(width, rngs)
    self.attention = Attention(width, heads, rngs=rngs)
    self.cross_attention_norm = _norm(width, rngs)
    self.cross_attention = Attention(width, heads, rngs=rngs)
    self.mlp_norm = _norm(width, rngs)
    self.mlp = FeedForward(width, rngs=rngs)

  def __call__(
    self, x_BLD: Array, position: Array | int, self_kv: tuple[Array, Array], cross_kv: tuple[Array, Array]
  ) -> tuple[Array, tuple[Array, Array]]:
    """Tokens at position.. position + L - 1; returns their output and the self-attention cache with them in it."""
    y_BLD = self.attention_norm(x_BLD)
    k_BHSd, v_BHSd = (
      jax.lax.dynamic_update_slice_in_dim(cached, new, position, axis=2)
      for cached, new in zip(self_kv, self.attention.keys_values(y_BLD), strict=True)
    )
    rows_L = position + jnp.arange(x_BLD.shape[1])
    mask_LS = jnp.arange(k_BHSd.shape[2]) <= rows_L[:, None]
    x_BLD = x_BLD + self.attention.attend(y_BLD, k_BHSd, v_BHSd, mask_LS)
    # Rows over the same audio (beams) follow each other: as more tokens of one row they share its keys and values.
    shared = (cross_kv[0].shape[0], -1, x_BLD.shape[-1])
    mixed = self.cross_attention.attend(self.cross_attention_norm(x_BLD).reshape(shared), *cross_kv)
    x_BLD = x_BLD + mixed.reshape(x_BLD.shape)
    return x_BLD + self.mlp(self.mlp_norm(x_BLD)), (k_BHSd, v_BHSd)


class WhisperDecoder(nnx.Module):
  """Text decoder with an explicit cache; the output projection is the token embedding."""

  def __init__(self, dims: WhisperDims, *, rngs: nnx.Rngs):
    self.text_context = dims.text_context
    self.heads = dims.heads
    self.embedding = nnx.Embed(dims.vocab_size, dims.width, rngs=rngs)
    self.positions = nnx.Param(0.01 * jax.random.normal(rngs.params(), (dims.text_context, dims.width)))
    self.blocks = nnx.List([DecoderBlock(dims.width, dims.heads, rngs=rngs) for _ in range(dims.text_layers)])
    self.norm = _norm(dims.width, rngs)

  def init_cache(self, encoded_BTD: Array, length: int, beams: int = 1) -> KeyValueCache:
    """Cache for `length` tokens over the encoder's output, for `beams` rows of tokens over each row of it.

    Raises ValueError above text_context.
    """
    if length > self.text_context:
      raise ValueError(f'a cache of {length} tokens is more than the {self.text_context} the decoder takes')
    batch, _, width = encoded_BTD.shape
    empty = jnp.zeros((batch * beams, self.heads, length, width // self.heads), encoded_BTD.dtype)
    cross = [block.cross_attention.keys_values(encoded_BTD) for block in self.blocks]
    return KeyValueCache(
      self_keys=(empty,) * len(self.blocks),
      self_values=(empty,) * len(self.blocks),
      cross_keys=tuple(k for k, _ in cross),
      cross_values=tuple(v for _, v in cross),
    )

  def decode(self, tokens_BL: Array, position: Array | int, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
    """int32 tokens at position.. position + L - 1 -> (hidden states [B, L, D], cache). `logits` maps them to words.

    The caller keeps position + L within the cache's length: under jit a write past it would be clamped.
    """
    positions_LD = jax.lax.dynamic_slice_in_dim(self.positions[...], position, tokens_BL.shape[1])
    x_BLD = self.embedding(tokens_BL) + positions_LD
    keys, values = [], []
    for i, block in enumerate(self.blocks):
      self_kv, cross_kv = (cache.self_keys[i], cache.self_values[i]), (cache.cross_keys[i], cache.cross_values[i])
      x_BLD, (k_BHSd, v_BHSd) = block(x_BLD, position, self_kv, cross_kv)
      keys.append(k_BHSd)
      values.append(v_BHSd)
    return self.norm(x_BLD), cache._replace(self_keys=tuple(keys), self_values=tuple(values))

  def logits(self, x_BLD: Array) -> Array:
    """Hidden states [..., D] -> [..., V]."""
    return self.embedding.attend(x_BLD)

  def __call__(self, tokens_BL: Array, encoded_BTD: Array) -> Array:
    """All logits of a text at once, [B, L, V]: teacher forcing."""
    x_BLD, _ = self.decode(tokens_BL, 0, self.init_cache(encoded_BTD, tokens_BL.shape[1]))
    return self.logits(x_BLD)


class Whisper(nnx.Module):
  """Encoder and decoder; its parameters are {'encoder': ..., 'decoder': ...}."""

  def __init__(self, dims: WhisperDims, *, rngs: nnx.Rngs):
    self.encoder = WhisperEncoder(dims, rngs=rngs)
    self.decoder = WhisperDecoder(dims, rngs=rngs)

  def __call__(self, mel_BTF: Array, tokens_BL: Array) -> Array:
    """Logits [B, L, V] of a text given its audio."""
    return self.decoder(tokens_BL, self.encoder(mel_BTF))


@functools.lru_cache(maxsize=32)
def _abstract(module: type[nnx.Module], dims: WhisperDims, **options: Any) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx.split(nnx.eval_shape(lambda: module(dims, rngs=nnx.Rngs(0), **options)))


def abstract_params(module: type[nnx.Module], dims: WhisperDims) -> dict[str, Any]:
  """Nested dictionary of jax.ShapeDtypeStruct: what `bind` expects, without allocating it."""
  return nnx.to_pure_dict(_abstract(module, dims)[1])


def bind(module: type[nnx.Module], dims: WhisperDims, params: dict[str, Any], **options: Any) -> Any:
  """The module with these parameters: call it inside the jitted function whose argument they are.

  `module` is WhisperEncoder, WhisperDecoder or Whisper; `params` is nested as `abstract_params` says (a checkpoint's
  params['encoder'], params['decoder'], or all of params), `options` the module's own (dtype, remat).
  """
  graphdef, state = _abstract(module, dims, **options)
  if jax.tree.structure(params) != jax.tree.structure(nnx.to_pure_dict(state)):
    raise ValueError(f'parameters do not have the structure of a {module.__name__} with {dims}')
  state = jax.tree.map(lambda leaf: leaf, state)  # the cached one is shared by all callers
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)
