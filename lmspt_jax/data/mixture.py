"""Corpora to one numbered list of records, and the shares in which training draws from them.

A record's number is its place in the corpora one after the other, each filtered, limited and in the order of its index.
Examples are drawn from groups: a corpus, or with `language_temperature` a language of a corpus.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.draws import draw
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import Index
from lmspt_jax.data.metadata import LABELS
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError, nearest

_log = logging.getLogger(__name__)
_CONDITION = re.compile(r'\s*(\w+)\s*(>=|<=|!=|=|<|>|\bnot in\b|\bin\b)\s*(\S.*?)\s*')
_COMPARE: dict[str, Callable] = {'>=': operator.ge, '<=': operator.le, '>': operator.gt, '<': operator.lt,
                                 '=': operator.eq, '!=': operator.ne}


@dataclass(frozen=True)
class Group:
  """Records that are drawn from in one shuffled order. `weight` is its share of the examples; they sum to 1."""

  corpus: int
  language: str  # '' for all of the corpus
  weight: float
  first: int  # number of the corpus' first record
  rows: np.ndarray | int  # rows of the corpus, or how many where it is all of them

  def __len__(self) -> int:
    return self.rows if isinstance(self.rows, int) else len(self.rows)

  def record(self, position: int) -> int:
    return self.first + int(position if isinstance(self.rows, int) else self.rows[position])


class Mixture:
  """The corpora of `DataConfig.train`, opened, filtered and weighted. Travels to worker processes."""

  def __init__(self, config: DataConfig):
    """Raises LmsptError: no corpus, one that can't be opened, a bad filter, too many broken shards, nothing left."""
    if not config.train:
      raise LmsptError("config field data.train = '': give KIND:URI, e.g. folder:recordings")
    self.sources: list[Source] = []
    self._starts: list[int] = []
    self._total = 0
    for number, corpus in enumerate(config.train):
      source = _chosen(open_source(corpus.uri, corpus.split), corpus, f'config field data.train.{number}')
      check_shards(source, config.max_fault_rate, 'data.max_fault_rate')
      self._starts.append(self._total)
      self._total += len(source)
      self.sources.append(source)
    self.groups = self._groups(config)
    self._fingerprint = self._digest(config)

  def __len__(self) -> int:
    return self._total

  def __getitem__(self, record: int):
    """The utterance. Raises AudioError if it can't be fetched."""
    source, row = self.locate(record)
    return source[row]

  def locate(self, record: int) -> tuple[Source, int]:
    """The corpus of a record and the row in it."""
    corpus = bisect.bisect_right(self._starts, record) - 1
    return self.sources[corpus], record - self._starts[corpus]

  @property
  def fingerprint(self) -> str:
    """Hex digest of which utterances are drawn, in which order and shares: not of where or how they are stored."""
    return self._fingerprint

  def share(self) -> None:
    """Makes copies for worker processes small: large indexes are mapped from the cache folder."""
    for source in self.sources:
      source.index = source.index.shared()

  def _groups(self, config: DataConfig) -> list[Group]:
    total = sum(corpus.weight for corpus in config.train)
    groups = []
    for number, (corpus, source) in enumerate(zip(config.train, self.sources, strict=True)):
      share = corpus.weight / total
      first = self._starts[number]
      if config.language_temperature == 1:
        groups.append(Group(number, '', share, first, len(source)))
        continue
      column = source.index.table.column('language')
      for language, count in source.index.counts('language').items():
        rows = np.flatnonzero(pc.equal(column, language).to_numpy())
        groups.append(Group(number, language, share * count / len(source), first, rows))
    if config.language_temperature == 1:
      return groups
    masses = Counter()
    for group in groups:
      masses[group.language] += group.weight
    warmed = {language: mass ** (1 / config.language_temperature) for language, mass in masses.items()}
    scale = sum(warmed.values())
    return [Group(g.corpus, g.language, g.weight / masses[g.language] * warmed[g.language] / scale, g.first, g.rows)
            for g in groups]

  def _digest(self, config: DataConfig) -> str:
    digest = hashlib.sha256()
    for source in self.sources:
      digest.update(source.index.fingerprint().encode())
    digest.update(repr([(g.corpus, g.language, round(g.weight, 12)) for g in self.groups]).encode())
    return digest.hexdigest()


