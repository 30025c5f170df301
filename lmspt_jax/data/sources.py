"""Random-access sources of utterances, opened from a KIND:PATH URI.

  folder:DIR         audio files, with an optional DIR/manifest.jsonl
  arrayrecord:DIR    shards and dataset.json as written by `lmspt prepare`
  package:NAME       a folder that comes with the package (speech_sample)

Every kind orders its utterances by (split, id), so a folder and the shards prepared from it give the same training
batches. A manifest row holds id, path (relative to DIR), text, language, speaker, split and license; only path is
required. Where there is no split, one utterance in eight (`auto_split`) is 'valid' and the rest 'train'.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile

from lmspt_jax.data import audio_io, records
from lmspt_jax.data.audio_io import AUDIO_SUFFIXES, AudioError
from lmspt_jax.data.dataset_info import SPLIT_PATTERN, load_info
from lmspt_jax.errors import LmsptError, nearest

MANIFEST = 'manifest.jsonl'
ASSETS = Path(__file__).resolve().parent.parent / 'assets'
_MAX_LINE = 1 << 20
_REMEDY = 'copy it again or rerun "lmspt prepare" with the same --out'
_FIELDS = ('id', 'path', 'text', 'language', 'speaker', 'split', 'license')


@dataclass(frozen=True)
class Utterance:
  """One recording. Nothing is decoded until a method asks for it; the methods raise AudioError naming `name`."""

  id: str
  name: str  # for errors: the file, or "shard:record"
  content: bytes | Path  # encoded audio
  text: str = ''
  language: str = ''
  speaker: str = ''
  split: str = ''
  license: str = ''

  def open(self) -> soundfile.SoundFile:
    """Header only: samplerate, frames, channels. Close it (it is a context manager)."""
    return audio_io.open_audio(self.content, name=self.name)

  def encoded(self) -> bytes:
    """The file's bytes, at most records.MAX_AUDIO_BYTES."""
    if isinstance(self.content, bytes):
      return self.content
    try:
      if (size := self.content.stat().st_size) > records.MAX_AUDIO_BYTES:
        raise AudioError(f'{self.name}: {size} bytes; at most {records.MAX_AUDIO_BYTES}, so cut it up', 'too large')
      return self.content.read_bytes()
    except OSError as error:
      reason = 'missing' if isinstance(error, FileNotFoundError) else 'undecodable'
      raise AudioError(f'{self.name}: can\'t be read ({error.strerror}); check the path', reason) from error

  def decode(self) -> tuple[np.ndarray, int]:
    """(float32 [N, channels], sample rate in Hz)."""
    return audio_io.read_audio(self.content, name=self.name)

  def load(self, sample_rate: int) -> np.ndarray:
    """Mono float32 [N] at `sample_rate`."""
    audio, rate = self.decode()
    return audio_io.to_mono_at(audio, rate, sample_rate)


class Source:
  """A sequence of utterances. Copies travel to worker processes, so open files stay behind."""

  uri: str
  root: Path  # the folder

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> Utterance:
    raise NotImplementedError

  def name(self, index: int) -> str:
    """What errors and reports call this utterance, found without reading it."""
    raise NotImplementedError


def auto_split(key: str) -> str:
  """'valid' for one key in eight, else 'train'. `key` is the transcript, or the id where there is none.

  The md5 of the lower-cased letters and digits decides, so utterances that say the same are never on both sides.
  """
  plain = ''.join(c for c in key.lower() if c.isalnum())
  return 'valid' if int(hashlib.md5(plain.encode(), usedforsecurity=False).hexdigest(), 16) % 8 == 0 else 'train'


def open_source(uri: str, split: str = '') -> Source:
  """Opens KIND:PATH. `split` '' takes every utterance.

  Raises LmsptError: unknown KIND, no such folder, a bad manifest or shard (named), no such split, nothing in it.
  """
  kind, colon, path = uri.partition(':')
  if not colon or not path:
    raise LmsptError(f'data {uri!r}: write KIND:PATH, e.g. folder:DIR or arrayrecord:DIR')
  if kind not in _KINDS:
    raise LmsptError(f'data {uri!r}: unknown kind {kind!r}, {nearest(kind, _KINDS)}')
  return _KINDS[kind](uri, path, split)


