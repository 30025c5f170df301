"""Which of a run's checkpoints was the best, as records of checkpoints say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lmspt_jax.errors import LmsptError, shown


@dataclass(frozen=True)
class Best:
  """The best evaluation up to a checkpoint.

  Attributes:
    metric: by which, e.g. 'held_out/full/pesq'.
    step: of it, and of its checkpoint.
    value: of the metric there.
  """

  metric: str
  step: int
  value: float

  @classmethod
  def of(cls, record: Mapping[str, Any]) -> Best | None:
    """That of a checkpoint's record; None where it names none. Raises LmsptError for one that is damaged."""
    found = record.get('best')
    if found is None:
      return None
    kinds = {'metric': str, 'step': int, 'value': float}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds or not (
        math.isfinite(found['value'])):
      raise LmsptError(f'record of a checkpoint: has best = {shown(found)}, so it is damaged; delete that checkpoint')
    return cls(**found)

  @property
  def as_record(self) -> dict[str, Any]:
    return asdict(self)
