"""Open audio: encoded files, samples as files, and what a store gives."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import soundfile

from lmspt_jax.data.audio_io.quiet import quiet_decoder
from lmspt_jax.data.storage.range_file import RangeFile

MP3_LEAD = 18_432  # frames decoded before a place: 32 of MPEG-2's or 16 of MPEG-1's, as far as their bits reach back
VORBIS_END = 1 << 18  # frames, as many as a page of Ogg can hold: libsndfile's seeks into the last page are off
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Pcm:
  """Samples that need no decoding: int16 or float32 [N] or [N, channels], at `sample_rate` Hz."""

  samples: np.ndarray
  sample_rate: int


@runtime_checkable
class Stored(Protocol):
  """Encoded audio kept elsewhere: a `storage.FileRange`."""

  size: int | None

  def open(self, *, name: str) -> BinaryIO:
    """A seekable file. Where its `fault` is an error, reading ended early because of it."""


class PcmFile:
  """`Pcm` as a file: the part of SoundFile's interface that is used here."""

  format, subtype = 'PCM', 'PCM_16'

  def __init__(self, pcm: Pcm):
    samples = pcm.samples
    self._samples = samples[:, None] if samples.ndim == 1 else samples
    self.samplerate, (self.frames, self.channels) = pcm.sample_rate, self._samples.shape
    self._position = 0

  def seek(self, position: int) -> None:
    self._position = position

  def read(self, count: int, **_: object) -> np.ndarray:
    """float32 [<= count, channels], a copy; integers scaled to [-1, 1) as SoundFile does."""
    part = self._samples[self._position:self._position + count]
    self._position += len(part)
    return part / np.float32(32768) if part.dtype == np.int16 else np.array(part, np.float32)

  def source_fault(self) -> None:
    """None: there is no store."""

  def close(self) -> None:
    """Nothing is open."""

  def __enter__(self) -> PcmFile:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class AudioFile(soundfile.SoundFile):
  """A SoundFile that reads the same samples after a seek as in a decode from the beginning (see `seek`).

  `frames` is what the file promises. Where its header lies, reading comes out short or raises.
  """

  def __init__(self, source: str | BinaryIO, *, close_source: bool = False):
    self._source, self._close_source, self._position = source, close_source, 0
    if isinstance(source, RangeFile):
      source.raises = False  # libsndfile takes no exceptions from a file
    with quiet_decoder():
      super().__init__(source)
    self._length = super().frames
    self._quiet = quiet_decoder if self.format == 'MP3' else nullcontext

  @property
  def frames(self) -> int:
    return self._length

  def seekable(self) -> bool:
    """No: a SoundFile that says yes seeks after every read, which fails at the end of a FLAC with a wrong length."""
    return False

  def seek(self, position: int) -> None:
    """Goes to a frame. What is read there equals a decode from the beginning bit for bit; for mp3 to 1e-6. Opus starts
    from a state 80 ms old and does not quite forget it: measured on speech it differs by up to 3e-3, 48 dB below it,
    and in the same way every time. Where the codec can't seek, frames are decoded up to there; never backwards."""
    if position == self._position:
      return
    with self._quiet():
      if not super().seekable():
        if position < self._position:
          raise ValueError(f'{self.format} {self.subtype} can only be read forwards')
        while self._position < position and len(self.read(min(position - self._position, _BLOCK))):
          pass
      else:
        start = position
        if self.subtype == 'VORBIS':
          super().seek(0)  # from elsewhere it may lose its place
          start = min(position, max(0, self.frames - VORBIS_END))
        elif self.subtype == 'MPEG_LAYER_III':
          start = max(0, position - MP3_LEAD)
        super().seek(start)
        if start < position:
          super().read(position - start, dtype='float32')
    self._position = position

  def read(self, count: int, dtype: str = 'float32', always_2d: bool = True) -> np.ndarray:
    """[<= count, channels]."""
    with self._quiet():
      found = super().read(min(count, self.frames), dtype=dtype, always_2d=always_2d)
    self._position += len(found)
    return found

  def count(self, limit: int) -> None:
    """Finds `frames`, up to a few more than `limit`, by decoding all; for a file that does not say."""
    found = 0
    while found <= limit and (block := len(self.read(_BLOCK))):
      found += block
    self.seek(0)
    self._length = found

  def source_fault(self) -> Exception | None:
    """What kept bytes from coming, if they come from a store."""
    return getattr(self._source, 'fault', None)

  def has_end(self) -> bool:
    """Whether the last frame can be decoded."""
    if not isinstance(self._source, str):
      self._source.seek(0)
    try:
      with AudioFile(self._source) as again:
        again.seek(self.frames - 1)
        return len(again.read(1)) == 1
    except (soundfile.SoundFileError, OSError):
      return False

  def close(self) -> None:
    super().close()
    if self._close_source:
      self._source.close()
