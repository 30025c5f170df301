"""From rows of utterances to one table: every number with its count, its missing and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lmspt_jax.measures import statistics
from lmspt_jax.measures.names import METRICS

Row = dict[str, Any]  # of utterances.jsonl


def system_figures(rows: Sequence[Row], system: str) -> dict[str, dict[str, Any]]:
  """A system's figure by metric. What does not apply to it (PESQ of the original) is left out."""
  applies = [name for name, metric in METRICS.items() if system != 'original' or not metric.needs_original]
  return {name: asdict(_figure(rows, system, name)) for name in applies}


def comparisons(rows: Sequence[Row], first: str, second: str) -> dict[str, dict[str, Any]]:
  """By metric that both have, over the utterances in which both have it."""
  out = {}
  for name, metric in METRICS.items():
    if 'original' in (first, second) and metric.needs_original:
      continue
    pairs = [(a, b) for a, b in ((_terms(row, first, name), _terms(row, second, name)) for row in rows)
             if a and b]
    first_U, second_U, over_U = (np.array(column, np.float64) for column in (
        [a[0] for a, _ in pairs], [b[0] for _, b in pairs], [a[1] for a, _ in pairs]))
    found = statistics.compare(first_U, second_U, over_U, missing=len(rows) - len(pairs))
    out[name] = {**asdict(found.difference), 'p': found.p}
  return out


def _figure(rows: Sequence[Row], system: str, name: str) -> statistics.Figure:
  terms = [_terms(row, system, name) for row in rows]
  found = [term for term in terms if term]
  return statistics.ratio(np.array([a for a, _ in found]), np.array([b for _, b in found]), len(terms) - len(found))


def _terms(row: Row, system: str, name: str) -> tuple[float, float] | None:
  return METRICS[name].terms(name, row['systems'].get(system, {}).get('values', {}))
