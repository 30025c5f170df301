"""The release's tokenizer in PyTorch, every variant of it, under the release's names.

Non-causal networks are descript-audio-codec's (`_torch_tokenizer` compares those number for number); what that package
lacks, causal convolutions and FSQ, is written here from the papers: Mimi's padding (arXiv 2410.00037, section 3.1) and
FSQ's appendix A (arXiv 2309.15505).
"""

from __future__ import annotations

import math

import torch
from _torch_reference import load_dac
from _torch_tokenizer import stirred
from torch import nn
from torch.nn.utils import weight_norm

from lmspt_jax.config import ModelConfig, QuantizerConfig


class CausalConv(nn.Module):
  """All padding in front; zeros behind up to a whole stride."""

  def __init__(self, *channels: int, kernel: int, stride: int = 1, dilation: int = 1):
    super().__init__()
    self.conv = weight_norm(nn.Conv1d(*channels, kernel, stride=stride, dilation=dilation))
    self.left, self.stride = (kernel - 1) * dilation + 1 - stride, stride

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.conv(nn.functional.pad(x, (self.left, -x.shape[-1] % self.stride)))


class CausalUpsample(nn.Module):
  """A transposed convolution that loses its last `rate` steps."""

  def __init__(self, *channels: int, rate: int):
    super().__init__()
    self.conv = weight_norm(nn.ConvTranspose1d(*channels, 2 * rate, stride=rate))
    self.rate = rate

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.conv(x)[..., : -self.rate]


class Unit(nn.Module):
  def __init__(self, channels: int, dilation: int):
    super().__init__()
    snake = load_dac().layers.Snake1d
    self.block = nn.Sequential(snake(channels), CausalConv(channels, channels, kernel=7, dilation=dilation),
                               snake(channels), CausalConv(channels, channels, kernel=1))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.block(x)


class Block(nn.Module):
  def __init__(self, *layers: nn.Module):
    super().__init__()
    self.block = nn.Sequential(*layers)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.block(x)


def causal_encoder(config: ModelConfig) -> nn.Module:
  snake, width = load_dac().layers.Snake1d, config.encoder_channels
  layers = [CausalConv(1, width, kernel=7)]
  for stride in config.encoder_strides:
    layers.append(Block(*(Unit(width, d) for d in config.dilations), snake(width),
                        CausalConv(width, 2 * width, kernel=2 * stride, stride=stride)))
    width *= 2
  return Block(*layers, snake(width), CausalConv(width, config.latent_dim, kernel=3))


class CausalDecoder(nn.Module):
  def __init__(self, config: ModelConfig, width: int, rates: tuple[int, ...]):
    super().__init__()
    snake = load_dac().layers.Snake1d
    layers = [CausalConv(config.latent_dim, width, kernel=7)]
    for rate in rates:
      layers.append(Block(snake(width), CausalUpsample(width, width // 2, rate=rate),
                          *(Unit(width // 2, d) for d in config.dilations)))
      width //= 2
    self.model = nn.Sequential(*layers, snake(width), CausalConv(width, 1, kernel=7), nn.Tanh())

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.model(x)


class FSQ(nn.Module):
  """Digits of a mixed-radix code, each a bounded number rounded."""

  def __init__(self, latent_dim: int, levels: tuple[int, ...]):
    super().__init__()
    self.in_proj = weight_norm(nn.Conv1d(latent_dim, len(levels), 1))
    self.out_proj = weight_norm(nn.Conv1d(len(levels), latent_dim, 1))
    self.levels = levels

  def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, digits, base = 0, [], 1
    for z_BT, level in zip(self.in_proj(z).unbind(1), self.levels, strict=True):
      reach, offset = (level - 1) * 1.001 / 2, 0.5 if level % 2 == 0 else 0.0
      whole = torch.round(torch.tanh(z_BT + math.atanh(offset / reach)) * reach - offset)
      codes, base = codes + (whole + level // 2).long() * base, base * level
      digits.append(whole / (level // 2))
    return self.out_proj(torch.stack(digits, 1)), codes[:, None]


class ReleaseTokenizer(nn.Module):
  """Any variant: causal, one encoder for both, without subtraction, FSQ."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    dac = load_dac()
    if config.causal:
      encoder = lambda: causal_encoder(config)
      decoder = lambda width, rates: CausalDecoder(config, width, rates)
    else:
      encoder = lambda: dac.model.Encoder(config.encoder_channels, list(config.encoder_strides), config.latent_dim)
      decoder = lambda width, rates: dac.model.Decoder(config.latent_dim, width, list(rates))
    residual = lambda q: dac.quantize.ResidualVectorQuantize(
        config.latent_dim, q.num_codebooks, q.codebook_size, q.code_dim)
    fsq = config.semantic.kind == 'fsq'
    self.semantic_encoder = encoder()
    self.acoustic_encoder = self.semantic_encoder if config.shared_encoder else encoder()
    self.quantizer = nn.ModuleDict({
        'rvq_first': FSQ(config.latent_dim, config.semantic.fsq_levels) if fsq else residual(config.semantic),
        'rvq_rest': residual(config.acoustic)})
    usage = lambda q: torch.rand(q.num_codebooks, q.size)
    self.quantizer.register_buffer('semantic_vocab_usage', usage(config.semantic))
    self.quantizer.register_buffer('acoustic_vocab_usage', usage(config.acoustic))
    self.decoder = decoder(config.decoder_channels, config.decoder_rates)
    self.aux_decoder = decoder(config.resynthesis_channels, config.resynthesis_rates)
    self.subtract = config.subtract_semantic

  def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """audio [B, N], N whole frames -> codes [B, K, T], reconstruction, resynthesis."""
    z_semantic, semantic, *_ = self.quantizer['rvq_first'](self.semantic_encoder(audio[:, None]))
    latent = self.acoustic_encoder(audio[:, None])
    z_acoustic, acoustic, *_ = self.quantizer['rvq_rest'](latent - z_semantic if self.subtract else latent)
    return (torch.cat([semantic, acoustic], 1), self.decoder(z_semantic + z_acoustic)[:, 0],
            self.aux_decoder(z_semantic)[:, 0])


def make(config: ModelConfig, seed: int = 0) -> ReleaseTokenizer:
  """Random weights, `stirred`."""
  torch.manual_seed(seed)
  module = stirred(ReleaseTokenizer(config))
  if config.semantic.kind == 'fsq':  # random latents are far smaller than its levels
    with torch.no_grad():
      module.quantizer['rvq_first'].in_proj.weight_g.mul_(100)
  return module


FSQ_LEVELS = QuantizerConfig(kind='fsq', fsq_levels=(8, 8, 8, 6, 5))
