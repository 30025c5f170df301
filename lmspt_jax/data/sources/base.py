"""What every source of utterances is: an index and a way to fetch one row's audio."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from lmspt_jax.data import audio_io, storage
from lmspt_jax.data.audio_io import Pcm
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import Index
from lmspt_jax.data.records import MAX_AUDIO_BYTES
from lmspt_jax.data.storage import FileRange


@dataclass(frozen=True)
class Utterance:
  """One recording. Nothing is decoded until a method asks for it; the methods raise AudioError naming `name`."""

  id: str
  name: str  # for errors: the file, or "shard:record"
  content: bytes | Path | FileRange | Pcm  # encoded audio and where it is, or samples
  text: str = ''
  language: str = ''
  speaker: str = ''
  split: str = ''
  license: str = ''

  def open(self) -> soundfile.SoundFile | audio_io.PcmFile:
    """Header only: samplerate, frames, channels. Close it (it is a context manager)."""
    return audio_io.open_audio(self.content, name=self.name)

  def encoded(self) -> bytes | Pcm:
    """The file's bytes, at most records.MAX_AUDIO_BYTES; samples stay samples."""
    if isinstance(self.content, bytes | Pcm):
      return self.content
    place = self.content if isinstance(self.content, FileRange) else FileRange(str(self.content), 0, None)
    size = place.size if place.size is not None else storage.stat(place.path, name=self.name).size
    if size > MAX_AUDIO_BYTES:
      raise AudioError(f'{self.name}: {size} bytes; at most {MAX_AUDIO_BYTES}, so cut it up', 'too large')
    return place.read(name=self.name)

  def decode(self) -> tuple[np.ndarray, int]:
    """(float32 [N, channels], sample rate in Hz)."""
    return audio_io.read_audio(self.content, name=self.name)

  def load(self, sample_rate: int) -> np.ndarray:
    """Mono float32 [N] at `sample_rate`."""
    audio, rate = self.decode()
    return audio_io.to_mono_at(audio, rate, sample_rate)


@dataclass(frozen=True)
class ShardFault:
  """A file of a source that is missing or broken, so that an unknown number of utterances is not in its index."""

  shard: str
  reason: str  # of faults.REASONS
  message: str


class Source:
  """A sequence of utterances in the order of its index. Copies travel to worker processes: no open files in pickles.

  A subclass fills `uri`, `root` and `index`, and says how to fetch a row in `_read` and what to call it in `_name`.
  """

  uri: str
  root: str  # folder or URL that paths are relative to; licence files lie there
  index: Index
  shard_faults: tuple[ShardFault, ...] = ()

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, position: int) -> Utterance:
    """Raises AudioError if the utterance can't be fetched, IndexError past the end."""
    row = self._row(position)
    name = self._name(row)
    return Utterance(name=name, content=self._read(row, name), **self.index.labels(row))

  def name(self, position: int) -> str:
    """What errors and reports call this utterance, found without reading it."""
    return self._name(self._row(position))

  @property
  def short_uri(self) -> str:
    """KIND and the last part of where it is: what may be told of it elsewhere."""
    kind, _, where = self.uri.partition(':')
    return f'{kind}:{Path(where).name}'

  def relative(self, name: str) -> str:
    """What `name` calls an utterance, or a fault a file, without the folder that the source lies in."""
    return name.removeprefix(f'{self.root}/')

  def shard(self, position: int) -> str:
    """The file that holds this utterance."""
    return self.index.value(self._row(position), 'path')

  def select(self, rows: np.ndarray | pa.Array) -> Source:
    """The same source with these rows of its index only."""
    chosen = copy.copy(self)
    chosen.index = self.index.take(rows)
    return chosen

  def contents(self) -> list[Any]:
    """All that decides what these utterances are: their files, the files' versions, their rows; for a digest."""
    table = self.index.table
    paths = table.column('path').unique().to_pylist()
    found = storage.stats([path if storage.is_url(path) else storage.join(self.root, path) for path in paths])
    versions = [stat.reason if isinstance(stat, AudioError) else stat.version for stat in found]
    return [paths, versions, table.to_pylist()]

  def _row(self, position: int) -> int:
    if not 0 <= position < len(self.index):
      raise IndexError(f'utterance {position} of {len(self.index)}')
    return int(position)

  def _name(self, row: int) -> str:
    return f'{self.index.value(row, "path")}:{self.index.value(row, "id")}'

  def _read(self, row: int, name: str) -> bytes | Path | FileRange | Pcm:
    raise NotImplementedError
