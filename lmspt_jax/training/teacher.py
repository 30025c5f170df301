"""How the frozen teacher shapes the semantic codes: a strategy object, so that the step knows nothing of it.

Axes: B batch, N samples at the codec's rate, M samples at 16 kHz, P teacher positions (50 a second of Whisper,
25 of Qwen2-Audio), T frames, C latent channels, D teacher width.

A strategy has two halves. `student` runs inside the generator's forward and may have parameters of its own; `loss`
takes what came out of it, and gradients flow back through the teacher to the resynthesis, never to the teacher.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lmspt_jax.audio.mel import WHISPER_SAMPLE_RATE, log_mel_spectrogram
from lmspt_jax.audio.resample import resample
from lmspt_jax.config import FLOAT32, ComputeConfig, ExperimentConfig
from lmspt_jax.losses.distillation import feature_distance
from lmspt_jax.models import whisper
from lmspt_jax.models.layers import PRECISION
from lmspt_jax.models.teachers import TeacherDims, encoder_of
from lmspt_jax.models.tokenizer import TokenizerOutput
from lmspt_jax.sharding import BATCH, constrain, gathered, over_fsdp

WINDOW_SECONDS = 30
WINDOW_SAMPLES = WINDOW_SECONDS * WHISPER_SAMPLE_RATE


class Distillation(Protocol):
  """What the train step asks of a strategy."""

  def init(self, key: Array) -> dict[str, Any]:
    """Trainable parameters of the student side; may be empty."""
    ...

  def student(self, params: dict[str, Any], output: TokenizerOutput) -> Array:
    """What is compared with the teacher, from the generator's forward."""
    ...

  def loss(self, teacher_params: Any, audio_BN: Array, num_samples_B: Array, student: Array) -> Array:
    """Scalar distance; differentiable in `student` alone."""
    ...

  def weight(self, num_samples_B: Array, samples: int) -> Array:
    """Scalar: what `loss` of items with N = `samples` is a mean over. Means of parts make the whole's by it."""
    ...


