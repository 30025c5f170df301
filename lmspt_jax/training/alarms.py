"""Alarms over what a run logs: codebooks that collapse, a discriminator that dominates, data that stalls.

They look at the rows of `metrics.jsonl`, every `train.log_every` steps. Nothing is raised and nothing stops: they say
when something begins and when it is over, and `alarm/NAME` is 1 in the rows in between. What is odd for one row is not
told: an alarm begins and ends after ROWS rows in a row that say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from lmspt_jax.config import DiscriminatorConfig, ExperimentConfig
from lmspt_jax.training.codebooks import PARTS

ROWS = 3


class Condition(Protocol):
  """A condition of a row.

  Attributes:
    mark: for the progress bar.
  """

  mark: str

  def __call__(self, row: Mapping[str, float]) -> str | None:
    """What is wrong, in words; '' if nothing is; None if the row does not tell."""
    ...


class CodebookCollapse:
  """A codebook draws few of its codes: in a batch they are worth less than SHARE of what they could be at most.

  A batch of F frames shows at most min(F, size) equally likely codes (perplexity); the least of a part's codebooks
  counts. Speech is not evenly spread, so a sound codebook stays well below: the demo run's semantic one (320 frames a
  batch, 1024 codes) is never under 19 %, while one that has collapsed is worth a handful of codes whatever its size.
  Codebooks of fewer than SMALLEST codes are left alone: there, a handful is all there is.
  """

  SHARE, SMALLEST = 0.05, 64
  mark = 'codebook collapse'

  def __init__(self, config: ExperimentConfig):
    frames = config.data.batch_size * (config.crop_samples // config.model.hop)
    sizes = {part: getattr(config.model, part).size for part in PARTS}
    self._least = {part: self.SHARE * min(size, frames) for part, size in sizes.items() if size >= self.SMALLEST}

  def __call__(self, row: Mapping[str, float]) -> str | None:
    found = {part: row.get(f'codebook/least_perplexity_{part}', math.nan) for part in self._least}
    found = {part: value for part, value in found.items() if math.isfinite(value)}
    if not found:
      return None
    return ', '.join(f'{part} perplexity {value:.3g}, under {self._least[part]:.3g}' for part, value in found.items()
                     if value < self._least[part])


class DiscriminatorDominance:
  """The discriminators tell every reconstruction from real speech, and the generator learns little from them.

  Least-squares losses, a sub-discriminator (`losses/adversarial.py`): one that can't tell says 1/2 to both, which
  costs it 1/2, and the generator 1/4; one that is never wrong says 0 and 1, which costs it 0 and the generator 1.
  Beyond a fifth of the first (LEAST) and three quarters of the second (MOST) it is hardly ever wrong: its answers are
  off by less than 0.23 on average, and reconstructions are 0.13 to it. In the demo run the first is never under 0.44,
  and the second over 0.5 only in the first 30 of 200 steps.
  """

  LEAST, MOST = 0.1, 0.75
  mark = 'discriminator dominates'

  def __init__(self, config: DiscriminatorConfig):
    self._count = len(config.periods) + len(config.rates) + len(config.fft_sizes)

  def __call__(self, row: Mapping[str, float]) -> str | None:
    own, generators = (row.get(f'loss/{name}', math.nan) / max(1, self._count)
                       for name in ('discriminator', 'adversarial'))
    if not (math.isfinite(own) and math.isfinite(generators)):
      return None
    if own >= self.LEAST or generators <= self.MOST:
      return ''
    return f'its loss is {own:.3g} a discriminator and the generator\'s {generators:.3g}, of 0.5 and 0.25 undecided'


class DataStall:
  """Training waits for data more than SHARE of the time: a fifth of the devices' work is lost.

  In the demo run it is 4 % in the first row, while buffers fill, and under 1 % from then on. Time is this host's.
  """

  SHARE = 0.2
  mark = 'data stall'

  def __call__(self, row: Mapping[str, float]) -> str | None:
    share = row.get('waiting_for_data', math.nan)
    if not math.isfinite(share):
      return None
    return f'{share:.0%} of the time spent waiting for data' if share > self.SHARE else ''


class Alarms:
  """All of them, over the rows of a run.

  Args:
    config: the run's.
    record: `record` of the checkpoint that training goes on from; None at step 0.
  """

  def __init__(self, config: ExperimentConfig, record: Mapping[str, Any] | None = None):
    self._conditions: dict[str, Condition] = {
        'codebook_collapse': CodebookCollapse(config),
        'discriminator_dominance': DiscriminatorDominance(config.discriminator), 'data_stall': DataStall()}
    record = record or {}
    self._on = {name: bool(record.get(name, [False, 0])[0]) for name in self._conditions}
    self._against = {name: int(record.get(name, [False, 0])[1]) for name in self._conditions}

  @property
  def record(self) -> dict[str, list]:
    """By alarm whether it is on, and for how many rows the contrary has been so: a run that resumes goes on from it."""
    return {name: [self._on[name], self._against[name]] for name in self._conditions}

  @property
  def marks(self) -> list[str]:
    """Of those that are on."""
    return [condition.mark for name, condition in self._conditions.items() if self._on[name]]

  def update(self, step: int, row: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Takes a row; returns what to add to it, and lines for the log: of what began, of what ended."""
    lines = []
    for name, condition in self._conditions.items():
      fault = condition(row)
      if fault is None:
        continue
      self._against[name] = self._against[name] + 1 if bool(fault) != self._on[name] else 0
      if self._against[name] >= ROWS:
        self._on[name], self._against[name] = bool(fault), 0
        lines.append(f'step {step} alarm: {condition.mark}: {fault or "over"}')
    return {f'alarm/{name}': float(on) for name, on in self._on.items()}, lines