def check_shards(source: Source, max_rate: float, field: str) -> None:
  """Warns of a source's files that are broken. Raises LmsptError naming `field` if they are a larger share of all."""
  faults = source.shard_faults
  if not faults:
    return
  files = set(source.index.table.column('path').unique().to_pylist()) | {fault.shard for fault in faults}
  named = '; '.join(f'{fault.message} ({fault.reason})' for fault in faults[:4])
  more = f' and {len(faults) - 4} more' if len(faults) > 4 else ''
  if len(faults) > max_rate * len(files):
    raise LmsptError(f'data {source.uri!r}: {len(faults)} of {len(files)} shards are broken, more than '
                     f'{field} = {max_rate}: {named}{more}')
  _log.warning('data %r: %d of %d shards are broken: %s%s', source.uri, len(faults), len(files), named, more)


# ---------------------------------------------------------------- choosing utterances


def _chosen(source: Source, corpus: CorpusConfig, field: str) -> Source:
  """The utterances that `where` and the limits leave."""
  index = source.index
  keep = np.ones(len(index), bool)
  conditions = _conditions(corpus.where, f'{field}.where')
  seconds = None
  if corpus.max_hours or any(column == 'seconds' for column, *_ in conditions):
    seconds = _durations(source)
  for column, compare, value in conditions:
    keep &= _holds(index, seconds, column, compare, value, f'{field}.where')
  rows = np.flatnonzero(keep)
  if corpus.max_utterances or corpus.max_hours:
    rows = rows[np.argsort([draw('limit', index.value(row, 'id')) for row in rows], kind='stable')]
    rows = rows[:corpus.max_utterances or None]
    if corpus.max_hours:
      known = np.nan_to_num(seconds[rows])
      rows = rows[:int(np.searchsorted(np.cumsum(known), corpus.max_hours * 3600, side='right'))]
    rows = np.sort(rows)
  if not len(rows):
    limits = f'where = {corpus.where!r}, max_hours = {corpus.max_hours}'
    raise LmsptError(f'{field}: none of the {len(index)} utterances of {corpus.uri!r} is left by {limits}; loosen them')
  if len(rows) == len(index):
    return source
  _log.info('data %r: %d of %d utterances chosen', corpus.uri, len(rows), len(index))
  return source.select(rows)


def _conditions(where: str, field: str) -> list[tuple[str, str, str]]:
  """'seconds >= 1 and language in en,de' to [(column, comparison, value)]."""
  found = []
  for part in re.split(r'\band\b', where) if where.strip() else ():
    matched = _CONDITION.fullmatch(part)
    if not matched:
      raise LmsptError(f'{field} = {where!r}: {part.strip()!r} is no condition; write e.g. '
                       "'seconds >= 1 and language in en,de'")
    found.append(matched.groups())
  return found


def _holds(index: Index, seconds: np.ndarray | None, column: str, compare: str, value: str, field: str) -> np.ndarray:
  """Which rows meet a condition: bool [rows]. A row without the number does not."""
  if column in LABELS:
    if compare not in ('=', '!=', 'in', 'not in'):
      raise LmsptError(f'{field}: {column} is text and can\'t be compared by {compare}; use =, !=, in or not in')
    values = [part.strip() for part in value.split(',')] if 'in' in compare else [value]
    found = pc.is_in(index.table.column(column), pa.array(values, pa.large_string())).to_numpy()
    return ~found if compare in ('!=', 'not in') else found
  if column not in index.number_columns:
    raise LmsptError(f'{field}: the metadata has no {column!r}, {nearest(column, [*LABELS, *index.number_columns])}')
  try:
    wanted = float(value)
    compared = _COMPARE[compare]
  except (ValueError, KeyError) as error:
    raise LmsptError(f'{field}: {column} {compare} {value}: {column} is a number; write e.g. {column} >= 1') from error
  numbers = seconds if column == 'seconds' else index.numbers(column)
  return compared(numbers, wanted) & ~np.isnan(numbers)


def _durations(source: Source) -> np.ndarray:
  """Seconds of every utterance, float64 [rows]; read from the audio's header where the metadata has none. NaN where
  that can't be read: a filter on seconds leaves such an utterance out."""
  seconds = np.array(source.index.numbers('seconds'))
  unknown = np.flatnonzero(np.isnan(seconds))

  def measure(row: int) -> float:
    try:
      with source[row].open() as file:
        return file.frames / file.samplerate
    except AudioError as error:
      failed.append(str(error))
      return float('nan')

  failed: list[str] = []
  if len(unknown):
    _log.info('data %r: reading the duration of %d utterances from their headers', source.uri, len(unknown))
    with ThreadPoolExecutor(16) as pool:
      seconds[unknown] = list(pool.map(measure, unknown.tolist()))
  if failed:
    _log.warning('data %r: %d utterances have no readable duration and are left out, e.g. %s', source.uri, len(failed),
                 min(failed))
  return seconds
