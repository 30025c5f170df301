"""Which rows of a source become which shard, and which shard is whose."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from lmspt_jax.data.sources import Source

SHARD_UTTERANCES = 8192
_SHARD_SECONDS = 100 * 3600.0  # where the source knows durations; 72 MB of eight codebooks at 12.5 Hz
_PART_UTTERANCES, _PART_SECONDS = 256, 1800.0  # what a kill costs at most, several of them on accelerators


@dataclass(frozen=True)
class Shard:
  """A shard: its name without a suffix, SPLIT-00000-of-00004, and where its parts begin in the source, with its end."""

  name: str
  split: str
  bounds: tuple[int, ...]

  @property
  def parts(self) -> list[range]:
    """The rows of each part."""
    return [range(start, stop) for start, stop in itertools.pairwise(self.bounds)]


def plan_shards(source: Source, utterances: int = SHARD_UTTERANCES) -> list[Shard]:
  """Shards of at most so many utterances, each of one split, in the source's order. The source alone decides."""
  names = source.index.table.column('split').combine_chunks().dictionary_encode()
  splits, known = names.indices.to_numpy(), names.dictionary.to_pylist()
  seconds = np.nan_to_num(source.index.numbers('seconds'), nan=0.0)
  by_split: dict[int, list[list[int]]] = {}
  shard_start = part_start = 0  # rows
  shard_seconds = part_seconds = 0.0
  for row, (split, length) in enumerate(zip(splits, seconds, strict=True)):
    shards = by_split.setdefault(split, [])
    if not shards or row - shard_start == utterances or (row > shard_start and shard_seconds + length > _SHARD_SECONDS):
      shards.append([row])
      shard_start, part_start, shard_seconds, part_seconds = row, row, 0.0, 0.0
    elif row - part_start == _PART_UTTERANCES or part_seconds + length > _PART_SECONDS:
      shards[-1].append(row)
      part_start, part_seconds = row, 0.0
    shard_seconds, part_seconds = shard_seconds + length, part_seconds + length
  starts = sorted(shard[0] for shards in by_split.values() for shard in shards)
  ends = dict(zip(starts, [*starts[1:], len(splits)], strict=True))
  return [Shard(f'{known[split]}-{number:05d}-of-{len(shards):05d}', known[split], (*shard, ends[shard[0]]))
          for split, shards in by_split.items() for number, shard in enumerate(shards)]