def _check_split(uri: str, split: str, counts: Counter) -> None:
  if split and not counts[split]:
    have = ', '.join(f'{name} ({count})' for name, count in sorted(counts.items())) or 'none'
    raise LmsptError(f'data {uri!r}: no utterances in split {split!r}; it has {have}')
  if not sum(counts.values()):
    raise LmsptError(f'data {uri!r}: no utterances; it needs wav, flac, ogg or mp3 files')


# ---------------------------------------------------------------- folders


class FolderSource(Source):
  """Audio files under a folder, listed by its manifest if there is one, else by their suffixes."""

  def __init__(self, uri: str, path: str, split: str = ''):
    self.uri, self.root = uri, Path(path).expanduser()
    if not self.root.is_dir():
      raise LmsptError(f'data {uri!r}: no folder {str(self.root)!r}; check the path')
    rows = self._read_manifest() if (self.root / MANIFEST).is_file() else self._list_files()
    counts = Counter(row['split'] for row in rows)
    _check_split(uri, split, counts)
    rows = [row for row in rows if not split or row['split'] == split]
    self._rows = sorted(rows, key=lambda row: (row['split'], row['id']))

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Utterance:
    row = dict(self._rows[index])
    path = row.pop('path')
    return Utterance(name=path, content=self.root / path, **row)

  def name(self, index: int) -> str:
    return self._rows[index]['path']

  def _list_files(self) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for folder, subfolders, names in os.walk(self.root):
      subfolders[:] = [name for name in subfolders if not name.startswith('.')]
      for name in names:
        if name.startswith('.') or not name.lower().endswith(AUDIO_SUFFIXES):
          continue
        path = (Path(folder) / name).relative_to(self.root)
        row = dict.fromkeys(_FIELDS, '')
        row.update(id=path.with_suffix('').as_posix(), path=path.as_posix())
        row['split'] = auto_split(row['id'])
        if row['id'] in rows:
          raise LmsptError(f'data {self.uri!r}: {row["path"]!r} and {rows[row["id"]]["path"]!r} have the same id; '
                           f'rename one or list the files in {MANIFEST}')
        rows[row['id']] = row
    return list(rows.values())

  def _read_manifest(self) -> list[dict[str, str]]:
    manifest = self.root / MANIFEST
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    unsplit = ''  # the first line without a split
    try:
      with open(manifest, encoding='utf-8') as lines:
        for number, line in enumerate(lines, start=1):
          if line.strip():
            row = self._parse(line, f'{manifest}:{number}')
            if row['id'] in seen:
              raise LmsptError(f'{manifest}:{number}: id {row["id"]!r} was used before; ids must differ')
            seen.add(row['id'])
            unsplit = unsplit or ('' if row['split'] else f'{manifest}:{number}')
            rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
      raise LmsptError(f'{manifest}: can\'t be read ({error}); it must be UTF-8 text') from error
    if unsplit and any(row['split'] for row in rows):
      raise LmsptError(f'{unsplit}: no split, where other lines have one; give every line a split or none')
    for row in rows if unsplit else ():
      row['split'] = auto_split(row['text'] or row['id'])
    return rows

  def _parse(self, line: str, where: str) -> dict[str, str]:
    try:
      values = json.loads(line) if len(line) <= _MAX_LINE else None
    except (ValueError, RecursionError) as error:
      raise LmsptError(f'{where}: not JSON ({error}); write one object a line') from error
    if not isinstance(values, dict):
      raise LmsptError(f'{where}: must be one JSON object of at most {_MAX_LINE} characters')
    row = {key: values.get(key) or '' for key in _FIELDS}
    for key, value in row.items():
      if not isinstance(value, str):
        raise LmsptError(f'{where}: {key} = {value!r}: must be text')
    path = PurePosixPath(row['path'])
    if not row['path'] or path.is_absolute() or '..' in path.parts or '\\' in row['path'] or '\0' in row['path']:
      raise LmsptError(f'{where}: path = {row["path"]!r}: must be relative to the manifest and stay in its folder')
    row['id'] = row['id'] or path.with_suffix('').as_posix()
    if row['split'] and not SPLIT_PATTERN.fullmatch(row['split']):
      raise LmsptError(f'{where}: split = {row["split"]!r}: use up to 64 letters, digits and . _ + -')
    return row


