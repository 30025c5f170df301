"""The best held-out evaluation of a run so far, by `train.best_metric`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lmspt_jax.checkpoint import Best
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.measures.names import METRICS
from lmspt_jax.models.tokenizer import PATHS

HELD_OUT = 'held_out/'
# Which way is better, of what every evaluation measures.
_ALWAYS = {'mel': 'lower', 'distillation': 'lower', 'distinct_semantic': 'higher', 'perplexity_semantic': 'higher',
           'distinct_acoustic': 'higher', 'perplexity_acoustic': 'higher'}


class BestEvaluation:
  """Takes every evaluation. Step 0 is none to keep: nothing has been learnt, and it has no checkpoint.

  Every host calls it alike, with figures that all hosts have.

  Args:
    config: the run's.
    wanted: metrics beside the losses (`evaluators.wanted_metrics`).

  Attributes:
    best: so far; None before the first.

  Raises:
    LmsptError: `train.best_metric` is none of what is measured.
  """

  def __init__(self, config: ExperimentConfig, wanted: Collection[str]):
    self._name = config.train.best_metric
    self.best: Best | None = None
    if not self._name:
      return
    known = {f'{HELD_OUT}{name}': better for name, better in _ALWAYS.items()}
    known |= {f'{HELD_OUT}{path}/{name}': METRICS[name].better for path in PATHS for name in wanted}
    field = f'config field train.best_metric = {self._name!r}'
    if not config.data.held_out:
      raise LmsptError(f'{field}: nothing is held out to measure it on; give data.held_out')
    if self._name not in known:
      raise LmsptError(f'{field}: not measured; use {", ".join(known)}, or ask for more with train.eval_metrics')
    self._sign = 1 if known[self._name] == 'higher' else -1

  def resume(self, best: Best | None) -> None:
    """Goes on from what the checkpoint says; the best by another metric is none."""
    self.best = best if best is not None and best.metric == self._name else None

  @property
  def record(self) -> dict[str, Any] | None:
    """For a checkpoint."""
    return None if self.best is None else self.best.as_record

  def update(self, step: int, figures: Mapping[str, float]) -> bool:
    """Takes an evaluation (names without 'held_out/'); whether it is the best so far. Of equals the first is."""
    value = figures.get(self._name.removeprefix(HELD_OUT), math.nan) if self._name else math.nan
    if step == 0 or not math.isfinite(value):
      return False
    if self.best is not None and self._sign * value <= self._sign * self.best.value:
      return False
    self.best = Best(self._name, step, float(value))
    return True
