"""A trained tokenizer, ready to use: recordings of any rate and channel count to codes, codes to speech.

Axes: C channels, N samples, K codebooks, T frames, V samples a frame; B rows of a program.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from lmspt_jax.config import ModelConfig
from lmspt_jax.data.audio_io import mono_blocks, to_mono_at
from lmspt_jax.errors import LmsptError
from lmspt_jax.inference.checks import check_codes, checked_audio, checked_rate
from lmspt_jax.inference.codes import Codes
from lmspt_jax.inference.streaming import DecodingState, EncodingState, StreamedProgram, check_state
from lmspt_jax.inference.windows import WindowedProgram
from lmspt_jax.models.folding import folded_tokenizer
from lmspt_jax.models.inside import Inside
from lmspt_jax.models.past import Past
from lmspt_jax.models.reach import REACH_AND_GAP
from lmspt_jax.models.tokenizer import PATHS
from lmspt_jax.pretrained.loading import load
from lmspt_jax.pretrained.model import TrainedModel

__all__ = ['PATHS', 'Codes', 'Tokenizer']

# Windows in one call of a program. A CPU is busy with one; an accelerator is not.
_ROWS, _ROWS_ON_CPU = 4, 1
# Calls under way: of an accelerator one that is computed and one on its way; of a CPU few, as each takes memory.
_STREAMS, _MOST_STREAMS_ON_CPU = 2, 4


@dataclass
class _Recording:
  """One that is being encoded.

  Attributes:
    found: position of the first frame -> codes [n, K].
    missing: frames without codes; less than that by what was found, until the length is known.
  """

  num_samples: int = 0
  found: dict[int, np.ndarray] = field(default_factory=dict)
  missing: int = 0


class Tokenizer:
  """Encodes and decodes speech with one model.

  The same recording gives the same codes, and the same codes the same speech, alone or in a list, as an array or in
  blocks, on one device or several (docs/same_tokens.md). Half a dozen sizes of window are compiled, when first needed.
  """

  def __init__(self, model: TrainedModel):
    """Around a loaded model; see `from_pretrained`."""
    self.model = model
    self.config = model.config
    self.params, self.codebooks = model.params, model.codebooks
    self._program = functools.cache(self._make_program)
    self._stream = functools.cache(self._make_stream)
    self._weights = functools.cache(lambda device: jax.device_put(self._folded[1:], device))

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
    many = isinstance(audio, list | tuple) and (not audio or not np.isscalar(audio[0]))
    sample_rate = checked_rate(sample_rate)
    items = [checked_audio(np.asarray(item)) for item in (audio if many else [audio])]
    codes = self._encode(mono_blocks([item], sample_rate, self.sample_rate) for item in items)
    return codes if many else codes[0]

  def encode_blocks(self, blocks: Iterable[np.ndarray], *, sample_rate: int) -> Codes:
    """`encode` of one recording of any length, in constant memory.

    Args:
      blocks: the recording in blocks of any lengths, each as `encode` takes audio.

    Returns:
      The codes of the blocks end to end.

    Raises:
      LmsptError: as `encode`.
    """
    sample_rate = checked_rate(sample_rate)
    checked = (checked_audio(np.asarray(block)) for block in blocks)
    return self._encode([mono_blocks(checked, sample_rate, self.sample_rate)])[0]

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
    many = isinstance(codes, list | tuple)
    items = list(codes) if many else [codes]
    program, ids = self._decoding(items, path)
    audio = [np.zeros((item.ids.shape[1], self._hop(path)), np.float32) for item in items]
    for item, start, samples_TV in program(ids):
      audio[item][start:start + len(samples_TV)] = samples_TV
    audio = [whole.reshape(-1)[:self._length(item.num_samples, path)] for item, whole in zip(items, audio, strict=True)]
    return audio if many else audio[0]

  def decode_blocks(self, codes: Codes, path: str = 'full') -> Iterator[np.ndarray]:
    """`decode` of one recording of any length, in constant memory: yields its speech in blocks."""
    program, ids = self._decoding([codes], path)
    length, hop = self._length(codes.num_samples, path), self._hop(path)
    return (samples_TV.reshape(-1)[:length - start * hop] for _, start, samples_TV in program(ids))

  def start(self) -> EncodingState:
    """The state before the first sample of a recording that comes in pieces (docs/streaming.md).

    Raises:
      LmsptError: the model is not causal.
    """
    return EncodingState(self._stream('encode').beginning, np.zeros(0, np.float32), 0, self.model_hash)

  def push(self, samples: np.ndarray, state: EncodingState) -> tuple[Codes, EncodingState]:
    """The next samples of a recording to codes.

    Args:
      samples: at the model's rate, as `encode` takes audio; any number of them, also none.
      state: of `start`, or of the `push` before; it stays as it is.

    Returns:
      (codes of the frames whose last sample is now there, the state after them). All end to end are those of `encode`.

    Raises:
      LmsptError: samples as `encode` refuses them, a state of something else.
    """
    check_state(state, EncodingState, self.model_hash)
    samples = np.asarray(samples)
    if samples.size:
      samples = to_mono_at(checked_audio(samples), self.sample_rate, self.sample_rate)
    waiting_N = np.concatenate([state.rest_N, samples.reshape(-1)]).astype(np.float32, copy=False)
    whole = len(waiting_N) // self.hop * self.hop
    ids_TK, past = self._stream('encode')(state.past, waiting_N[:whole].reshape(-1, self.hop))
    after = state.num_samples + samples.size
    return self._codes(ids_TK, whole), EncodingState(past, waiting_N[whole:].copy(), after, self.model_hash)

  def finish(self, state: EncodingState) -> Codes:
    """Codes of the samples that are left when a recording is over: one frame, filled up with zeros, or none.

    Raises:
      LmsptError: no samples came; a state of something else.
    """
    check_state(state, EncodingState, self.model_hash)
    frames_TV = self._last_frame(state.rest_N, state.num_samples)
    ids_TK, _ = self._stream('encode')(state.past, frames_TV)
    return self._codes(ids_TK, len(state.rest_N) if len(frames_TV) else 0)

  def start_decoding(self, path: str = 'full') -> DecodingState:
    """The state before the first frame of codes that come in pieces; `path` as in `decode`.

    Raises:
      LmsptError: the model is not causal; an unknown path.
    """
    return DecodingState(self._stream(self._method(path)).beginning, path, 0, self.model_hash)

  def push_codes(self, codes: Codes, state: DecodingState) -> tuple[np.ndarray, DecodingState]:
    """The next codes to speech. Nothing is held back, so there is nothing to finish.

    Args:
      codes: of any number of frames, also none, as `push` returns them. After a frame that is not full (that of
        `finish`) none may follow.
      state: of `start_decoding`, or of the `push_codes` before; it stays as it is.

    Returns:
      (float32 samples that these codes stand for, the state after them). All pieces end to end are what `decode`
      returns.

    Raises:
      LmsptError: codes as `decode` refuses them, a state of something else.
    """
    check_state(state, DecodingState, self.model_hash)
    if not codes.ids.shape[-1]:
      return np.zeros(0, np.float32), state
    check_codes(codes, self.config.model, self.model_hash)
    if state.num_samples % self.hop:
      raise LmsptError(f'codes after the end of a recording of {state.num_samples} samples, which is not a number of '
                       f'whole frames of {self.hop}: begin anew with start_decoding')
    audio_TV, past = self._stream(self._method(state.path))(state.past, self._all_codebooks(codes, state.path))
    after = state.num_samples + codes.num_samples
    length = self._length(after, state.path) - self._length(state.num_samples, state.path)
    return audio_TV.reshape(-1)[:length], DecodingState(past, state.path, after, self.model_hash)

  def encode_each(self, recordings: Iterable[Iterable[np.ndarray]]) -> Iterator[tuple[int, Codes]]:
    """`encode` of any number of recordings, in constant memory: windows of all of them share the programs' rows.

    Args:
      recordings: each in blocks of any lengths of samples, float32 [n] at `sample_rate`, one sample at least in all.

    Yields:
      (number of the recording, its codes), each as soon as it is done; that need not be their order.

    Raises:
      LmsptError: a recording without samples, or shorter than a frame where the model drops the tail.
    """
    waiting: dict[int, _Recording] = {}

    def frames() -> Iterator[Iterator[np.ndarray]]:
      for number, blocks in enumerate(recordings):
        waiting[number] = recording = _Recording()
        yield self._frames(blocks, recording)

    for number, start, ids_TK in self._program('encode')(frames()):
      recording = waiting[number]
      recording.found[start] = ids_TK
      recording.missing -= len(ids_TK)
      if recording.missing == 0:
        del waiting[number]
        ids_TK = np.concatenate([ids_TK for _, ids_TK in sorted(recording.found.items())])
        yield number, self._codes(ids_TK, recording.num_samples)

  def _codes(self, ids_TK: np.ndarray, num_samples: int) -> Codes:
    return Codes(ids=np.ascontiguousarray(ids_TK.T), num_samples=num_samples, sample_rate=self.sample_rate,
                 frame_rate=self.frame_rate, model_hash=self.model_hash)

  def _encode(self, recordings: Iterable[Iterable[np.ndarray]]) -> list[Codes]:
    return [codes for _, codes in sorted(self.encode_each(recordings), key=lambda found: found[0])]

  def _frames(self, blocks: Iterable[np.ndarray], recording: _Recording) -> Iterator[np.ndarray]:
    """Blocks of whole frames [n, hop]; in the end the recording's lengths are known."""
    rest_N, count = np.zeros(0, np.float32), 0
    for block_N in blocks:
      count += len(block_N)
      rest_N = np.concatenate([rest_N, block_N])
      whole = len(rest_N) // self.hop * self.hop
      if whole:
        yield rest_N[:whole].reshape(-1, self.hop)
        rest_N = rest_N[whole:]
    last = self._last_frame(rest_N, count)
    if len(last):
      yield last
    else:
      count -= len(rest_N)
    recording.num_samples = count
    recording.missing += -(-count // self.hop)

  def _last_frame(self, rest_N: np.ndarray, num_samples: int) -> np.ndarray:
    """What is left of a recording of so many samples, as frames [0 or 1, hop]."""
    if not num_samples:
      raise LmsptError('no blocks of audio: holds no samples')
    if not self.config.quirks.drop_tail:
      return np.pad(rest_N, (0, -len(rest_N) % self.hop)).reshape(-1, self.hop)
    if num_samples < self.hop:
      raise LmsptError(f'{num_samples} samples at {self.sample_rate} Hz: shorter than one frame ({self.hop}), and '
                       'this model drops the tail (quirks.drop_tail); give longer audio')
    return np.zeros((0, self.hop), np.float32)

  def _decoding(self, items: list[Codes], path: str) -> tuple[WindowedProgram, Iterable[list[np.ndarray]]]:
    """What decodes these codes, and its input."""
    method = self._method(path)
    for codes in items:
      check_codes(codes, self.config.model, self.model_hash)
    return self._program(method), ([self._all_codebooks(codes, path)] for codes in items)

  def _all_codebooks(self, codes: Codes, path: str) -> np.ndarray:
    """int32 [T, all K]: a code of -1 adds nothing, so one program decodes any number of codebooks."""
    ids_KT = (codes.ids if path == 'full' else codes.ids[:1]).astype(np.int32)
    return np.pad(ids_KT, ((0, self.num_codebooks - len(ids_KT)), (0, 0)), constant_values=-1).T

  @staticmethod
  def _method(path: str) -> str:
    """The model's, that decodes so."""
    if path not in PATHS:
      raise LmsptError(f'path {path!r}: use one of {", ".join(PATHS)}')
    return 'resynthesize' if path == 'resynthesis' else 'decode'

  def _hop(self, path: str) -> int:
    """Samples of decoded speech a frame."""
    return math.prod(self.config.model.resynthesis_rates) if path == 'resynthesis' else self.hop

  def _length(self, num_samples: int, path: str) -> int:
    """Samples of decoded speech, of so many at the model's rate."""
    ratio = self.resynthesis_sample_rate / self.sample_rate
    return round(num_samples * ratio) if path == 'resynthesis' else num_samples

  @functools.cached_property
  def _folded(self) -> tuple[nnx.GraphDef, dict, dict]:
    return folded_tokenizer(self.config.model, self.params, self.codebooks)

  def _make_program(self, method: str) -> WindowedProgram:
    """One of the model's methods: samples [n, hop] to codes [n, K], or codes to samples [n, V]."""
    devices = jax.local_devices()
    reach, gap = (function(self.config.model) for function in REACH_AND_GAP[method])
    if devices[0].platform == 'cpu':
      rows, streams = _ROWS_ON_CPU, min(_MOST_STREAMS_ON_CPU, os.cpu_count() or 1)
    else:
      rows, streams = _ROWS, _STREAMS * len(devices)
    return WindowedProgram(self._function(method), self._weights, reach, gap, rows=rows, streams=streams,
                           devices=devices)

  def _make_stream(self, method: str) -> StreamedProgram:
    """The same, frame by frame."""
    if not self.config.model.causal:
      raise LmsptError(f'model {self.model_hash} is not causal (model.causal = False), so its codes depend on later '
                       'audio: stream with a model trained from configs/lmspt_12_5hz_causal.py, or use encode')
    function = self._function(method)
    frame_W = np.zeros(self.hop, np.float32) if method == 'encode' else np.zeros(self.num_codebooks, np.int32)
    return StreamedProgram(lambda weights, frames_BTW, past: function(weights, frames_BTW, None, past),
                           self._weights(jax.local_devices()[0]), frame_W)

  def _function(self, method: str) -> Callable[..., jax.Array]:
    """(weights, frames_BTW, which are of which recording, past) -> frames_BTV."""
    graphdef = self._folded[0]

    def encode(weights: Any, audio_BTV: jax.Array, inside: Inside | None, past: Past | None = None) -> jax.Array:
      model = nnx.merge(graphdef, *weights)
      return model.encode(audio_BTV.reshape(len(audio_BTV), -1), inside, past).transpose(0, 2, 1)

    def decode(weights: Any, codes_BTK: jax.Array, inside: Inside | None, past: Past | None = None) -> jax.Array:
      audio_BN = getattr(nnx.merge(graphdef, *weights), method)(codes_BTK.transpose(0, 2, 1), inside, past)
      return audio_BN.reshape(*codes_BTK.shape[:2], -1)

    return encode if method == 'encode' else decode
