"""The tokenizer assembled in PyTorch from descript-audio-codec's modules, under the release's names."""

from __future__ import annotations

import numpy as np
import torch
from _torch_reference import load_dac

from lmspt_jax.config import ModelConfig, QuantizerConfig

SMALL = ModelConfig(
    encoder_channels=8, latent_dim=64, decoder_channels=96, resynthesis_channels=32,
    semantic=QuantizerConfig(codebook_size=512), acoustic=QuantizerConfig(num_codebooks=7, codebook_size=256))


class Tokenizer(torch.nn.Module):
  """LM-SPT's wiring around DAC's encoder, decoder and residual quantizer."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    dac = load_dac()
    encoder = lambda: dac.model.Encoder(config.encoder_channels, list(config.encoder_strides), config.latent_dim)
    quantizer = lambda q: dac.quantize.ResidualVectorQuantize(
        config.latent_dim, q.num_codebooks, q.codebook_size, q.code_dim)
    self.semantic_encoder, self.acoustic_encoder = encoder(), encoder()
    self.quantizer = torch.nn.ModuleDict({
        'rvq_first': quantizer(config.semantic), 'rvq_rest': quantizer(config.acoustic)})
    self.decoder = dac.model.Decoder(config.latent_dim, config.decoder_channels, list(config.decoder_rates))
    self.aux_decoder = dac.model.Decoder(config.latent_dim, config.resynthesis_channels,
                                         list(config.resynthesis_rates))

  def forward(self, audio: torch.Tensor) -> dict[str, torch.Tensor]:
    """audio [B, N] with N a multiple of the hop."""
    latent = self.semantic_encoder(audio[:, None])
    z_sem, codes_sem, _, commitment_sem, codebook_sem = self.quantizer['rvq_first'](latent)
    acoustic = self.acoustic_encoder(audio[:, None])
    z_ac, codes_ac, _, commitment_ac, codebook_ac = self.quantizer['rvq_rest'](acoustic - z_sem)
    return {'latent': latent, 'z_semantic': z_sem, 'z_acoustic': z_ac, 'codes': torch.cat([codes_sem, codes_ac], 1),
            'audio': self.decoder(z_sem + z_ac)[:, 0], 'resynthesis': self.aux_decoder(z_sem)[:, 0],
            'semantic_commitment': commitment_sem, 'semantic_codebook': codebook_sem,
            'acoustic_commitment': commitment_ac, 'acoustic_codebook': codebook_ac}

  def encode(self, audio: torch.Tensor) -> torch.Tensor:
    """Codes [B, K, T] alone."""
    z_sem, codes_sem, *_ = self.quantizer['rvq_first'](self.semantic_encoder(audio[:, None]))
    codes_ac = self.quantizer['rvq_rest'](self.acoustic_encoder(audio[:, None]) - z_sem)[1]
    return torch.cat([codes_sem, codes_ac], 1)

  def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Codes [B, K, T] to audio."""
    z_sem = self.quantizer['rvq_first'].from_codes(codes[:, :1])[0]
    z_ac = self.quantizer['rvq_rest'].from_codes(codes[:, 1:])[0]
    return self.decoder(z_sem + z_ac)[:, 0]


def make(config: ModelConfig, seed: int = 0) -> Tokenizer:
  """Random weights, `stirred`."""
  torch.manual_seed(seed)
  return stirred(Tokenizer(config))


def stirred(module: torch.nn.Module) -> torch.nn.Module:
  """Snakes, biases and gains moved away from their starting values, so that a swap would show; ready to evaluate."""
  with torch.no_grad():
    for name, value in module.named_parameters():
      if name.endswith('alpha'):
        value.uniform_(0.5, 2.0)
      elif name.endswith('bias'):
        value.normal_(0, 0.02)
      elif name.endswith('weight_g'):
        value.mul_(torch.empty_like(value).uniform_(0.9, 1.3))  # the decoder must not saturate
  return module.eval()


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
  """The weights as numpy arrays."""
  return {k: v.numpy() for k, v in module.state_dict().items()}
