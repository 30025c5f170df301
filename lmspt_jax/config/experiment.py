"""Everything else a run depends on: teacher, losses, optimizers, data, mesh, precision, training."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from lmspt_jax.config.checks import require
from lmspt_jax.config.model import DiscriminatorConfig, ModelConfig
from lmspt_jax.errors import LmsptError


@dataclass(frozen=True)
class TeacherConfig:
  """The frozen speech encoder that the semantic codes are distilled from."""

  strategy: str = 'resynthesis'  # 'resynthesis' (LM-SPT), 'pooled' (features at the token rate), 'none'
  # A Whisper: package:tiny.en, openai:FILE.pt, hf:DIR, ctranslate2:DIR, hf://org/name[@revision]. Or the audio tower of
  # Qwen2-Audio, 25 features a second: hf:DIR, hf://Qwen/Qwen2-Audio-7B
  checkpoint: str = 'hf://openai/whisper-large-v3'
  window: str = 'crop'  # 'crop': positions of the crop only; 'full': zero-padded to 30 s, as released
  distance: str = 'mse'  # or 'l1'

  @property
  def source(self) -> str:
    """The checkpoint in use; '' where there is no teacher."""
    return '' if self.strategy == 'none' else self.checkpoint

  def check(self, name: str = 'teacher') -> None:
    require(self.strategy in ('resynthesis', 'pooled', 'none'), f'{name}.strategy', self.strategy,
             "use 'resynthesis', 'pooled' or 'none'")
    require(self.window in ('crop', 'full'), f'{name}.window', self.window, "use 'crop' or 'full'")
    require(self.distance in ('mse', 'l1'), f'{name}.distance', self.distance, "use 'mse' or 'l1'")


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
    require(len(self.mel_bins) == len(self.mel_windows) > 0, f'{name}.mel_bins', self.mel_bins,
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
    require(bool(self.uri), f'{name}.uri', self.uri, 'give KIND:URI, e.g. folder:recordings')
    require(0 < self.weight < math.inf, f'{name}.weight', self.weight, 'use a positive number')
    for key in ('max_utterances', 'max_hours'):
      require(getattr(self, key) >= 0, f'{name}.{key}', getattr(self, key), 'use 0 (no limit) or more')


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
      require(0 <= getattr(self, key) <= 1, f'{name}.{key}', getattr(self, key), 'use a share in [0, 1]')
    for key in ('noise_snr_db', 'gain_db'):
      value = getattr(self, key)
      require(len(value) == 2 and value[0] <= value[1], f'{name}.{key}', value, 'give lowest and highest')
    require(not self.noise_probability or bool(self.noise), f'{name}.noise', self.noise,
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
    require(self.language_temperature >= 1, f'{name}.language_temperature', self.language_temperature,
             'use 1 (as the weights say) or more')
    require(self.batch_size >= 1, f'{name}.batch_size', self.batch_size, 'use at least 1')
    require(self.crop_seconds > 0, f'{name}.crop_seconds', self.crop_seconds, 'use a positive length')
    require(self.num_workers >= 0, f'{name}.num_workers', self.num_workers, 'use 0 or more')
    require(0 <= self.max_fault_rate <= 1, f'{name}.max_fault_rate', self.max_fault_rate, 'use a share in [0, 1]')


@dataclass(frozen=True)
class MeshConfig:
  """Device mesh data x fsdp x tensor; one size may be -1 (what is left).

  The batch is sharded over data x fsdp, parameters, optimizer states and the teacher over fsdp and tensor by rules
  (`lmspt_jax/sharding.py`).
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: tuple[str, ...] = ()  # 'REGEX = AXES' before the default ones, e.g. 'teacher/.*/kernel = -, fsdp'


