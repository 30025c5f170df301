"""Whether token shards are still what the model makes of the data."""

from __future__ import annotations

import bisect
import itertools
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmspt_jax.data.audio_io import MAX_FRAMES, read_blocks
from lmspt_jax.data.kept import is_whole
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError
from lmspt_jax.inference.tokenizer import Tokenizer
from lmspt_jax.slm.manifest import FILE_NAME, Manifest, read_manifest
from lmspt_jax.slm.token_rows import TokenRow, from_table


@dataclass(frozen=True)
class Verification:
  """What was compared. `differing` maps an utterance's id to how many of its tokens differ (all, if the shape does)."""

  utterances: int
  tokens: int
  seed: int
  differing: dict[str, int]


def verify(tokenizer: Tokenizer, data: str, out: str | Path, count: int, seed: int | None = None) -> Verification:
  """Checks all checksums; encodes a random sample of `count` utterances once more, each by itself, and compares.

  Args:
    seed: of the sample; None draws one.

  Raises:
    LmsptError: no finished shards, shards of another model or other data, a damaged file.
  """
  out, manifest = Path(out), read_manifest(out)
  if manifest.model['hash'] != tokenizer.model_hash:
    raise LmsptError(f'{out / FILE_NAME}: tokens of model {manifest.model["hash"]}, not of this one '
                     f'({tokenizer.model_hash}); give the model that made them')
  source = open_source(data, str(manifest.data['split']))
  if source.index.fingerprint() != manifest.data['fingerprint']:
    raise LmsptError(f'data {data!r}: {len(source)} utterances that are not those of {out / FILE_NAME} '
                     f'({manifest.data["utterances"]}); give the data that the tokens were made of')
  for shard in manifest.shards:
    for suffix, file in shard.files.items():
      path = out / f'{shard.name}{suffix}'
      if not is_whole(path, file['bytes'], file['sha256']):
        raise LmsptError(f'{path}: not as {FILE_NAME} says (missing or damaged); run lmspt tokenize without --verify, '
                         'which writes it again')
  seed = secrets.randbits(32) if seed is None else seed
  differing, tokens, rows = {}, 0, _sample(out, manifest, count, seed)
  for row in rows:
    wrong = _differing(row, tokenizer, source)
    tokens += row.ids.size
    if wrong:
      differing[row.id] = wrong
  return Verification(len(rows), tokens, seed, differing)


def _sample(out: Path, manifest: Manifest, count: int, seed: int) -> list[TokenRow]:
  """Rows drawn from all, in their order."""
  ends = list(itertools.accumulate(shard.utterances for shard in manifest.shards))
  chosen = np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False)
  by_shard: dict[int, list[int]] = {}
  for number in sorted(chosen.tolist()):
    shard = bisect.bisect_right(ends, number)
    by_shard.setdefault(shard, []).append(number - ends[shard] + manifest.shards[shard].utterances)
  found = []
  for shard, rows in by_shard.items():
    table = pq.read_table(out / f'{manifest.shards[shard].name}.parquet')
    found += from_table(table.take(rows))
  return found


def _differing(row: TokenRow, tokenizer: Tokenizer, source: Source) -> int:
  position = pc.index(source.index.table.column('id'), row.id).as_py()
  if position < 0:
    raise LmsptError(f'data {source.uri!r}: has no utterance {row.id!r}; give the data that the tokens were made of')
  utterance = source[position]
  with utterance.open() as file:
    blocks = (block_NC.T for block_NC in read_blocks(file, 0, MAX_FRAMES, name=utterance.name))
    codes = tokenizer.encode_blocks(blocks, sample_rate=file.samplerate)
  if codes.ids.shape != row.ids.shape or codes.num_samples != row.num_samples:
    return row.ids.size
  return int(np.count_nonzero(codes.ids != row.ids))