class FrozenTeacher:
  """A speech encoder (`models.teachers`) over a window of the crop.

  Args:
    dims: the encoder's sizes, which say its family.
    sample_rate: of the audio given to `targets`, in Hz.
    window: 'crop' encodes the crop's own positions; 'full' zero-pads it to 30 s, as released.
    batch_mel_floor: the resynthesis' log-mel is floored at the batch's maximum - 8 (a quirk of the release).
    compute: dtype of its products and whether its blocks are recomputed in the backward pass; log-mels are float32.
  """

  def __init__(self, dims: TeacherDims, sample_rate: int, window: str, batch_mel_floor: bool = False,
               compute: ComputeConfig = FLOAT32):
    self.dims, self.sample_rate, self.window, self.batch_mel_floor = dims, sample_rate, window, batch_mel_floor
    self.dtype, self.remat = jnp.dtype(compute.dtype), compute.remat_teacher == 'block'
    self.samples_per_position = WHISPER_SAMPLE_RATE // dims.positions_per_second  # at 16 kHz

  def targets(self, params: Any, audio_BN: Float[Array, 'B N']) -> Float[Array, 'B P D']:
    """Features of the original, without gradient."""
    audio_BM = resample(audio_BN, self.sample_rate, WHISPER_SAMPLE_RATE)
    return jax.lax.stop_gradient(self._encode(params, audio_BM, 'item'))

  def features(self, params: Any, audio_BM: Float[Array, 'B M']) -> Float[Array, 'B P D']:
    """Features of a resynthesis at 16 kHz; gradients reach the audio, not the parameters."""
    return self._encode(params, audio_BM, 'batch' if self.batch_mel_floor else 'item')

  def valid_positions(self, num_samples_B: Int[Array, 'B'], positions: int) -> Float[Array, 'B P']:
    """1 for positions that start inside the item's real audio, 0 for padding."""
    ends_B = num_samples_B * (WHISPER_SAMPLE_RATE / self.sample_rate)
    return (jnp.arange(positions) * self.samples_per_position < ends_B[:, None]).astype(jnp.float32)

  def _encode(self, params: Any, audio_BM: Array, floor: str) -> Array:
    samples, position = audio_BM.shape[1], self.samples_per_position
    whole = WINDOW_SAMPLES if self.window == 'full' else -(-samples // position) * position
    if samples > WINDOW_SAMPLES:
      raise ValueError(f'{samples} samples at 16 kHz: the teacher sees at most 30 s, shorten data.crop_seconds')
    audio_BM = jnp.pad(audio_BM, ((0, 0), (0, whole - samples)))
    params = jax.lax.stop_gradient(params)
    if over_fsdp():
      params = {**params, **{name: gathered(params[name]) for name in ('conv1', 'conv2')}}
    encoder = whisper.bind(encoder_of(self.dims), self.dims, params, dtype=self.dtype, remat=self.remat,
                           gather=_gather_layer if over_fsdp() else None)
    return encoder(constrain(log_mel_spectrogram(audio_BM, self.dims.n_mels, floor), BATCH))


def _gather_layer(layer: Any) -> Any:
  """A block's kernels over `tensor` alone. By itself the compiler may leave them split and sum every product over the
  mesh instead: traffic that grows with the batch."""
  def place(path: tuple[Any, ...], x: Array) -> Array:
    found = re.search(r'(query|key|value|up|out|down)/kernel', jax.tree_util.keystr(path, simple=True, separator='/'))
    if found is None:
      return x
    return constrain(x, PartitionSpec('tensor') if found[1] in ('out', 'down') else PartitionSpec(None, 'tensor'))

  return jax.tree_util.tree_map_with_path(place, layer)


def stored_params(params: Any, compute: ComputeConfig) -> Any:
  """A teacher's arrays as training keeps them: kernels in the dtype they are multiplied in, the rest float32."""
  dtype = jnp.dtype(compute.dtype)
  return jax.tree.map_with_path(lambda path, x: x.astype(dtype) if path[-1].key == 'kernel' else x, params)


class ResynthesisDistillation:
  """LM-SPT's: the distance between the teacher's views of the original and of the semantic resynthesis.

  (arXiv 2506.16738, section 3.2)
  """

  def __init__(self, teacher: FrozenTeacher, distance: str, over_padding: bool):
    self.teacher, self.distance, self.over_padding = teacher, distance, over_padding

  def init(self, key: Array) -> dict[str, Any]:
    del key
    return {}

  def student(self, params: dict[str, Any], output: TokenizerOutput) -> Float[Array, 'B M']:
    del params
    return output.resynthesis

  def loss(self, teacher_params: Any, audio_BN: Array, num_samples_B: Array, student: Array) -> Array:
    target_BPD = self.teacher.targets(teacher_params, audio_BN)
    feature_BPD = self.teacher.features(teacher_params, student)
    weight_BP = None if self.over_padding else self.teacher.valid_positions(num_samples_B, target_BPD.shape[1])
    return feature_distance(feature_BPD, target_BPD, self.distance, weight_BP)

  def weight(self, num_samples_B: Array, samples: int) -> Array:
    if self.over_padding:
      return jnp.asarray(num_samples_B.shape[0], jnp.float32)
    del samples
    return jnp.sum(self.teacher.valid_positions(num_samples_B, WINDOW_SAMPLES // self.teacher.samples_per_position))


class PooledFeatureDistillation:
  """The baseline: a linear map of z_semantic against the teacher's features, averaged over each frame's span.

  The average is weighted by overlap in time, so any frame rate works (SpeechTokenizer, arXiv 2308.16692, and Mimi,
  arXiv 2410.00037, at their own rates).
  """

  def __init__(self, teacher: FrozenTeacher, distance: str, latent_dim: int, hop: int):
    self.teacher, self.distance, self.latent_dim, self.hop = teacher, distance, latent_dim, hop

  def init(self, key: Array) -> dict[str, Any]:
    width = self.teacher.dims.width
    kernel = jax.random.normal(key, (self.latent_dim, width), jnp.float32) / np.sqrt(self.latent_dim)
    return {'kernel': kernel, 'bias': jnp.zeros((width,), jnp.float32)}

  def student(self, params: dict[str, Any], output: TokenizerOutput) -> Float[Array, 'B T D']:
    return jnp.matmul(output.semantic.quantized, params['kernel'], precision=PRECISION) + params['bias']

  def loss(self, teacher_params: Any, audio_BN: Array, num_samples_B: Array, student: Array) -> Array:
    target_BPD = self.teacher.targets(teacher_params, audio_BN)
    frames = student.shape[1]
    seconds_per_frame = self.hop / self.teacher.sample_rate
    seconds_per_position = self.teacher.samples_per_position / WHISPER_SAMPLE_RATE
    weights_TP = pooling_weights(frames, target_BPD.shape[1], seconds_per_frame, seconds_per_position)
    pooled_BTD = jnp.einsum('tp,bpd->btd', weights_TP, target_BPD, precision=PRECISION)
    return feature_distance(student, pooled_BTD, self.distance, self._valid(num_samples_B, frames))

  def weight(self, num_samples_B: Array, samples: int) -> Array:
    return jnp.sum(self._valid(num_samples_B, samples // self.hop))

  def _valid(self, num_samples_B: Array, frames: int) -> Float[Array, 'B T']:
    return (jnp.arange(frames) * self.hop < num_samples_B[:, None]).astype(jnp.float32)


class NoDistillation:
  """No teacher: the semantic codebook learns from reconstruction alone (an ablation)."""

  def init(self, key: Array) -> dict[str, Any]:
    del key
    return {}

  def student(self, params: dict[str, Any], output: TokenizerOutput) -> Array:
    del params, output
    return jnp.zeros((), jnp.float32)

  def loss(self, teacher_params: Any, audio_BN: Array, num_samples_B: Array, student: Array) -> Array:
    del teacher_params, audio_BN, num_samples_B
    return student

  def weight(self, num_samples_B: Array, samples: int) -> Array:
    del samples
    return jnp.asarray(num_samples_B.shape[0], jnp.float32)


def pooling_weights(frames: int, positions: int, seconds_per_frame: float, seconds_per_position: float) -> np.ndarray:
  """Rows of shares, float32 [frames, positions]: how much of a frame's span each teacher position covers."""
  step = seconds_per_position
  starts_T, starts_P = np.arange(frames) * seconds_per_frame, np.arange(positions) * step
  overlap_TP = (np.minimum(starts_T[:, None] + seconds_per_frame, starts_P + step)
                - np.maximum(starts_T[:, None], starts_P)).clip(0)
  return (overlap_TP / np.maximum(overlap_TP.sum(1, keepdims=True), 1e-12)).astype(np.float32)


def make_distillation(config: ExperimentConfig, dims: TeacherDims | None) -> Distillation:
  """The strategy a config names; `dims` of the teacher, None without one."""
  if config.teacher.strategy == 'none' or dims is None:
    return NoDistillation()
  teacher = FrozenTeacher(dims, config.model.sample_rate, config.teacher.window, config.quirks.batch_mel_floor,
                          config.compute)
  if config.teacher.strategy == 'pooled':
    return PooledFeatureDistillation(teacher, config.teacher.distance, config.model.latent_dim, config.model.hop)
  return ResynthesisDistillation(teacher, config.teacher.distance, config.quirks.loss_over_padding)
