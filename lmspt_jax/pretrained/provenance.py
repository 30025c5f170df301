"""What trained weights were made from: they carry the licences of the data they were trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmspt_jax.config import CorpusConfig
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError, shown

HELD_OUT = 'held_out/'


@dataclass(frozen=True)
class Provenance:
  """What a model's card says of where it comes from.

  Attributes:
    license: of the weights, in words.
    data: of each corpus {'uri', 'split', 'where'}, and where it is on this machine {'utterances', 'hours' (None where
      a length is unknown), 'licenses'} of that split, before `where`.
    metrics: figures on held-out speech by name; empty where none were taken.
  """

  license: str
  data: list[dict[str, Any]] = field(default_factory=list)
  metrics: dict[str, float] = field(default_factory=dict)

  def fault(self) -> str | None:
    """What is not as above, where it comes from a file; None if all is."""
    for row in self.data:
      if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ('uri', 'split', 'where')):
        return f'data has {shown(row)} where a corpus has uri, split and where'
      numbers, licenses = (row.get('utterances', 0), row.get('hours') or 0), row.get('licenses', [])
      if not all(map(_is_number, numbers)) or not isinstance(licenses, list) or not all(
          isinstance(license, str) for license in licenses):
        return f'data has {shown(row)}: utterances and hours are numbers, licenses texts'
    return next((f'metrics has {shown(name)} = {shown(value)}, not a number' for name, value in self.metrics.items()
                 if not _is_number(value)), None)


def of_run(corpora: Sequence[CorpusConfig], workdir: Path, step: int) -> Provenance:
  """Of the model that a run had at `step`. Opens its training data."""
  data = [_described(corpus) for corpus in corpora]
  return Provenance(_license(data), data, _held_out_figures(workdir / 'metrics.jsonl', step))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _described(corpus: CorpusConfig) -> dict[str, Any]:
  row = {'uri': corpus.uri, 'split': corpus.split, 'where': corpus.where}
  try:
    index = open_source(corpus.uri, corpus.split).index
  except LmsptError:  # the weights are used where their data is not
    return row
  hours = float(np.sum(index.numbers('seconds'))) / 3600
  return {**row, 'utterances': len(index), 'hours': round(hours, 3) if np.isfinite(hours) else None,
          'licenses': sorted(set(index.counts('license')) - {''})}


def _license(data: list[dict[str, Any]]) -> str:
  if not data:
    return 'not known: the run names no training data'
  absent = next((row['uri'] for row in data if 'licenses' not in row), None)
  if absent is not None:
    return f'that of the training data, {absent} (not on this machine)'
  licenses = sorted({license for row in data for license in row['licenses']})
  return f'that of the training data: {", ".join(licenses) or "not named there"}'


def _held_out_figures(path: Path, step: int) -> dict[str, float]:
  """Of the last evaluation up to `step`."""
  if not path.is_file():
    return {}
  found = {}
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except ValueError:  # cut short by a kill; the run drops it when it goes on
      continue
    if row['step'] <= step and any(name.startswith(HELD_OUT) for name in row):
      found = row
  return {name: value for name, value in found.items() if name.startswith(HELD_OUT) and value is not None}
