"""Totals of a corpus of tokens: of a shard while it is written, of all shards for the manifest."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.config import to_dict
from lmspt_jax.data.dataset_info import write_atomic
from lmspt_jax.data.kept import read_batch
from lmspt_jax.data.sources import Source
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import sha256
from lmspt_jax.inference.codes import ids_dtype
from lmspt_jax.inference.tokenizer import Tokenizer
from lmspt_jax.slm import quality
from lmspt_jax.slm.manifest import Manifest, ShardFiles
from lmspt_jax.slm.plan import Shard
from lmspt_jax.slm.token_rows import TokenRow
from lmspt_jax.slm.vocabulary import Vocabulary

MAX_NAMES = 1000  # of each kind of fault in the manifest
FAULTS, DEGENERATE = 'faults.jsonl', 'degenerate.jsonl'


@dataclass
class Totals:
  """Of a shard's rows. `languages` maps a name to [utterances, samples]."""

  utterances: int = 0
  frames: int = 0
  samples: int = 0
  languages: dict[str, list[int]] = field(default_factory=dict)
  speakers: set[str] = field(default_factory=set)
  degenerate: list[dict[str, Any]] = field(default_factory=list)

  def add(self, row: TokenRow, degenerate: dict[str, Any] | None) -> None:
    self.utterances += 1
    self.frames += row.ids.shape[1]
    self.samples += row.num_samples
    language = self.languages.setdefault(row.language, [0, 0])
    language[0] += 1
    language[1] += row.num_samples
    self.speakers.add(row.speaker)
    if degenerate:
      self.degenerate.append(degenerate)

  def to_json(self) -> dict[str, Any]:
    return {'utterances': self.utterances, 'frames': self.frames, 'samples': self.samples, 'languages': self.languages,
            'speakers': sorted(self.speakers), 'degenerate': self.degenerate}


def summarize(source: Source, state: Path, out: Path, shards: Sequence[tuple[Shard, Path]], tokenizer: Tokenizer,
              made_with: dict[str, str], split: str) -> Manifest:
  """The manifest of finished shards, each given with its note. Writes faults.jsonl and degenerate.jsonl.

  Raises LmsptError: rows are missing or there twice, which no run should leave behind.
  """
  rate, model = tokenizer.sample_rate, tokenizer.model
  counts = [np.zeros(size, np.int64) for size in tokenizer.codebook_sizes]
  splits, languages = collections.defaultdict(lambda: [0, 0]), collections.defaultdict(lambda: [0, 0])
  speakers: set[str] = set()
  found: list[ShardFiles] = []
  faults = [{'id': '', 'name': source.relative(fault.shard), 'reason': fault.reason} for fault in source.shard_faults]
  degenerate: list[dict[str, Any]] = []
  rows = 0
  for shard, path in shards:
    table, note = read_batch(path)
    for total, column in zip(counts, table.column('counts'), strict=True):
      total += column.values.to_numpy()
    rows += note['utterances'] + len(note['faults'])
    _add(splits[shard.split], note['utterances'], note['samples'])
    for name, (utterances, samples) in note['languages'].items():
      _add(languages[name], utterances, samples)
    speakers.update(note['speakers'])
    faults += note['faults']
    degenerate += note['degenerate']
    found.append(ShardFiles(shard.name, shard.split, note['utterances'], note['frames'], note['files']))
  if rows != len(source):
    raise LmsptError(f'{state}: accounts for {rows} of {len(source)} utterances; remove it and run again')
  for name, listed in ((FAULTS, faults), (DEGENERATE, degenerate)):
    write_atomic(out / name, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in listed))
  frames, utterances = sum(shard.frames for shard in found), sum(shard.utterances for shard in found)
  return Manifest(
      model={'hash': tokenizer.model_hash, 'name': model.config.name, 'step': model.step,
             'config': to_dict(model.config.model), 'license': tokenizer.license},
      made_with=made_with, frame_rate=tokenizer.frame_rate, sample_rate=rate, hop=tokenizer.hop,
      dtype=ids_dtype(max(tokenizer.codebook_sizes)).name, codebook_sizes=tokenizer.codebook_sizes,
      vocabulary=Vocabulary(tokenizer.codebook_sizes),
      data={'source': source.short_uri, 'split': split, 'utterances': len(source),
            'fingerprint': source.index.fingerprint(), 'licenses': source.index.counts('license')},
      utterances=utterances, hours=_hours(sum(samples for _, samples in splits.values()), rate), frames=frames,
      tokens=frames * len(counts), splits=_named(splits, rate), languages=_named(languages, rate),
      speakers=len(speakers - {''}), faults=_by_reason(faults), codebooks=quality.describe_use(counts),
      warnings=quality.warnings(counts), degenerate=len(degenerate),
      files={name: sha256(out / name) for name in (FAULTS, DEGENERATE)}, shards=found)


def _add(total: list[int], utterances: int, samples: int) -> None:
  total[0] += utterances
  total[1] += samples


def _named(totals: dict[str, list[int]], rate: int) -> dict[str, dict[str, Any]]:
  return {name: {'utterances': utterances, 'hours': _hours(samples, rate)}
          for name, (utterances, samples) in sorted(totals.items())}


def _hours(samples: int, rate: int) -> float:
  return round(samples / rate / 3600, 6)


def _by_reason(faults: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  found: dict[str, dict[str, Any]] = {}
  for fault in faults:
    entry = found.setdefault(fault['reason'], {'count': 0, 'names': []})
    entry['count'] += 1
    if len(entry['names']) < MAX_NAMES:
      entry['names'].append(fault['name'])
  return dict(sorted(found.items()))
