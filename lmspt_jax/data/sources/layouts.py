"""Corpora as their publishers unpack them: librispeech:DIR (also LibriTTS), vctk:DIR and emilia:DIR, on a local disk.

  librispeech  [SUBSET/]SPEAKER/CHAPTER with CHAPTER.trans.txt, or with NAME.normalized.txt beside NAME.wav (LibriTTS);
               the subset's folder is the split, e.g. train-clean-100
  vctk         wav48_silence_trimmed/SPEAKER/NAME_mic1.flac, or the older wav48/SPEAKER/NAME.wav, and
               txt/SPEAKER/NAME.txt; the first microphone only; no splits
  emilia       NAME.mp3 and NAME.json side by side, or LANGUAGE/BATCH.jsonl with the path in `wav`; no splits

DIR may also be the folder that holds the corpus' own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import AUDIO_SUFFIXES
from lmspt_jax.data.index import assemble, table_from_rows
from lmspt_jax.data.metadata import row_from
from lmspt_jax.data.sources.base import Source
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import parse_json

_MAX_TEXT = 16 << 20  # characters of a text file or a line
_TRANSCRIPTS, _NORMALIZED, _MIC = '.trans.txt', '.normalized.txt', '_mic1'


class _LayoutSource(Source):
  """Audio files whose metadata is in the names and texts around them. A subclass lists (path, metadata, where)."""

  wanted: ClassVar[str]  # what was looked for, for errors
  known: ClassVar[dict[str, str]]  # metadata of every utterance, unless its own says otherwise

  def __init__(self, uri: str, path: str):
    if storage.is_url(path):
      raise LmsptError(f'data {uri!r}: is read from a local disk only; copy it, or run "lmspt prepare" where it is')
    folder = Path(path).expanduser()
    if not folder.is_dir():
      raise LmsptError(f'data {uri!r}: no folder {path!r}; check the path')
    self.uri, self.root = uri, str(folder)
    rows = []
    for name, values, where in self._list():
      row = row_from({**self.known, **values}, where)
      rows.append({**row, 'id': row['id'] or PurePosixPath(name).stem, 'path': name})
    if not rows:
      raise LmsptError(f'data {uri!r}: not the layout of that corpus; looked for {self.wanted}')
    self.index = assemble([table_from_rows(rows)], name=f'data {uri!r}')

  def _list(self) -> Iterator[tuple[str, dict[str, Any], str]]:
    raise NotImplementedError

  def _name(self, row: int) -> str:
    return self.index.value(row, 'path')

  def _read(self, row: int, name: str) -> Path:
    return Path(storage.join(self.root, self.index.value(row, 'path')))

  def _folders(self) -> Iterator[tuple[Path, list[str]]]:
    """(folder relative to the root, its files) in the order of names; hidden ones are left out."""
    for folder, subfolders, names in os.walk(self.root):
      subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
      yield Path(folder).relative_to(self.root), sorted(name for name in names if not name.startswith('.'))

  def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines of a text file under the root that are not blank."""
    try:
      with open(Path(self.root) / path, encoding='utf-8') as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_TEXT), ''), start=1):
          if line.strip():
            yield number, line
    except (OSError, UnicodeDecodeError) as error:
      raise LmsptError(f'{path}: can\'t be read ({error}); it must be UTF-8 text') from error

  def _text(self, path: Path) -> str:
    return ' '.join(' '.join(line for _, line in self._lines(path)).split())


class LibriSpeechSource(_LayoutSource):
  """LibriSpeech or LibriTTS, whole or some subsets."""

  wanted = f'SPEAKER/CHAPTER/*{_TRANSCRIPTS} or SPEAKER/CHAPTER/*{_NORMALIZED}'
  known: ClassVar = {'language': 'en', 'license': 'CC-BY-4.0'}

  def _list(self) -> Iterator[tuple[str, dict[str, Any], str]]:
    for folder, names in self._folders():
      parts = (Path(self.root).resolve() / folder).parts  # .../SUBSET/SPEAKER/CHAPTER
      audio = {Path(name).stem: name for name in names if name.lower().endswith(AUDIO_SUFFIXES)}
      if any(name.endswith(_NORMALIZED) for name in names):
        texts = {key: self._text(folder / f'{key}{_NORMALIZED}') if f'{key}{_NORMALIZED}' in names else ''
                 for key in audio}
      else:
        texts = {}
        for name in names:
          for _, line in self._lines(folder / name) if name.endswith(_TRANSCRIPTS) else ():
            key, _, text = line.strip().partition(' ')
            texts[key] = text.strip()
      for key, text in texts.items():
        path = (folder / audio.get(key, f'{key}.flac')).as_posix()
        yield path, {'id': key, 'text': text, 'speaker': parts[-2], 'split': parts[-3]}, path


class VctkSource(_LayoutSource):
  """VCTK 0.92, or an earlier version."""

  wanted = 'wav48_silence_trimmed/SPEAKER/*_mic1.flac or wav48/SPEAKER/*.wav'
  known: ClassVar = {'language': 'en', 'license': 'CC-BY-4.0'}

  def _list(self) -> Iterator[tuple[str, dict[str, Any], str]]:
    texts = {path.stem: path for path in self._find('txt', '.txt')}
    recordings = [path for path in self._find('wav48_silence_trimmed', '.flac') if path.stem.endswith(_MIC)]
    for path in recordings or self._find('wav48', '.wav'):
      key = path.stem.removesuffix(_MIC)
      text = self._text(texts[key]) if key in texts else ''  # one speaker has none
      yield path.as_posix(), {'id': key, 'text': text, 'speaker': path.parent.name}, path.as_posix()

  def _find(self, kind: str, suffix: str) -> list[Path]:
    """Files of KIND/SPEAKER, or of */KIND/SPEAKER, relative to the root."""
    root = Path(self.root)
    found = [*root.glob(f'{kind}/*/*{suffix}')] or root.glob(f'*/{kind}/*/*{suffix}')
    return sorted(path.relative_to(root) for path in found)


class EmiliaSource(_LayoutSource):
  """Emilia, unpacked. Its tars are `webdataset:`."""

  wanted = 'NAME.mp3 beside NAME.json, or *.jsonl with "wav"; its tars are webdataset:PATTERN'
  known: ClassVar = {'license': 'CC-BY-NC-4.0'}

  def _list(self) -> Iterator[tuple[str, dict[str, Any], str]]:
    for folder, names in self._folders():
      audio = {Path(name).stem: name for name in names if name.lower().endswith(AUDIO_SUFFIXES)}
      for name in names:
        path = folder / name
        if path.suffix == '.json' and path.stem in audio:
          values = _object(''.join(line for _, line in self._lines(path)), str(path))
          yield (folder / audio[path.stem]).as_posix(), values, str(path)
        elif path.suffix == '.jsonl':
          for number, line in self._lines(path):
            where = f'{path}:{number}'
            values = _object(line, where)
            yield (folder / _inside(values.get('wav'), where)).as_posix(), values, where


def _object(text: str, where: str) -> dict[str, Any]:
  values = parse_json(text, where)
  if not isinstance(values, dict):
    raise LmsptError(f'{where}: must be a JSON object; fetch it again')
  return values


def _inside(name: Any, where: str) -> PurePosixPath:
  path = PurePosixPath(name) if isinstance(name, str) and name else PurePosixPath('/')
  if path.is_absolute() or '..' in path.parts or '\\' in name or '\0' in name:
    raise LmsptError(f'{where}: wav = {shown(name)}: must be a path under the folder of the file')
  return path
