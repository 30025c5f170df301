"""Which records a run had to replace: counted, listed in the workdir, and stopping the run when they are too many."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.data.dataset_info import write_atomic
from lmspt_jax.data.faults import REASONS
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.errors import LmsptError

FILE_NAME = 'faults.jsonl'
FAULT_KEYS = ('index', 'fault_record', 'fault_reason')  # of a batch, that the log looks at
GRACE = 3  # examples that may fail before the rate is looked at
_MAX_EXAMPLES = 1000  # listed of one record
_FIELDS = ('uri', 'shard', 'name', 'reason', 'examples')
_NAMED = 4  # shards in the message that stops a run
_log = logging.getLogger(__name__)


class FaultLog:
  """Takes every batch; `save` lists the records by source, shard and reason, with the examples that they failed.

  The rate is examples whose own record failed over examples seen. It stops the run once it is past `max_rate` and
  more than GRACE examples failed, so that one bad record among the first ten is no verdict; with `max_rate` 0 the
  first fault stops it. Where several hosts train, each gives its log the whole batch, so that all stop together.
  """

  def __init__(self, max_rate: float, mixture: Mixture, folder: Path | None = None):
    """`folder`: the workdir; what an interrupted run listed there is kept. None: nothing is written or logged.

    Raises LmsptError if the list there can't be read.
    """
    self._max_rate, self._mixture = max_rate, mixture
    self._path = folder / FILE_NAME if folder else None
    self._seen = self._failed = 0
    self._faults: dict[tuple[str, str], dict[str, Any]] = {}  # (uri, name) -> row of the list
    self._changed = False
    if self._path and self._path.exists():
      self._load(self._path)
    for source in mixture.sources:
      for fault in source.shard_faults:
        self._add(source.uri, fault.shard, fault.shard, fault.reason)

  def update(self, batch: dict[str, np.ndarray]) -> None:
    """Takes FAULT_KEYS of a batch. Raises LmsptError when the rate is passed."""
    records = batch['fault_record']
    self._seen += len(records)
    self._failed += int((records[:, 0] >= 0).sum())
    for row, attempt in np.argwhere(records >= 0):
      source, position = self._mixture.locate(int(records[row, attempt]))
      name, reason = source.name(position), REASONS[batch['fault_reason'][row, attempt]]
      fault = self._add(source.uri, source.shard(position), name, reason)
      # The same example again is a batch met twice, before and after a run was killed; a successor's is its own row's.
      example = int(batch['index'][row]) + int(attempt)
      if example not in fault['examples'] and len(fault['examples']) < _MAX_EXAMPLES:
        fault['examples'].append(example)
    if self._failed > (GRACE if self._max_rate > 0 else 0) and self._failed > self._max_rate * self._seen:
      raise LmsptError(f'data: {self._failed} of {self._seen} examples could not be used, more than '
                       f'data.max_fault_rate = {self._max_rate}: {self._worst()}; mend them or raise the rate')

  def report(self) -> list[dict[str, Any]]:
    """[{'uri', 'shard', 'name', 'reason': str, 'examples': [int]}] by uri and name. Examples are positions in the order
    of training; a shard that is missing or cut short has none."""
    return [self._faults[key] for key in sorted(self._faults)]

  def save(self) -> None:
    """Writes the list to the workdir if it has grown. Raises OSError."""
    if self._changed and self._path:
      write_atomic(self._path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in self.report()))
      self._changed = False

  def _add(self, uri: str, shard: str, name: str, reason: str) -> dict[str, Any]:
    if (uri, name) not in self._faults and self._path:
      _log.warning('data %s: %s can\'t be used (%s)%s', uri, name, reason,
                   '' if shard == name and not self._seen else ', took its successor')
    if (uri, name) not in self._faults:
      self._faults[uri, name] = {'uri': uri, 'shard': shard, 'name': name, 'reason': reason, 'examples': []}
    self._changed = True
    return self._faults[uri, name]

  def _worst(self) -> str:
    """The shards with most unusable records: "SHARD: 12 records (truncated, e.g. SHARD:5)"; names where it is one."""
    shards = Counter((row['uri'], row['shard']) for row in self._faults.values() if row['examples'])
    parts = []
    for (uri, shard), count in shards.most_common(_NAMED):
      rows = [row for row in self.report() if (row['uri'], row['shard']) == (uri, shard)]
      reasons = ', '.join(sorted({row['reason'] for row in rows}))
      parts.append(f'{uri} {rows[0]["name"]} ({reasons})' if count == 1 else
                   f'{uri} {shard}: {count} records ({reasons}, e.g. {rows[0]["name"]})')
    more = [f'and {len(shards) - _NAMED} more files'] if len(shards) > _NAMED else []
    return '; '.join(parts + more)

  def _load(self, path: Path) -> None:
    try:
      for line in path.read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        self._faults[row['uri'], row['name']] = {key: row[key] for key in _FIELDS}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
      raise LmsptError(f'{path}: not a list of faults ({type(error).__name__}: {error}); remove it') from error
