"""A trained tokenizer, ready to use: recordings of any rate and channel count to codes, codes to speech.

Axes: C channels, N samples, K codebooks, T frames; B, a batch, is always 1 here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmspt_jax.config import ModelConfig
from lmspt_jax.data.audio_io import MAX_CHANNELS, MAX_RATE, MIN_RATE, to_mono_at
from lmspt_jax.errors import LmsptError
from lmspt_jax.inference.codes import Codes
from lmspt_jax.models.tokenizer import merge_tokenizer
from lmspt_jax.pretrained.loading import load
from lmspt_jax.pretrained.model import TrainedModel

__all__ = ['PATHS', 'Codes', 'Tokenizer']

# Ways from codes to speech, and the model's method for each.
PATHS = {'full': 'decode', 'semantic': 'decode_semantic', 'resynthesis': 'resynthesize'}


class Tokenizer:
  """Encodes and decodes speech with one model.

  Nothing is padded beyond the last whole frame: the codec's convolutions see past the end of the recording, so
  codes near it would change with the padding. Every different number of frames is therefore compiled once.
  """

  def __init__(self, model: TrainedModel):
    """Around a loaded model; see `from_pretrained`."""
    self.model = model
    self.config = model.config
    self.params, self.codebooks = model.params, model.codebooks
    self._apply = functools.cache(self._compile)

  @classmethod
  def from_pretrained(cls, model: str | os.PathLike, config: ModelConfig | None = None) -> Tokenizer:
    """Loads a model.

    Args:
      model: a run's workdir, a folder written by `lmspt export`, a .safetensors file in the layout of the authors'
        release, or hf://org/name[@revision].
      config: of a .safetensors file that does not tell all of it: an FSQ's levels, a model without subtraction.

    Raises:
      LmsptError: there is no model there, or not the config's.
    """
    return cls(load(model, config))

  @property
  def sample_rate(self) -> int:
    """Hz, of the main path."""
    return self.config.model.sample_rate

  @property
  def resynthesis_sample_rate(self) -> int:
    """Hz, of `path='resynthesis'`."""
    return self.config.model.resynthesis_sample_rate

  @property
  def frame_rate(self) -> float:
    """Frames per second."""
    return self.config.model.frame_rate

  @property
  def hop(self) -> int:
    """Samples per frame."""
    return self.config.model.hop

  @property
  def num_codebooks(self) -> int:
    return self.config.model.num_codebooks

  @property
  def codebook_sizes(self) -> tuple[int, ...]:
    """Number of different codes, per codebook; semantic first."""
    return self.config.model.codebook_sizes

  @property
  def license(self) -> str:
    """Of the weights, in words. Looked up when asked for, as that opens a run's training data."""
    return self.model.provenance.license

  @property
  def model_hash(self) -> str:
    """16 hex digits: equal models, equal text."""
    return self.model.hash

  def encode(self, audio: np.ndarray | Sequence[np.ndarray], *, sample_rate: int) -> Codes | list[Codes]:
    """Speech to codes.

    Args:
      audio: floats in [-1, 1], [samples] or [channels, samples] (the channels are averaged); or a list of such.
      sample_rate: Hz of `audio`; resampled to the model's if they differ.

    Returns:
      Codes with ids [K, T], T = ceil(num_samples / hop): right-padded with zeros to whole frames. (A model trained
      with `quirks.drop_tail` drops the tail instead, as the release does.) A list gives a list.

    Raises:
      LmsptError: no samples, NaN or infinite samples, not floats, a shape or a sample rate that can't be.
    """
    if isinstance(audio, list | tuple) and (not audio or not np.isscalar(audio[0])):
      return [self.encode(item, sample_rate=sample_rate) for item in audio]
    audio_N = self._mono(np.asarray(audio), sample_rate)
    if self.config.quirks.drop_tail:
      num_samples = len(audio_N) // self.hop * self.hop
      if not num_samples:
        raise LmsptError(f'{len(audio_N)} samples at {self.sample_rate} Hz: shorter than one frame ({self.hop}), and '
                         'this model drops the tail (quirks.drop_tail); give longer audio')
      audio_N = audio_N[:num_samples]
    num_samples = len(audio_N)
    padded_N = np.pad(audio_N, (0, self.config.model.num_frames(num_samples) * self.hop - num_samples))
    ids_BKT = self._apply('encode')(self.params, self.codebooks, padded_N[None])
    return Codes(ids=np.asarray(ids_BKT[0], np.int32), num_samples=num_samples, sample_rate=self.sample_rate,
                 frame_rate=self.frame_rate, model_hash=self.model_hash)

  def decode(self, codes: Codes | Sequence[Codes], path: str = 'full') -> np.ndarray | list[np.ndarray]:
    """Codes to speech.

    Args:
      codes: what `encode` returned (its first K codebooks are enough); a list gives a list.
      path: 'full'; 'semantic', the semantic codebook alone through the main decoder; or 'resynthesis', the same
        through the auxiliary decoder, at `resynthesis_sample_rate`.

    Returns:
      float32 [num_samples], for 'resynthesis' [round(num_samples * resynthesis_sample_rate / sample_rate)].

    Raises:
      LmsptError: codes of another model, ids or lengths that can't be, an unknown path.
    """
    if path not in PATHS:
      raise LmsptError(f'path {path!r}: use one of {", ".join(PATHS)}')
    if isinstance(codes, list | tuple):
      return [self.decode(item, path) for item in codes]
    self._check(codes)
    ids_KT = (codes.ids if path == 'full' else codes.ids[:1]).astype(np.int32)
    audio_N = np.asarray(self._apply(PATHS[path])(self.params, self.codebooks, ids_KT[None])[0], np.float32)
    length = codes.num_samples
    if path == 'resynthesis':
      length = round(length * self.resynthesis_sample_rate / self.sample_rate)
    return np.pad(audio_N, (0, max(0, length - len(audio_N))))[:length]

  def _mono(self, audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 [N] at the model's rate, N >= 1."""
    if audio.dtype.kind != 'f':
      raise LmsptError(f'audio of type {audio.dtype}: give floats in [-1, 1] (16-bit samples divided by 32768)')
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and audio.shape[0] > MAX_CHANNELS):
      raise LmsptError(f'audio of shape {audio.shape}: give [samples] or [channels, samples] (transpose what '
                       'soundfile reads)')
    if not audio.size:
      raise LmsptError(f'audio of shape {audio.shape}: holds no samples')
    with np.errstate(over='ignore'):  # what does not fit float32 is infinite
      audio = audio.astype(np.float32)
    if not np.isfinite(audio).all():
      raise LmsptError(f'audio of shape {audio.shape}: holds NaN or infinite samples')
    if sample_rate != int(sample_rate) or not MIN_RATE <= sample_rate <= MAX_RATE:
      raise LmsptError(f'sample rate {sample_rate} Hz: must be a whole number, {MIN_RATE} to {MAX_RATE} Hz')
    return to_mono_at(audio.T, int(sample_rate), self.sample_rate)

  def _check(self, codes: Codes) -> None:
    ids = codes.ids
    if codes.model_hash not in ('', self.model_hash):
      raise LmsptError(f'codes of model {codes.model_hash}, not of this one ({self.model_hash}): use the model that '
                       "made them (any model decodes codes with model_hash='')")
    if ids.ndim != 2 or not 1 <= ids.shape[0] <= self.num_codebooks or not ids.shape[1]:
      raise LmsptError(f'ids of shape {ids.shape}: this model has {self.num_codebooks} codebooks; give '
                       f'[1 to {self.num_codebooks}, at least 1 frame]')
    for k, (ids_T, size) in enumerate(zip(ids, self.codebook_sizes, strict=False)):
      if ids_T.min() < 0 or ids_T.max() >= size:
        raise LmsptError(f'ids of codebook {k} from {ids_T.min()} to {ids_T.max()}: this model has codes 0 to '
                         f'{size - 1} there; use the model that made them')
    if codes.sample_rate != self.sample_rate:
      raise LmsptError(f'codes of speech at {codes.sample_rate} Hz: this model works at {self.sample_rate} Hz; use the '
                       'model that made them')
    if codes.num_samples < 1 or self.config.model.num_frames(codes.num_samples) != ids.shape[1]:
      least, most = (ids.shape[1] - 1) * self.hop + 1, ids.shape[1] * self.hop
      raise LmsptError(f'num_samples {codes.num_samples}: {ids.shape[1]} frames of {self.hop} samples hold {least} to '
                       f'{most}; use the model that made them')

  def _compile(self, method: str) -> Any:
    """`(params, codebooks, array) -> array` of one of the model's methods; compiled per shape."""

    def apply(params: dict[str, Any], codebooks: dict[str, Any], array: jax.Array) -> jax.Array:
      return getattr(merge_tokenizer(self.config.model, params, codebooks), method)(array)

    return jax.jit(apply)
