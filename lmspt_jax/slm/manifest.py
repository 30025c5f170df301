"""`manifest.json`, the description beside token shards: what a language model's trainer has to know of them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lmspt_jax.data.dataset_info import write_atomic
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import read_json
from lmspt_jax.slm.vocabulary import Vocabulary

FORMAT = 'lmspt-tokens'
VERSION = 1
FILE_NAME = 'manifest.json'
SUFFIXES = ('.arrayrecord', '.parquet')  # every shard is there in both, with the same rows in the same order
_MAX_MANIFEST = 64 << 20  # bytes: 150,000 shards
_SHARD = re.compile(r'[A-Za-z0-9_.+-]+-\d{5}-of-\d{5}')
_WAY_OUT = 'get it again, or write the tokens again with lmspt tokenize'


@dataclass(frozen=True)
class ShardFiles:
  """One shard; `files` maps each suffix to {'bytes': int, 'sha256': hex}."""

  name: str
  split: str
  utterances: int
  frames: int
  files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
  """The whole of manifest.json.

  Attributes:
    model: {'hash', 'name', 'step', 'config' (of the model), 'license' (of its weights, in words)}.
    made_with: {'backend', 'jax', 'lmspt_jax'}: what else decides which of two nearly equal codes is taken.
    frame_rate, sample_rate, hop: frames a second, Hz, samples a frame.
    dtype: of stored ids.
    codebook_sizes: semantic first.
    vocabulary: of all codebooks together.
    data: {'source', 'split', 'utterances', 'fingerprint' (of ids and splits), 'licenses' {name: utterances}}.
    utterances, hours, frames, tokens: in the shards. `hours` is of the recordings.
    splits, languages: name -> {'utterances', 'hours'}.
    speakers: how many different ones.
    faults: reason -> {'count', 'names' (the first 1000)} of utterances left out, all of them in faults.jsonl.
    codebooks: what `quality.describe_use` says of each.
    warnings: lines on codebooks that are hardly used.
    degenerate: how many utterances are listed in degenerate.jsonl.
    files: the other files -> sha256.
    shards: in the order of their names.
  """

  model: dict[str, Any]
  made_with: dict[str, str]
  frame_rate: float
  sample_rate: int
  hop: int
  dtype: str
  codebook_sizes: tuple[int, ...]
  vocabulary: Vocabulary
  data: dict[str, Any]
  utterances: int
  hours: float
  frames: int
  tokens: int
  splits: dict[str, dict[str, Any]]
  languages: dict[str, dict[str, Any]]
  speakers: int
  faults: dict[str, dict[str, Any]]
  codebooks: list[dict[str, Any]]
  warnings: list[str]
  degenerate: int
  files: dict[str, str]
  shards: list[ShardFiles]

  def paths(self, folder: Path, suffix: str, split: str = '') -> list[Path]:
    """The shards' files with this suffix, of one split or of all."""
    return [folder / f'{shard.name}{suffix}' for shard in self.shards if split in ('', shard.split)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
  """Raises OSError. The same contents give the same bytes."""
  content = {'format': FORMAT, 'version': VERSION, **asdict(manifest), 'vocabulary': manifest.vocabulary.to_json()}
  write_atomic(folder / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + '\n')


def read_manifest(folder: str | Path) -> Manifest:
  """Reads and checks manifest.json of a folder. Raises LmsptError naming the file and what is wrong with it."""
  path = Path(folder) / FILE_NAME
  content = read_json(path, _MAX_MANIFEST)
  if not isinstance(content, dict) or content.pop('format', None) != FORMAT:
    raise LmsptError(f'{path}: not written by lmspt tokenize; give the folder it wrote')
  if content.pop('version', None) != VERSION:
    raise LmsptError(f'{path}: another version of the format; write the tokens again with this version')
  names = {field.name for field in fields(Manifest)}
  if content.keys() != names:
    raise LmsptError(f'{path}: fields are missing or unknown ({shown(sorted(content.keys() ^ names))}); {_WAY_OUT}')
  content['vocabulary'] = Vocabulary.from_json(content['vocabulary'], str(path))
  content['shards'] = [_shard(value, path) for value in _list(content['shards'], path)]
  content['codebook_sizes'] = tuple(_list(content['codebook_sizes'], path))
  if content['codebook_sizes'] != content['vocabulary'].codebook_sizes:
    raise LmsptError(f'{path}: codebook_sizes and vocabulary differ; {_WAY_OUT}')
  for name in ('model', 'made_with', 'data', 'splits', 'languages', 'faults', 'files'):
    if not isinstance(content[name], dict):
      raise LmsptError(f'{path}: {name} = {shown(content[name])}: must be an object; {_WAY_OUT}')
  for name in ('sample_rate', 'hop', 'utterances', 'frames', 'tokens'):
    if type(content[name]) is not int:
      raise LmsptError(f'{path}: {name} = {shown(content[name])}: must be a whole number; {_WAY_OUT}')
  if not isinstance(content['model'].get('hash'), str) or not isinstance(content['data'].get('fingerprint'), str):
    raise LmsptError(f'{path}: has no hash of the model or no fingerprint of the data; {_WAY_OUT}')
  return Manifest(**content)


def _list(value: Any, path: Path) -> list[Any]:
  if not isinstance(value, list):
    raise LmsptError(f'{path}: {shown(value)} where a list must be; {_WAY_OUT}')
  return value


def _shard(value: Any, path: Path) -> ShardFiles:
  if (not isinstance(value, dict) or value.keys() != {field.name for field in fields(ShardFiles)}
      or not isinstance(value['name'], str) or not _SHARD.fullmatch(value['name'])
      or any(type(value[name]) is not int for name in ('utterances', 'frames'))
      or not isinstance(value['files'], dict) or value['files'].keys() != set(SUFFIXES)
      or not all(isinstance(file, dict) and type(file.get('bytes')) is int and isinstance(file.get('sha256'), str)
                 for file in value['files'].values())):
    raise LmsptError(f'{path}: shards holds {shown(value)}, which is no shard; {_WAY_OUT}')
  return ShardFiles(**value)
