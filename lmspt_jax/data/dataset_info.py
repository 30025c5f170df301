"""`dataset.json`, the description beside prepared shards: written by `prepare`, read by `arrayrecord:` sources."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lmspt_jax.data import storage
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import read_json

FORMAT = 'lmspt-dataset'
VERSION = 2
FILE_NAME = 'dataset.json'
INDEX_NAME = 'index.parquet'  # a row per utterance: data/index.py's columns
_TOTALS = ('splits', 'languages', 'speakers', 'licenses')
_KINDS = {'str': str, 'int': int, 'float': (int, float), 'dict': dict, 'list': list}
_MAX_INFO = 64 << 20  # bytes of dataset.json: it names shards and speakers
SHARD_PATTERN = re.compile(r'([A-Za-z0-9_.+-]+)-(\d{5})-of-(\d{5})\.arrayrecord')


@dataclass(frozen=True)
class ShardInfo:
  """One shard file."""

  name: str  # SPLIT-00000-of-00004.arrayrecord
  split: str
  records: int
  bytes: int
  sha256: str


@dataclass(frozen=True)
class DatasetInfo:
  """The whole of dataset.json. Totals map a name to {'utterances': int, 'hours': float}."""

  source: str  # KIND:last part of the path
  utterances: int
  hours: float
  splits: dict[str, dict[str, Any]]
  languages: dict[str, dict[str, Any]]
  speakers: dict[str, dict[str, Any]]
  licenses: dict[str, dict[str, Any]]  # with 'attribution': a line that gives credit
  sample_rates: dict[str, int]  # Hz as text -> utterances
  durations: dict[str, Any]  # {'bin_seconds': float, 'utterances': [of the first bin, the second, ...]}
  faults: dict[str, dict[str, Any]]  # reason -> {'count': int, 'names': the first 1000}
  shards: list[ShardInfo] = field(default_factory=list)
  files: dict[str, str] = field(default_factory=dict)  # the other files, e.g. licences -> sha256

  @property
  def num_faults(self) -> int:
    return sum(entry['count'] for entry in self.faults.values())


def save_info(info: DatasetInfo, folder: Path) -> None:
  """Writes dataset.json by way of a temporary file; the same contents give the same bytes."""
  content = {'format': FORMAT, 'version': VERSION, **asdict(info)}
  write_atomic(folder / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + '\n')


def write_atomic(path: Path, text: str) -> None:
  """Raises OSError."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A temporary name beside `path`, which gets that file when the block ends well. Raises OSError.

  No two callers share a temporary, whatever process or host they are in.
  """
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def load_info(folder: str | os.PathLike) -> DatasetInfo:
  """Reads and checks dataset.json of a folder or URL. Raises LmsptError naming the file and what is wrong with it."""
  path = storage.join(str(folder), FILE_NAME)
  try:
    content = read_json(storage.local_copy(path, name=path), _MAX_INFO)
  except AudioError as error:
    if error.reason != 'missing':
      raise
    raise LmsptError(f'{path}: no such file; write the shards with "lmspt prepare --source=folder:DIR '
                     f'--out={folder}"') from error
  if not isinstance(content, dict) or content.pop('format', None) != FORMAT:
    raise LmsptError(f'{path}: not written by "lmspt prepare"; give the folder it wrote')
  if content.pop('version', None) != VERSION:
    raise LmsptError(f'{path}: another version of the format; prepare the data again with this version')
  info = _checked(DatasetInfo, content, path)
  info = replace(info, shards=[_checked(ShardInfo, shard, f'{path}: shard') for shard in info.shards])
  for name in _TOTALS:
    for entry in getattr(info, name).values():
      if not isinstance(entry, dict) or not _is_count(entry.get('utterances')) or not _is_hours(entry.get('hours')):
        raise LmsptError(f'{path}: {name} holds {shown(entry)}, not utterances and hours; prepare the data again')
  if not all(isinstance(entry, dict) and _is_count(entry.get('count')) for entry in info.faults.values()):
    raise LmsptError(f'{path}: faults = {shown(info.faults)}: not counts; prepare the data again')
  if not _is_count(info.utterances) or not _is_hours(info.hours):
    raise LmsptError(f'{path}: {shown(info.utterances)} utterances, {shown(info.hours)} hours; prepare the data again')
  for shard in info.shards:
    matched = SHARD_PATTERN.fullmatch(shard.name)
    if not matched or matched[1] != shard.split or not (_is_count(shard.records) and _is_count(shard.bytes)):
      raise LmsptError(f'{path}: shard {shown(shard.name)}: bad name or size; prepare the data again')
  if len({shard.name for shard in info.shards}) != len(info.shards):
    raise LmsptError(f'{path}: lists a shard twice; prepare the data again')
  return info


def _checked(cls: type, values: Any, where: str) -> Any:
  """A dataclass of values that have its fields' names and types, but for what is inside of them."""
  if not isinstance(values, dict):
    raise LmsptError(f'{where}: {shown(values)} in place of an object; prepare the data again')
  known = {f.name: f for f in fields(cls)}
  needed = {name for name, f in known.items() if f.default_factory is MISSING}
  wrong = (needed - values.keys()) | (values.keys() - known.keys())
  if wrong:
    raise LmsptError(f'{where}: fields are missing or unknown ({shown(sorted(wrong))}); prepare the data again')
  for name, value in values.items():
    kind = _KINDS[known[name].type.partition('[')[0]]
    if not isinstance(value, kind) or isinstance(value, bool):
      raise LmsptError(f'{where}: {name} = {shown(value)}: must be {known[name].type}; prepare the data again')
  return cls(**values)


def _is_count(value: Any) -> bool:
  return type(value) is int and 1 <= value < 1 << 62


def _is_hours(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
