"""folder:DIR, audio files in a folder or a store with an optional manifest.jsonl; package:NAME, one in the package.

A manifest row holds id, path (relative to DIR), text, language, speaker, split, license, seconds and any scores; only
path is required.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import AUDIO_SUFFIXES
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import assemble, table_from_rows
from lmspt_jax.data.metadata import row_from
from lmspt_jax.data.sources.base import Source
from lmspt_jax.data.storage import FileRange
from lmspt_jax.errors import LmsptError, nearest, shown
from lmspt_jax.files import parse_json

MANIFEST = 'manifest.jsonl'
ASSETS = Path(__file__).resolve().parent.parent.parent / 'assets'
_MAX_LINE = 1 << 20


class FolderSource(Source):
  """Audio files under a folder, listed by its manifest if there is one, else by their suffixes."""

  def __init__(self, uri: str, path: str):
    self.uri = uri
    self.root = path.rstrip('/') if storage.is_url(path) else str(Path(path).expanduser())
    if not storage.is_url(path) and not os.path.isdir(self.root):
      raise LmsptError(f'data {uri!r}: no folder {path!r}; check the path')
    name = storage.join(self.root, MANIFEST)
    try:
      manifest = storage.local_copy(name, name=name)
    except AudioError as error:
      if error.reason != 'missing':
        raise
      if storage.is_http(path):
        raise LmsptError(f'{name}: no such file, and http has no listings; write one with a path a line') from error
      rows, name = self._list_files(), f'data {uri!r}'
    else:
      rows = self._read_manifest(manifest, name)
    self.index = assemble([table_from_rows(rows)], name=name)

  def _name(self, row: int) -> str:
    return self.index.value(row, 'path')

  def _read(self, row: int, name: str) -> Path | FileRange:
    path = self.index.value(row, 'path')
    if storage.is_url(self.root):
      return FileRange(storage.join(self.root, quote(path) if storage.is_http(self.root) else path), 0, None)
    return Path(storage.join(self.root, path))

  def _list_files(self) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name in storage.find(self.root) if storage.is_url(self.root) else _walk(self.root):
      if not name.lower().endswith(AUDIO_SUFFIXES) or any(part.startswith('.') for part in name.split('/')):
        continue
      row = {'id': PurePosixPath(name).with_suffix('').as_posix(), 'path': name}
      if row['id'] in rows:
        raise LmsptError(f'data {self.uri!r}: {row["path"]!r} and {rows[row["id"]]["path"]!r} have the same id; '
                         f'rename one or list the files in {MANIFEST}')
      rows[row['id']] = row
    return list(rows.values())

  def _read_manifest(self, manifest: Path, shown: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    try:
      with open(manifest, encoding='utf-8') as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE + 2), ''), start=1):
          if line.strip():
            row = _parse(line, f'{shown}:{number}')
            if row['id'] in seen:
              raise LmsptError(f'{shown}:{number}: id {row["id"]!r} was used before; ids must differ')
            seen.add(row['id'])
            rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
      raise LmsptError(f'{shown}: can\'t be read ({error}); it must be UTF-8 text') from error
    return rows


def _walk(root: str) -> Iterator[str]:
  """Files under a folder, relative to it; hidden folders are not entered."""
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [name for name in subfolders if not name.startswith('.')]
    yield from (Path(folder, name).relative_to(root).as_posix() for name in names)


def _parse(line: str, where: str) -> dict[str, Any]:
  values = parse_json(line, where) if len(line) <= _MAX_LINE + 1 else None
  if not isinstance(values, dict):
    raise LmsptError(f'{where}: must be one JSON object of at most {_MAX_LINE} characters')
  name = values.get('path') or ''
  path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath('/')
  if not name or path.is_absolute() or '..' in path.parts or '\\' in name or '\0' in name:
    raise LmsptError(f'{where}: path = {shown(name)}: must be relative to the manifest and stay in its folder')
  row = row_from(values, where)
  return {**row, 'id': row['id'] or path.with_suffix('').as_posix(), 'path': name}


def package_source(uri: str, name: str) -> Source:
  """A folder of the package's own assets, by name."""
  known = sorted(path.parent.name for path in ASSETS.glob(f'*/{MANIFEST}'))
  if name not in known:
    raise LmsptError(f'data {uri!r}: no such data in the package, {nearest(name, known)}')
  return FolderSource(uri, str(ASSETS / name))
