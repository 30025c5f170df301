"""The speech tokenizer: what is said in codebook 0, how it sounds in the others.

Axes: B batch, N samples, M samples at the resynthesis rate, T frames, C latent channels, K codebooks.

Where recordings do not fill the array, `inside` says which frames are whose: what a recording's frames become is then
what they would become in an array of them alone. Codes of other frames are arbitrary, samples are 0.

Where an array is a piece of a recording that goes on, `past` is what the pieces before left behind (causal models).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from lmspt_jax.config import FLOAT32, ComputeConfig, ModelConfig
from lmspt_jax.models.codec import Decoder, Encoder
from lmspt_jax.models.inside import Inside
from lmspt_jax.models.layers import fit_length
from lmspt_jax.models.past import Past
from lmspt_jax.models.quantizers import CodebookState, QuantizerOutput, ResidualQuantizer

# Ways from codes to speech.
PATHS = ('full', 'semantic', 'resynthesis')


@struct.dataclass
class TokenizerOutput:
  """One training forward.

  Attributes:
    audio: [B, N], reconstruction from all codebooks.
    resynthesis: [B, M], speech from the semantic codes alone, at the resynthesis rate.
    semantic: the semantic quantizer's output; its `quantized` is z_semantic [B, T, C].
    acoustic: the acoustic quantizer's.
  """

  audio: Array
  resynthesis: Array
  semantic: QuantizerOutput
  acoustic: QuantizerOutput


class SpeechTokenizer(nnx.Module):
  """LM-SPT's codec: two encoders, a split quantizer, a main and an auxiliary decoder (arXiv 2506.16738)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, compute: ComputeConfig = FLOAT32):
    """`compute` decides dtype and recomputation in encoders and decoders; quantizers always work in float32."""
    options = dict(causal=config.causal, dtype=jnp.dtype(compute.dtype), remat=compute.remat_codec, rngs=rngs)
    encoder = lambda: Encoder(config.encoder_channels, config.encoder_strides, config.latent_dim, config.dilations,
                              **options)
    self.semantic_encoder = encoder()
    if not config.shared_encoder:
      self.acoustic_encoder = encoder()
    self.semantic_quantizer = ResidualQuantizer(config.latent_dim, config.semantic, rngs=rngs)
    self.acoustic_quantizer = ResidualQuantizer(config.latent_dim, config.acoustic, rngs=rngs)
    self.decoder = Decoder(config.latent_dim, config.decoder_channels, config.decoder_rates, config.dilations,
                           **options)
    self.resynthesis_decoder = Decoder(config.latent_dim, config.resynthesis_channels, config.resynthesis_rates,
                                       config.dilations, **options)
    self.config = config

  def __call__(self, audio_BN: Float[Array, 'B N'], *, active_B: Int[Array, 'B'] | None = None,
               attached_subtraction: bool = False) -> TokenizerOutput:
    """The training forward.

    Args:
      audio_BN: float32 waveform in [-1, 1]; N a multiple of the hop.
      active_B: acoustic codebooks in use per item (quantizer dropout); None is all.
      attached_subtraction: let gradients of the acoustic path reach z_semantic through the subtraction (the
        release's `quirks.attached_subtraction`).

    Raises:
      ValueError: N is not a multiple of the hop.
    """
    semantic, acoustic = self._quantize(audio_BN, None, active_B, attached_subtraction)
    return TokenizerOutput(
        audio=self._main(semantic.quantized + acoustic.quantized),
        resynthesis=self._auxiliary(semantic.quantized), semantic=semantic, acoustic=acoustic)

  def encode(self, audio_BN: Float[Array, 'B N'], inside: Inside | None = None,
             past: Past | None = None) -> Int[Array, 'B K T']:
    """Waveform to codes, semantic first; N a multiple of the hop, T = N / hop."""
    semantic, acoustic = self._quantize(audio_BN, inside, None, False, past)
    return jnp.concatenate([semantic.codes, acoustic.codes], axis=-1).transpose(0, 2, 1)

  def decode(self, codes_BKT: Int[Array, 'B K T'], inside: Inside | None = None,
             past: Past | None = None) -> Float[Array, 'B N']:
    """All codebooks (or the first K) to speech, N = T * hop. A negative code adds nothing."""
    codes_BTK = codes_BKT.transpose(0, 2, 1)
    z_BTC = self.semantic_quantizer.lookup(codes_BTK[..., :1])
    if codes_BTK.shape[-1] > 1:
      z_BTC = z_BTC + self.acoustic_quantizer.lookup(codes_BTK[..., 1:])
    return self._main(z_BTC, inside, past)

  def decode_semantic(self, codes_BKT: Int[Array, 'B K T']) -> Float[Array, 'B N']:
    """The semantic codebook alone through the main decoder."""
    return self.decode(codes_BKT[:, :1])

  def resynthesize(self, codes_BKT: Int[Array, 'B K T'], inside: Inside | None = None,
                   past: Past | None = None) -> Float[Array, 'B M']:
    """The semantic codebook alone through the auxiliary decoder, at `resynthesis_sample_rate`."""
    return self._auxiliary(self.semantic_quantizer.lookup(codes_BKT[:, :1].transpose(0, 2, 1)), inside, past)

  def _quantize(self, audio_BN: Array, inside: Inside | None, active_B: Array | None,
                attached: bool, past: Past | None = None) -> tuple[QuantizerOutput, QuantizerOutput]:
    if audio_BN.ndim != 2 or audio_BN.shape[1] % self.config.hop:
      raise ValueError(f'audio of shape {audio_BN.shape}: give [batch, samples] with samples a multiple of the hop, '
                       f'{self.config.hop} (right-pad with zeros)')
    if inside is not None:
      inside = dataclasses.replace(inside, steps=self.config.hop)
    latent = self.semantic_encoder(audio_BN, inside, past)
    semantic = self.semantic_quantizer(latent)
    if not self.config.shared_encoder:
      latent = self.acoustic_encoder(audio_BN, inside, past)
    if self.config.subtract_semantic:
      z_semantic = semantic.quantized
      latent = latent - (z_semantic if attached else jax.lax.stop_gradient(z_semantic))
    return semantic, self.acoustic_quantizer(latent, active_B)

  def _main(self, z_BTC: Array, inside: Inside | None = None, past: Past | None = None) -> Array:
    return fit_length(self.decoder(z_BTC, inside, past), z_BTC.shape[1] * self.config.hop)

  def _auxiliary(self, z_BTC: Array, inside: Inside | None = None, past: Past | None = None) -> Array:
    config = self.config
    samples = z_BTC.shape[1] * config.hop * config.resynthesis_sample_rate // config.sample_rate
    return fit_length(self.resynthesis_decoder(z_BTC, inside, past), samples)


def split_tokenizer(module: SpeechTokenizer) -> tuple[nnx.GraphDef, dict, dict]:
  """(structure, parameters, codebook states), the latter two as nested dictionaries of arrays."""
  graphdef, params, codebooks = nnx.split(module, nnx.Param, CodebookState)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(codebooks)


@functools.lru_cache(maxsize=8)  # tracing the release's takes a second
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  return nnx.split(nnx.eval_shape(lambda: SpeechTokenizer(config, rngs=nnx.Rngs(0))), nnx.Param, CodebookState)


def abstract_tokenizer(config: ModelConfig) -> tuple[nnx.GraphDef, dict, dict]:
  """`split_tokenizer` with shapes in place of arrays; nothing is computed. The dictionaries are the caller's own."""
  graphdef, params, codebooks = _abstract(config)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(codebooks)


def merge_tokenizer(config: ModelConfig, params: dict, codebooks: dict) -> SpeechTokenizer:
  """The module around given arrays."""
  return nnx.merge(abstract_tokenizer(config)[0], params, codebooks)
