"""`dataset.json`, the description beside prepared shards: written by `prepare`, read by `arrayrecord:` sources."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmspt_jax.data import storage
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError

FORMAT = 'lmspt-dataset'
VERSION = 2
FILE_NAME = 'dataset.json'
INDEX_NAME = 'index.parquet'  # a row per utterance: data/index.py's columns
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
    content = json.loads(storage.local_copy(path, name=path).read_text(encoding='utf-8'))
  except AudioError as error:
    if error.reason != 'missing':
      raise
    raise LmsptError(f'{path}: no such file; write the shards with "lmspt prepare --source=folder:DIR '
                     f'--out={folder}"') from error
  except (OSError, ValueError) as error:
    raise LmsptError(f'{path}: can\'t be read as JSON ({error}); prepare the data again') from error
  if not isinstance(content, dict) or content.pop('format', None) != FORMAT:
    raise LmsptError(f'{path}: not written by "lmspt prepare"; give the folder it wrote')
  if content.pop('version', None) != VERSION:
    raise LmsptError(f'{path}: another version of the format; prepare the data again with this version')
  try:
    info = DatasetInfo(**{**content, 'shards': [ShardInfo(**shard) for shard in content['shards']]})
    for shard in info.shards:
      matched = SHARD_PATTERN.fullmatch(shard.name)
      if not matched or matched[1] != shard.split or shard.records < 1 or shard.bytes < 1:
        raise LmsptError(f'{path}: shard {shard.name!r}: bad name or size; prepare the data again')
  except (TypeError, KeyError) as error:
    raise LmsptError(f'{path}: fields are missing or unknown ({error}); prepare the data again') from error
  return info
