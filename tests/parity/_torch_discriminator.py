"""The reference discriminator at a config's widths, and what it says about a piece of real speech."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from _torch_reference import load_audiotools, load_dac

from lmspt_jax.config import DiscriminatorConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

_RELEASE = DiscriminatorConfig()

MEL_BINS, MEL_WINDOWS = (40, 80, 160, 320), (256, 512, 1024, 2048)


def torch_discriminator(config: DiscriminatorConfig, sample_rate: int, seed: int = 0) -> torch.nn.Module:
  """dac.model.discriminator.Discriminator, its hard-coded widths replaced by the config's."""
  module = load_dac().discriminator
  torch.manual_seed(seed)
  whole = module.Discriminator(rates=[], periods=[], fft_sizes=[], sample_rate=sample_rate)
  edges = config.band_edges
  with _widths(module, dict(zip(_RELEASE.period_channels, config.period_channels, strict=True))):
    parts = [module.MPD(period) for period in config.periods]
  with _widths(module, dict(zip(_RELEASE.scale_channels, config.scale_channels, strict=True))):
    parts += [module.MSD(rate, sample_rate=sample_rate) for rate in config.rates]
  with _widths(module, {_RELEASE.stft_channels: config.stft_channels}):
    parts += [module.MRD(size, sample_rate=sample_rate, bands=list(itertools.pairwise(edges)))
              for size in config.fft_sizes]
  whole.discriminators = torch.nn.ModuleList(parts)
  # The reference's biases and gains are drawn near their norms: move the gains so that a wrong axis would show.
  for name, value in whole.named_parameters():
    if name.endswith('weight_g'):
      value.data.mul_(torch.empty_like(value).uniform_(0.7, 1.6))
  return whole.eval()


@contextlib.contextmanager
def _widths(module, widths: dict[int, int]):
  originals = {name: getattr(module, name) for name in ('WNConv1d', 'WNConv2d')}

  def narrow(make):
    def wrapped(inputs, outputs, *args, **kwargs):
      inputs, outputs = widths.get(inputs, inputs), widths.get(outputs, outputs)
      if 'groups' in kwargs:
        kwargs['groups'] = inputs // 4
      return make(inputs, outputs, *args, **kwargs)
    return wrapped

  for name, make in originals.items():
    setattr(module, name, narrow(make))
  try:
    yield
  finally:
    for name, make in originals.items():
      setattr(module, name, make)


def channels_last(maps: list[list[torch.Tensor]], config: DiscriminatorConfig) -> list[list[np.ndarray]]:
  """Feature maps in this package's layout: [B, P, L, C], [B, 1, T, C] and [B, T, F, C]."""
  def convert(index, value):
    if value.ndim == 3:
      value = value[:, :, None]
    value = value.permute(0, 3, 2, 1) if index < len(config.periods) else value.permute(0, 2, 3, 1)
    return value.detach().numpy()
  return [[convert(i, m) for m in part] for i, part in enumerate(maps)]


def gan_loss(discriminator: torch.nn.Module):
  """dac.nn.loss.GANLoss and a function that wraps [B, N] audio for it."""
  return load_dac().loss.GANLoss(discriminator), lambda x: load_audiotools().AudioSignal(x[:, None], 16_000)


def mel_loss(x: torch.Tensor, y: torch.Tensor, sample_rate: int) -> torch.Tensor:
  """The reference's mel loss of [B, N] with the release's scales."""
  signal = load_audiotools().AudioSignal
  loss = load_dac().loss.MelSpectrogramLoss(
      n_mels=list(MEL_BINS), window_lengths=list(MEL_WINDOWS), mel_fmin=[0] * 4, mel_fmax=[None] * 4)
  return loss(signal(x[:, None], sample_rate), signal(y[:, None], sample_rate))