def _package_source(uri: str, name: str, split: str = '') -> Source:
  known = sorted(path.parent.name for path in ASSETS.glob(f'*/{MANIFEST}'))
  if name not in known:
    raise LmsptError(f'data {uri!r}: no such data in the package, {nearest(name, known)}')
  return FolderSource(uri, str(ASSETS / name), split)


# ---------------------------------------------------------------- shards


class ArrayRecordSource(Source):
  """Shards as dataset.json lists them; each must be there with the size it says."""

  def __init__(self, uri: str, path: str, split: str = ''):
    self.uri, self.root = uri, Path(path).expanduser()
    if not self.root.is_dir():
      raise LmsptError(f'data {uri!r}: no folder {str(self.root)!r}; check the path')
    info = load_info(self.root)
    counts = Counter()
    for shard in info.shards:
      counts[shard.split] += shard.records
    _check_split(uri, split, counts)
    self._shards = sorted((shard for shard in info.shards if not split or shard.split == split),
                          key=lambda shard: (shard.split, shard.name))
    self._starts, self._length = [], 0
    for shard in self._shards:
      try:
        size = (self.root / shard.name).stat().st_size
      except OSError as error:
        raise LmsptError(f'{self.root / shard.name}: {error.strerror}; {_REMEDY}') from error
      if size != shard.bytes:
        raise LmsptError(f'{self.root / shard.name}: {size} bytes where dataset.json says {shard.bytes}; {_REMEDY}')
      self._starts.append(self._length)
      self._length += shard.records
    self._readers = {}

  def __len__(self) -> int:
    return self._length

  def __getstate__(self) -> dict:
    return {**self.__dict__, '_readers': {}}

  def _locate(self, index: int) -> tuple[int, int]:
    if not 0 <= index < self._length:
      raise IndexError(f'utterance {index} of {self._length}')
    shard = bisect.bisect_right(self._starts, index) - 1
    return shard, index - self._starts[shard]

  def name(self, index: int) -> str:
    shard, record = self._locate(index)
    return f'{self._shards[shard].name}:{record}'

  def __getitem__(self, index: int) -> Utterance:
    shard, position = self._locate(index)
    name = self.name(index)
    try:
      data = self._reader(shard).read([position])[0]
    except (RuntimeError, ValueError, IndexError) as error:  # what array_record raises for damage
      cause = ' '.join(str(error).split())[:120]
      raise records.RecordError(f'{name}: damaged shard ({cause}); prepare it again') from error
    record = records.unpack(data, name=name)
    return Utterance(id=record.id, name=name, content=record.audio, text=record.text, language=record.language,
                     speaker=record.speaker, split=self._shards[shard].split, license=record.license)

  def _reader(self, shard: int):
    if shard not in self._readers:
      from array_record.python.array_record_module import ArrayRecordReader  # starts its thread pool on import
      path = self.root / self._shards[shard].name
      reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0,max_parallelism:0', file_reader_buffer_size=32768)
      if not reader.ok() or reader.num_records() != self._shards[shard].records:
        raise LmsptError(f'{path}: damaged, {reader.num_records()} records where dataset.json says '
                         f'{self._shards[shard].records}; {_REMEDY}')
      self._readers[shard] = reader
    return self._readers[shard]


_KINDS = {'folder': FolderSource, 'arrayrecord': ArrayRecordSource, 'package': _package_source}
