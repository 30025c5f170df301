"""The systems that are compared: what a model makes of a recording by its three paths, and the baselines.

A system's name is that of its path for MODEL ('full', 'semantic', 'resynthesis'), LABEL/PATH for another model, and
'original', 'narrow_8k', 'opus_6k' or 'codec2_700' for the rest. Every system is heard at 16 kHz and cut to the
original's length, so that all are measured alike.

Axes: N samples, K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmspt_jax.data.audio_io import to_mono_at
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.sources import Source
from lmspt_jax.errors import LmsptError
from lmspt_jax.evaluation import baselines
from lmspt_jax.inference.codes import Codes
from lmspt_jax.inference.tokenizer import PATHS, Tokenizer
from lmspt_jax.measures.ears import language_code
from lmspt_jax.measures.measure import RATE, fitted

MAX_SECONDS = 600  # of a recording: longer ones are no utterances


@dataclass(frozen=True)
class Recording:
  """One utterance: mono at its own rate and at 16 kHz, float32 [N]; `fault` is why there is no audio ('' otherwise)."""

  id: str
  text: str
  language: str
  speaker: str
  rate: int
  own_N: np.ndarray
  audio_N: np.ndarray
  fault: str = ''

  @property
  def seconds(self) -> float:
    return len(self.own_N) / self.rate

  def digest(self) -> bytes:
    """Of all that is measured."""
    labels = json.dumps([self.id, self.text, self.language, self.rate, self.fault])
    return hashlib.sha256(labels.encode() + self.own_N.tobytes()).digest()


def load(source: Source, position: int) -> Recording:
  """A recording that can't be read has a fault; it is counted."""
  nothing_N, utterance = np.zeros(0, np.float32), None
  try:
    utterance = source[position]
    audio, rate = utterance.decode()
    if len(audio) > MAX_SECONDS * rate:
      raise AudioError(f'{utterance.name}: longer than {MAX_SECONDS} s, cut it up', 'too large')
  except AudioError as error:
    name = utterance.id if utterance else source.name(position)
    return Recording(name, '', '', '', RATE, nothing_N, nothing_N, str(error))
  own_N = to_mono_at(audio, rate, rate)
  return Recording(utterance.id, utterance.text, language_code(utterance.language), utterance.speaker, rate, own_N,
                   to_mono_at(own_N, rate, RATE))


class Model:
  """A tokenizer as systems.

  Attributes:
    uri: as it was given.
    label: '' of MODEL.
    tokenizer: its model.
  """

  def __init__(self, uri: str, label: str = ''):
    self.uri, self.label, self.tokenizer = uri, label, Tokenizer.from_pretrained(uri)

  def system(self, path: str) -> str:
    return f'{self.label}/{path}' if self.label else path

  @property
  def systems(self) -> list[str]:
    return [self.system(path) for path in PATHS]

  def bitrate(self, path: str) -> float:
    """Bits a second."""
    sizes = self.tokenizer.codebook_sizes
    return float(np.sum(np.log2(sizes if path == 'full' else sizes[:1])) * self.tokenizer.frame_rate)

  def encode(self, recordings: Sequence[Recording]) -> list[Codes | None]:
    """None for a recording that is shorter than this model takes (with quirks.drop_tail, less than a frame)."""
    tokenizer = self.tokenizer
    least = tokenizer.hop if tokenizer.config.quirks.drop_tail else 1
    taken = [number for number, one in enumerate(recordings)
             if len(one.own_N) * tokenizer.sample_rate >= least * one.rate and len(one.own_N)]
    codes: list[Codes | None] = [None] * len(recordings)
    for rate in sorted({recordings[number].rate for number in taken}):
      here = [number for number in taken if recordings[number].rate == rate]
      found = tokenizer.encode([recordings[number].own_N for number in here], sample_rate=rate)
      for number, one in zip(here, found, strict=True):
        codes[number] = one
    return codes

  def decode(self, codes: Sequence[Codes], path: str, lengths: Sequence[int]) -> list[np.ndarray]:
    """float32 at 16 kHz, [length] each."""
    rate = self.tokenizer.resynthesis_sample_rate if path == 'resynthesis' else self.tokenizer.sample_rate
    decoded = self.tokenizer.decode(list(codes), path)
    return [fitted(to_mono_at(audio_N, rate, RATE), length) for audio_N, length in zip(decoded, lengths, strict=True)]


def load_models(model: str, others: Iterable[str]) -> list[Model]:
  """MODEL first; the others are labelled by the last part of what was given. Raises LmsptError for two of a name."""
  models = [Model(model)]
  for uri in others:
    label = Path(uri.rstrip('/')).name.partition('@')[0].removesuffix('.safetensors') or 'baseline'
    if any(label == one.label for one in models) or label in ('original', *BASELINES):
      raise LmsptError(f'--baseline={uri}: another system is called {label!r} too; give a path that ends differently')
    models.append(Model(uri, label))
  return models


_CODECS = {**{f'opus_{bitrate // 1000}k': (baselines.opus, bitrate) for bitrate in baselines.OPUS},
           **{f'codec2_{bitrate}': (baselines.codec2, bitrate) for bitrate in baselines.CODEC2}}
BASELINES = ('narrow_8k', *_CODECS)


def baseline_audio(recording: Recording) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """What the BASELINES make of a recording: audio by system, and of the codecs the bits they took."""
  audio = {'narrow_8k': baselines.narrowed(recording.audio_N)}
  bits = {}
  for name, (codec, bitrate) in _CODECS.items():
    audio[name], bits[name] = codec(recording.audio_N, bitrate)
  return audio, bits