@dataclass(frozen=True)
class ComputeConfig:
  """Precision and memory of the train step. But for dtype, nothing here changes what is computed."""

  dtype: str = 'float32'  # of activations; or 'bfloat16'. Parameters, losses, STFTs and quantizers are float32
  accumulation: int = 1  # the batch is worked through in so many parts, their gradients averaged
  remat_codec: str = 'none'  # recomputed in the backward pass: 'unit' residual units, 'block' whole blocks
  remat_discriminators: str = 'none'  # or 'block': each sub-discriminator
  remat_teacher: str = 'none'  # or 'block': each transformer block
  # Compiling for a TPU, a convolution's search for tiles ends at one whose estimated speed is this share of the best.
  # 1 takes more than twice as long as 0.95 and gains the step a few percent (docs/scaling.md).
  tpu_convolution_target: float = 0.95

  def check(self, name: str = 'compute') -> None:
    require(self.dtype in ('float32', 'bfloat16'), f'{name}.dtype', self.dtype, "use 'float32' or 'bfloat16'")
    require(self.accumulation >= 1, f'{name}.accumulation', self.accumulation, 'use at least 1')
    require(0.5 <= self.tpu_convolution_target <= 1, f'{name}.tpu_convolution_target', self.tpu_convolution_target,
            'use 0.5 to 1')
    for key, known in (('remat_codec', ('none', 'unit', 'block')), ('remat_discriminators', ('none', 'block')),
                       ('remat_teacher', ('none', 'block'))):
      require(getattr(self, key) in known, f'{name}.{key}', getattr(self, key), f'use one of {known}')


FLOAT32 = ComputeConfig()  # inference: nothing rounded, nothing recomputed


@dataclass(frozen=True)
class InitConfig:
  """What a fresh run starts from in place of random arrays. A run with a checkpoint of its own goes on from that."""

  model: str = ''  # MODEL: a run's workdir, an exported folder, a .safetensors, hf://org/name; '': at random
  weights: str = 'average'  # of a run; or 'last'
  discriminators: bool = False  # a run's too
  optimizers: bool = False  # a run's moments too; schedules begin anew

  def check(self, name: str = 'init') -> None:
    require(self.weights in ('average', 'last'), f'{name}.weights', self.weights, "use 'average' or 'last'")
    for key in ('discriminators', 'optimizers'):
      require(bool(self.model) or not getattr(self, key), f'{name}.{key}', True,
              'give init.model, a run, or set it to false')
    # The moments are those of the last step's parameters, of both networks.
    require(not self.optimizers or (self.discriminators and self.weights == 'last'), f'{name}.optimizers', True,
            "needs init.discriminators=true and init.weights='last'")


@dataclass(frozen=True)
class TrainConfig:
  num_steps: int = 400_000
  seed: int = 0  # of parameters, dropout and data order
  log_every: int = 10  # steps
  eval_every: int = 5_000  # steps; the last step is always evaluated
  eval_utterances: int = 64  # at most, for the held-out figures
  eval_audio: int = 4  # of these are written as wav files
  eval_seconds: float = 6.0  # held-out utterances are cut or padded to this length
  eval_metrics: str = ''  # of `lmspt evaluate`, e.g. 'wer,pesq,dnsmos', or 'all': taken of them too, by host 0
  eval_asr: str = 'package:tiny.en'  # Whisper that transcribes for wer and cer
  checkpoint_every: int = 2_000  # steps; the last step is always saved
  keep_checkpoints: int = 3  # the newest
  best_metric: str = ''  # e.g. 'held_out/full/pesq': the checkpoint of the best evaluation by it is kept besides
  ema_decay: float = 0.999  # moving average of the generator, the one that is evaluated and exported; 0: none
  freeze: str = ''  # REGEX: parameters and codebooks in whose path it is found stay as they are, e.g. semantic_
  max_skipped_steps: int = 10  # in a row, for losses or gradients that are not finite, before training stops

  def check(self, name: str = 'train') -> None:
    for key in ('num_steps', 'log_every', 'eval_every', 'eval_utterances', 'checkpoint_every', 'keep_checkpoints',
                'max_skipped_steps'):
      require(getattr(self, key) >= 1, f'{name}.{key}', getattr(self, key), 'use at least 1')
    require(0 <= self.ema_decay < 1, f'{name}.ema_decay', self.ema_decay, 'use a share in [0, 1)')
    try:
      re.compile(self.freeze)
    except re.error as error:
      raise LmsptError(f'config field {name}.freeze = {self.freeze!r}: no regular expression ({error})') from error


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
  compute: ComputeConfig = ComputeConfig()
  init: InitConfig = InitConfig()
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
        part.check(f.name)
    require(self.data.batch_size % self.compute.accumulation == 0, 'compute.accumulation', self.compute.accumulation,
             f'must divide data.batch_size, {self.data.batch_size}')
    require(not (self.quirks.batch_mel_floor and self.compute.accumulation > 1), 'compute.accumulation',
             self.compute.accumulation, 'quirks.batch_mel_floor looks at the whole batch at once: use 1')
    return self
