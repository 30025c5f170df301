"""Hyper-parameters of the networks: the tokenizer and the discriminators it is trained against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmspt_jax.config.checks import require

# Bounds far past any model of this kind: a config may come with a stranger's file, and building it must cost little.
MAX_BLOCKS = 16  # of a codec; and residual units of a block
MAX_FACTOR = 1 << 12  # a stride, a rate or a dilation
MAX_CHANNELS = 1 << 20
MAX_CODEBOOKS = 64
MAX_CODES = 1 << 24  # of a codebook
MAX_RATE = 768_000  # Hz


@dataclass(frozen=True)
class QuantizerConfig:
  """One residual vector quantizer (a single codebook is a residual quantizer of depth 1).

  kind 'vq': factorised l2-normalised codes learnt by gradient (ViT-VQGAN, DAC; the release's).
  kind 'ema': the same lookup, codes are exponential moving averages of the vectors assigned to them.
  kind 'fsq': finite scalar quantization (arXiv 2309.15505) between 1x1 projections; one codebook only.
  """

  kind: str = 'vq'
  num_codebooks: int = 1
  codebook_size: int = 16384  # ignored for 'fsq': the product of the levels
  code_dim: int = 8  # ignored for 'fsq': the number of levels
  dropout: float = 0.0  # share of a batch's items that use a random number of codebooks in training
  fsq_levels: tuple[int, ...] = (8, 8, 8, 6, 5)
  ema_decay: float = 0.99  # of the codebook ('ema')
  # Against collapse (training/codebooks.py):
  data_init: bool = True  # latents start standardised, codes as k-means centroids, on the first batches
  revive_below: float = 0.02  # codes drawn less than this part of a fair share (1/size) are replaced; 0: never
  revive_every: int = 20  # steps between replacements
  revive_until: float = 0.8  # share of training after which nothing is replaced any more
  usage_decay: float = 0.9  # moving average of the counts that decide a replacement

  @property
  def size(self) -> int:
    """Number of different codes in one codebook."""
    return math.prod(self.fsq_levels) if self.kind == 'fsq' else self.codebook_size

  @property
  def dim(self) -> int:
    """Dimension of the space codes live in."""
    return len(self.fsq_levels) if self.kind == 'fsq' else self.code_dim

  def check(self, name: str) -> None:
    require(self.kind in ('vq', 'ema', 'fsq'), f'{name}.kind', self.kind, "use 'vq', 'ema' or 'fsq'")
    require(1 <= self.num_codebooks <= MAX_CODEBOOKS, f'{name}.num_codebooks', self.num_codebooks,
             f'use 1 to {MAX_CODEBOOKS}')
    require(self.kind != 'fsq' or self.num_codebooks == 1, f'{name}.num_codebooks', self.num_codebooks,
             'fsq has one codebook')
    require(0.0 <= self.dropout <= 1.0, f'{name}.dropout', self.dropout, 'use a share in [0, 1]')
    require(len(self.fsq_levels) <= MAX_BLOCKS and all(1 <= level <= MAX_CODES for level in self.fsq_levels),
             f'{name}.fsq_levels', self.fsq_levels, f'give at most {MAX_BLOCKS} positive numbers')
    require(2 <= self.size <= MAX_CODES, f'{name}.codebook_size', self.size, f'use 2 to {MAX_CODES}')
    require(1 <= self.dim <= MAX_CHANNELS, f'{name}.code_dim', self.dim, f'use 1 to {MAX_CHANNELS}')
    require(self.revive_every >= 1, f'{name}.revive_every', self.revive_every, 'use at least 1 step')


@dataclass(frozen=True)
class ModelConfig:
  """The speech tokenizer: two encoders, a split quantizer, a main and an auxiliary decoder."""

  sample_rate: int = 24_000  # Hz, in and out of the main path
  encoder_channels: int = 32  # after the first convolution; doubles with every stride
  encoder_strides: tuple[int, ...] = (4, 5, 6, 8, 2)  # the product is the hop in samples
  latent_dim: int = 1024
  decoder_channels: int = 1536  # before the first upsampling; halves with every rate
  decoder_rates: tuple[int, ...] = (2, 8, 6, 5, 4)
  resynthesis_sample_rate: int = 16_000  # Hz, out of the auxiliary decoder (the teacher's)
  resynthesis_channels: int = 128
  resynthesis_rates: tuple[int, ...] = (8, 8, 5, 4)
  dilations: tuple[int, ...] = (1, 3, 9)  # of a block's residual units
  causal: bool = False
  shared_encoder: bool = False  # one encoder feeds both quantizers (an ablation of the paper)
  subtract_semantic: bool = True  # the acoustic quantizer sees latent - z_semantic
  semantic: QuantizerConfig = QuantizerConfig(num_codebooks=1, codebook_size=16384)
  acoustic: QuantizerConfig = QuantizerConfig(num_codebooks=7, codebook_size=4096, dropout=0.5)

  @property
  def hop(self) -> int:
    """Samples per frame."""
    return math.prod(self.encoder_strides)

  @property
  def frame_rate(self) -> float:
    """Frames per second."""
    return self.sample_rate / self.hop

  @property
  def num_codebooks(self) -> int:
    return self.semantic.num_codebooks + self.acoustic.num_codebooks

  @property
  def codebook_sizes(self) -> tuple[int, ...]:
    """Number of different codes, per codebook; semantic first."""
    return tuple(q.size for q in (self.semantic, self.acoustic) for _ in range(q.num_codebooks))

  @property
  def num_residual_units(self) -> int:
    """Of one encoder and the decoders. Each has eight arrays: two convolutions with three, two snakes with one."""
    return len(self.dilations) * sum(map(len, (self.encoder_strides, self.decoder_rates, self.resynthesis_rates)))

  @property
  def bitrate(self) -> float:
    """Bits per second of all codebooks, if every code were equally likely."""
    return self.frame_rate * sum(map(math.log2, self.codebook_sizes))

  def num_frames(self, num_samples: int) -> int:
    """Frames of a recording: the input is right-padded with zeros to whole frames."""
    return -(-num_samples // self.hop)

  def check(self, name: str = 'model') -> None:
    for key in ('sample_rate', 'resynthesis_sample_rate'):
      require(1 <= getattr(self, key) <= MAX_RATE, f'{name}.{key}', getattr(self, key), f'use 1 to {MAX_RATE} Hz')
    for key in ('encoder_strides', 'decoder_rates', 'resynthesis_rates', 'dilations'):
      values = getattr(self, key)
      require(len(values) <= MAX_BLOCKS and all(1 <= value <= MAX_FACTOR for value in values), f'{name}.{key}', values,
               f'give at most {MAX_BLOCKS} numbers, each 1 to {MAX_FACTOR}')
    for key, doubled in (('encoder_channels', len(self.encoder_strides)), ('decoder_channels', 0),
                         ('resynthesis_channels', 0), ('latent_dim', 0)):
      require(1 <= getattr(self, key) <= MAX_CHANNELS >> doubled, f'{name}.{key}', getattr(self, key),
               f'use 1 to {MAX_CHANNELS >> doubled}')
    self.semantic.check(f'{name}.semantic')
    self.acoustic.check(f'{name}.acoustic')
    require(self.semantic.num_codebooks == 1, f'{name}.semantic.num_codebooks', self.semantic.num_codebooks,
             'the semantic quantizer has exactly one codebook')
    require(math.prod(self.decoder_rates) == self.hop, f'{name}.decoder_rates', self.decoder_rates,
             f'their product must be the hop, {self.hop} (the product of encoder_strides)')
    seconds = math.prod(self.resynthesis_rates) * self.sample_rate
    require(seconds == self.hop * self.resynthesis_sample_rate, f'{name}.resynthesis_rates', self.resynthesis_rates,
             f'their product must be {self.hop * self.resynthesis_sample_rate / self.sample_rate:g}, '
             f'one frame at {self.resynthesis_sample_rate} Hz')
    for side, channels, rates in (('decoder', self.decoder_channels, self.decoder_rates),
                                  ('resynthesis', self.resynthesis_channels, self.resynthesis_rates)):
      require(channels % 2 ** len(rates) == 0, f'{name}.{side}_channels', channels,
               f'must be divisible by {2 ** len(rates)}: it halves with each of {side}_rates')


@dataclass(frozen=True)
class DiscriminatorConfig:
  """DAC's discriminators: multi-period, multi-scale and multi-resolution complex STFT."""

  periods: tuple[int, ...] = (2, 3, 5, 7, 11)
  period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
  rates: tuple[int, ...] = ()  # multi-scale: the signal resampled by 1/rate (empty in the release)
  scale_channels: tuple[int, ...] = (16, 64, 256, 1024, 1024, 1024)
  fft_sizes: tuple[int, ...] = (2048, 1024, 512)
  band_edges: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the bins; a conv stack per band
  stft_channels: int = 32

  def check(self, name: str = 'discriminator') -> None:
    require(len(self.scale_channels) == 6, f'{name}.scale_channels', self.scale_channels, 'give six widths')
    require(len(self.period_channels) == 5, f'{name}.period_channels', self.period_channels, 'give five widths')
    require(list(self.band_edges) == sorted(set(self.band_edges)) and self.band_edges[0] == 0
             and self.band_edges[-1] == 1, f'{name}.band_edges', self.band_edges, 'use rising edges from 0 to 1')
    require(bool(self.periods or self.rates or self.fft_sizes), f'{name}.periods', self.periods,
             'at least one discriminator is needed (set loss.adversarial = 0 to train without their gradient)')
