"""What a run measures of itself, written every train.log_every steps."""

from __future__ import annotations

import time

import jax
import numpy as np
from tqdm import tqdm

from lmspt_jax import metrics as metrics_lib
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.errors import LmsptError


class Meter:
  """Metrics of training steps, fetched one step late so that the device never waits for the log."""

  def __init__(self, config: ExperimentConfig, writer: metrics_lib.MetricWriter, bar: tqdm):
    self._config, self._writer, self._bar = config, writer, bar
    self._pending: tuple[int, dict] | None = None
    self._sums: dict[str, tuple] = {}
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves the time since the last row out of the throughput (evaluation, compilation)."""
    self._clock, self._seconds = time.perf_counter(), 0.0

  def add(self, step: int, found: dict) -> None:
    """Takes the metrics of `step`, which may still be computed; fetches those of the step before."""
    self.flush()
    self._pending = (step, found)

  def flush(self) -> None:
    if self._pending is None:
      return
    step, found = self._pending
    self._pending = None
    found = jax.device_get(found)
    self._bar.update()
    self._seconds += float(found['audio_seconds'][0])
    self._sums = metrics_lib.merge(self._sums, found)
    # At every step: the state that comes of it must not be saved.
    broken = [k for k, v in metrics_lib.result(found).items() if not np.isfinite(v)]
    if step % self._config.train.log_every and step != self._config.train.num_steps and not broken:
      return
    values = metrics_lib.result(self._sums)
    self._sums = {}
    elapsed = time.perf_counter() - self._clock
    values['audio_seconds_per_second'] = self._seconds / max(elapsed, 1e-9)
    self.restart_clock()
    self._writer.write(step, values)
    self._bar.set_postfix_str(
        f'mel {values["loss/mel"]:.2f}, distill {values["loss/distillation"]:.3f}, '
        f'd {values["loss/discriminator"]:.2f}, {values["audio_seconds_per_second"]:.1f} audio s/s')
    if broken:
      raise LmsptError(f'{broken[0]} is not finite at step {step}; lower generator_optimizer.learning_rate, or look at '
                       'the data of this step')
