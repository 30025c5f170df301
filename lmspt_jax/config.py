"""Hyper-parameters as frozen dataclasses, and the only place that sees an `ml_collections.ConfigDict`.

A file in `configs/` builds an `ExperimentConfig` and returns `to_config_dict(it)`; the command line applies
overrides to that ConfigDict and hands it to `from_config_dict`, which checks every field. Everything behind this
module takes dataclasses. Defaults are the authors' release `12d5hz_v1` (arXiv 2506.16738, `kakao/lmspt`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from lmspt_jax.errors import LmsptError, nearest


def _require(condition: bool, field_name: str, value: Any, way_out: str) -> None:
  if not condition:
    raise LmsptError(f'config field {field_name} = {value!r}: {way_out}')


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
    _require(self.kind in ('vq', 'ema', 'fsq'), f'{name}.kind', self.kind, "use 'vq', 'ema' or 'fsq'")
    _require(self.num_codebooks >= 1, f'{name}.num_codebooks', self.num_codebooks, 'use at least 1')
    _require(self.kind != 'fsq' or self.num_codebooks == 1, f'{name}.num_codebooks', self.num_codebooks,
             'fsq has one codebook')
    _require(0.0 <= self.dropout <= 1.0, f'{name}.dropout', self.dropout, 'use a share in [0, 1]')
    _require(self.size >= 2, f'{name}.codebook_size', self.size, 'use at least 2')
    _require(self.revive_every >= 1, f'{name}.revive_every', self.revive_every, 'use at least 1 step')


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
  def bitrate(self) -> float:
    """Bits per second of all codebooks, if every code were equally likely."""
    return self.frame_rate * sum(q.num_codebooks * math.log2(q.size) for q in (self.semantic, self.acoustic))

  def num_frames(self, num_samples: int) -> int:
    """Frames of a recording: the input is right-padded with zeros to whole frames."""
    return -(-num_samples // self.hop)

  def check(self, name: str = 'model') -> None:
    self.semantic.check(f'{name}.semantic')
    self.acoustic.check(f'{name}.acoustic')
    _require(self.semantic.num_codebooks == 1, f'{name}.semantic.num_codebooks', self.semantic.num_codebooks,
             'the semantic quantizer has exactly one codebook')
    _require(math.prod(self.decoder_rates) == self.hop, f'{name}.decoder_rates', self.decoder_rates,
             f'their product must be the hop, {self.hop} (the product of encoder_strides)')
    seconds = math.prod(self.resynthesis_rates) * self.sample_rate
    _require(seconds == self.hop * self.resynthesis_sample_rate, f'{name}.resynthesis_rates', self.resynthesis_rates,
             f'their product must be {self.hop * self.resynthesis_sample_rate / self.sample_rate:g}, '
             f'one frame at {self.resynthesis_sample_rate} Hz')
    for side, channels, rates in (('decoder', self.decoder_channels, self.decoder_rates),
                                  ('resynthesis', self.resynthesis_channels, self.resynthesis_rates)):
      _require(channels % 2 ** len(rates) == 0, f'{name}.{side}_channels', channels,
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
    _require(len(self.scale_channels) == 6, f'{name}.scale_channels', self.scale_channels, 'give six widths')
    _require(len(self.period_channels) == 5, f'{name}.period_channels', self.period_channels, 'give five widths')
    _require(list(self.band_edges) == sorted(set(self.band_edges)) and self.band_edges[0] == 0
             and self.band_edges[-1] == 1, f'{name}.band_edges', self.band_edges, 'use rising edges from 0 to 1')
    _require(bool(self.periods or self.rates or self.fft_sizes), f'{name}.periods', self.periods,
             'at least one discriminator is needed (set loss.adversarial = 0 to train without their gradient)')


@dataclass(frozen=True)
class TeacherConfig:
  """The frozen speech encoder that the semantic codes are distilled from."""

  strategy: str = 'resynthesis'  # 'resynthesis' (LM-SPT), 'pooled' (features at the token rate), 'none'
  checkpoint: str = 'hf://openai/whisper-large-v3'  # package:tiny.en, openai:FILE.pt, hf:DIR, ctranslate2:DIR, hf://org/name
  window: str = 'crop'  # 'crop': positions of the crop only; 'full': zero-padded to 30 s, as released
  distance: str = 'mse'  # or 'l1'

  def check(self, name: str = 'teacher') -> None:
    _require(self.strategy in ('resynthesis', 'pooled', 'none'), f'{name}.strategy', self.strategy,
             "use 'resynthesis', 'pooled' or 'none'")
    _require(self.window in ('crop', 'full'), f'{name}.window', self.window, "use 'crop' or 'full'")
    _require(self.distance in ('mse', 'l1'), f'{name}.distance', self.distance, "use 'mse' or 'l1'")


@dataclass(frozen=True)
class LossConfig:
  """Weights of the generator's loss (release: 12d5hz_v1) and the scales of its mel term."""

  semantic_commitment: float = 0.25
  semantic_codebook: float = 1.0
  acoustic_commitment: float = 0.25
  acoustic_codebook: float = 1.0
  adversarial: float = 1.0
  feature_matching: float = 2.0
  mel: float = 15.0
  distillation: float = 500.0
  mel_bins: tuple[int, ...] = (40, 80, 160, 320)
  mel_windows: tuple[int, ...] = (256, 512, 1024, 2048)

  def check(self, name: str = 'loss') -> None:
    _require(len(self.mel_bins) == len(self.mel_windows) > 0, f'{name}.mel_bins', self.mel_bins,
             f'give one per window; there are {len(self.mel_windows)} mel_windows')


@dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay, for one network."""

  learning_rate: float = 2e-4
  final_learning_rate: float = 5e-5
  warmup_steps: int = 100
  beta1: float = 0.8
  beta2: float = 0.9
  weight_decay: float = 0.01
  clip_norm: float = 1.0


@dataclass(frozen=True)
class QuirksConfig:
  """The release's faults, each a switch. All off is `fixed`, the default; all on reproduces the release."""

  discriminator_default_lr: bool = False  # discriminator at a constant 1e-3 (PyTorch's default), no schedule
  batch_mel_floor: bool = False  # resynthesis' log-mel floored at the batch's maximum - 8, not each item's own
  loss_over_padding: bool = False  # teacher's distance averaged over the zero padding to 30 s too (window 'full')
  drop_tail: bool = False  # encode drops the samples past the last whole frame; decode keeps no length
  attached_subtraction: bool = False  # gradients of the acoustic path reach z_semantic through the subtraction
  pooled_usage: bool = False  # codebook usage is pooled over quantizers and saturates over training
  dead_codes: bool = False  # codebooks start at random and nothing revives a code that is never drawn

  @classmethod
  def named(cls, name: str) -> QuirksConfig:
    """'fixed' or 'release'."""
    if name not in ('fixed', 'release'):
      raise LmsptError(f"config field quirks = {name!r}: use 'fixed' or 'release'")
    return cls(**{f.name: name == 'release' for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class CorpusConfig:
  """One corpus of a mixture. Its utterances are chosen by split, then by `where`, then up to the limits."""

  uri: str = ''  # KIND:URI, e.g. folder:DIR or webdataset:s3://bucket/{000..099}.tar
  split: str = 'train'  # '' takes every utterance
  weight: float = 1.0  # share of the examples, relative to the other corpora's
  where: str = ''  # on metadata, e.g. 'seconds >= 1 and language in en,de and dnsmos > 3'
  max_utterances: int = 0  # 0: all. What stays is drawn by id, and larger limits add to smaller ones
  max_hours: float = 0.0  # 0: all

  def check(self, name: str) -> None:
    _require(bool(self.uri), f'{name}.uri', self.uri, 'give KIND:URI, e.g. folder:recordings')
    _require(0 < self.weight < math.inf, f'{name}.weight', self.weight, 'use a positive number')
    for key in ('max_utterances', 'max_hours'):
      _require(getattr(self, key) >= 0, f'{name}.{key}', getattr(self, key), 'use 0 (no limit) or more')


@dataclass(frozen=True)
class AugmentConfig:
  """What is done to a crop before it is both input and target; all off. Applied in this order, each by its own odds."""

  noise_probability: float = 0.0
  noise: str = ''  # KIND:URI of recordings to add
  noise_snr_db: tuple[float, ...] = (5.0, 20.0)  # drawn between
  telephone_probability: float = 0.0  # 300 to 3400 Hz
  gain_probability: float = 0.0
  gain_db: tuple[float, ...] = (-6.0, 6.0)  # drawn between

  def check(self, name: str) -> None:
    for key in ('noise_probability', 'telephone_probability', 'gain_probability'):
      _require(0 <= getattr(self, key) <= 1, f'{name}.{key}', getattr(self, key), 'use a share in [0, 1]')
    for key in ('noise_snr_db', 'gain_db'):
      value = getattr(self, key)
      _require(len(value) == 2 and value[0] <= value[1], f'{name}.{key}', value, 'give lowest and highest')
    _require(not self.noise_probability or bool(self.noise), f'{name}.noise', self.noise,
             'give KIND:URI of the noise, or set noise_probability = 0')


@dataclass(frozen=True)
class DataConfig:
  """Where speech comes from. A text as `train` means one corpus with the defaults of `CorpusConfig`."""

  train: tuple[CorpusConfig, ...] = ()
  language_temperature: float = 1.0  # languages' shares are raised to 1 / this; 1 leaves them, more evens them out
  augment: AugmentConfig = AugmentConfig()
  held_out: str = ''  # KIND:URI; '' trains without held-out evaluation
  held_out_split: str = 'valid'
  crop_seconds: float = 6.0
  batch_size: int = 64  # crops per step over all devices
  num_workers: int = 2  # spawned processes that decode; 0 decodes in the training process
  max_fault_rate: float = 0.01  # training stops when a larger share of the records (or of the shards) can't be used

  def __post_init__(self):
    if isinstance(self.train, str):
      object.__setattr__(self, 'train', (CorpusConfig(uri=self.train),) if self.train else ())

  def check(self, name: str = 'data') -> None:
    for number, corpus in enumerate(self.train):
      corpus.check(f'{name}.train.{number}')
    self.augment.check(f'{name}.augment')
    _require(self.language_temperature >= 1, f'{name}.language_temperature', self.language_temperature,
             'use 1 (as the weights say) or more')
    _require(self.batch_size >= 1, f'{name}.batch_size', self.batch_size, 'use at least 1')
    _require(self.crop_seconds > 0, f'{name}.crop_seconds', self.crop_seconds, 'use a positive length')
    _require(self.num_workers >= 0, f'{name}.num_workers', self.num_workers, 'use 0 or more')
    _require(0 <= self.max_fault_rate <= 1, f'{name}.max_fault_rate', self.max_fault_rate, 'use a share in [0, 1]')


@dataclass(frozen=True)
class MeshConfig:
  """Device mesh. The batch is sharded over data x fsdp, parameters over fsdp; one axis may be -1 (what is left)."""

  data: int = -1
  fsdp: int = 1


@dataclass(frozen=True)
class TrainConfig:
  num_steps: int = 400_000
  seed: int = 0  # of parameters, dropout and data order
  log_every: int = 10  # steps
  eval_every: int = 5_000  # steps; the last step is always evaluated
  eval_utterances: int = 64  # at most, for the held-out figures
  eval_audio: int = 4  # of these are written as wav files
  eval_seconds: float = 6.0  # held-out utterances are cut or padded to this length
  checkpoint_every: int = 2_000  # steps; the last step is always saved
  keep_checkpoints: int = 3

  def check(self, name: str = 'train') -> None:
    for key in ('num_steps', 'log_every', 'eval_every', 'eval_utterances', 'checkpoint_every', 'keep_checkpoints'):
      _require(getattr(self, key) >= 1, f'{name}.{key}', getattr(self, key), 'use at least 1')


@dataclass(frozen=True)
class ExperimentConfig:
  """Everything a run depends on."""

  name: str = 'lmspt'
  model: ModelConfig = ModelConfig()
  discriminator: DiscriminatorConfig = DiscriminatorConfig()
  teacher: TeacherConfig = TeacherConfig()
  loss: LossConfig = LossConfig()
  generator_optimizer: OptimizerConfig = OptimizerConfig()
  discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, final_learning_rate=2.5e-5)
  quirks: QuirksConfig = QuirksConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = field(default_factory=TrainConfig)

  @property
  def crop_samples(self) -> int:
    """Samples of a training crop: crop_seconds, rounded to whole frames."""
    return max(1, round(self.data.crop_seconds * self.model.frame_rate)) * self.model.hop

  def check(self) -> ExperimentConfig:
    """Raises LmsptError naming the first field that does not fit."""
    for f in dataclasses.fields(self):
      part = getattr(self, f.name)
      if hasattr(part, 'check'):
        part.check(f.name) if f.name != 'mesh' else None
    return self


# ---------------------------------------------------------------- ConfigDict and JSON


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """What a file in `configs/` returns: typed, locked against unknown fields."""
  return ml_collections.ConfigDict(dataclasses.asdict(config), convert_dict=True).lock()


def to_dict(config: Any) -> dict[str, Any]:
  """Plain JSON-able dictionary of any config dataclass."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_config_dict(config_dict: ml_collections.ConfigDict) -> ExperimentConfig:
  """Checks names, types and values; raises LmsptError naming the field, its value and the nearest known names."""
  return from_dict(ExperimentConfig, config_dict.to_dict()).check()


def from_dict(cls: type, values: dict[str, Any], prefix: str = '') -> Any:
  """Builds the dataclass `cls` from nested dictionaries (a ConfigDict's or a JSON file's)."""
  hints = typing.get_type_hints(cls)
  names = {f.name for f in dataclasses.fields(cls)}
  out = {}
  for key, value in values.items():
    if key not in names:
      raise LmsptError(f'unknown config field {prefix}{key}: {nearest(key, names)}')
    out[key] = _coerce(hints[key], value, f'{prefix}{key}')
  return cls(**out)


def _coerce(hint: Any, value: Any, name: str) -> Any:
  if dataclasses.is_dataclass(hint):
    if name == 'quirks' and isinstance(value, str):
      return QuirksConfig.named(value)
    if not isinstance(value, dict):
      example = f'{name}.{dataclasses.fields(hint)[0].name}'
      raise LmsptError(f'config field {name} = {value!r}: set its fields, e.g. {example}')
    return from_dict(hint, value, prefix=f'{name}.')
  if typing.get_origin(hint) is tuple:
    element = typing.get_args(hint)[0]
    if element is CorpusConfig and isinstance(value, str):
      return value  # DataConfig takes it
    if not isinstance(value, list | tuple):
      raise LmsptError(f'config field {name} = {value!r}: give a tuple')
    numbered = dataclasses.is_dataclass(element)
    return tuple(_coerce(element, v, f'{name}.{i}' if numbered else name) for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    wanted = hint.__name__ if not isinstance(hint, types.UnionType) else str(hint)
    raise LmsptError(f'config field {name} = {value!r}: must be {wanted}')
  return value
