"""What a run measures of itself, written every train.log_every steps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lmspt_jax import metrics as metrics_lib
from lmspt_jax.chips import chip_of
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.hosts import is_writer
from lmspt_jax.training.alarms import Alarms
from lmspt_jax.training.nonfinite import SkippedSteps

_FIRST_START = 'first_start.json'


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
  """bfloat16 operations a second of all of them; None where the table of chips does not know them (a CPU)."""
  chip = chip_of(devices[0].device_kind)
  return None if chip is None else chip.peak_flops * len(devices)


class Goodput:
  """The share of the time since a run first started that went into steps it still has.

  Starting, compiling, evaluating, saving, standing still, and steps that a kill undid are what is left. The seconds of
  the steps travel in the checkpoint (`record`), so those after it are counted again when they are done again; when the
  run first started stands in its folder.

  Args:
    folder: the run's, on the host that writes; None on the others, which measure only themselves.
    record: `record` of the checkpoint that training goes on from; None at step 0.

  Raises:
    LmsptError: what stands in the folder can't be read.
  """

  def __init__(self, folder: Path | None, record: Mapping[str, Any] | None):
    self.productive_seconds = 0.0 if record is None else float(record['productive_seconds'])
    self._started = time.time() if folder is None else _first_start(folder / _FIRST_START)

  @property
  def record(self) -> dict[str, float]:
    return {'productive_seconds': self.productive_seconds}

  @property
  def share(self) -> float:
    return self.productive_seconds / max(time.time() - self._started, 1e-9)


def _first_start(path: Path) -> float:
  """The time in the file, in seconds since 1970; writes now into it where there is none."""
  if not path.exists():
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps({'seconds_since_1970': time.time()}) + '\n')
    temporary.replace(path)
  try:
    return float(json.loads(path.read_text())['seconds_since_1970'])
  except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
    raise LmsptError(f'{path}: does not say when the run first started ({error}); remove it') from error


class Meter:
  """Metrics of training steps, fetched one step late so that the device never waits for the log.

  Args:
    config: the run's.
    writer, bar: where they go.
    skipped: told of every step's metrics first.
    alarms: told of every row.
    flops: operations of a step over all devices (`flops.count_flops`).
    peak_flops: what all devices could do in a second; None leaves the utilisation out.
    goodput: told of every step's seconds.
  """

  def __init__(self, config: ExperimentConfig, writer: metrics_lib.MetricWriter, bar: tqdm, skipped: SkippedSteps,
               alarms: Alarms, *, flops: int, peak_flops: float | None, goodput: Goodput):
    self._config, self._writer, self._bar, self._skipped = config, writer, bar, skipped
    self._alarms = alarms
    self._flops, self._peak_flops, self._goodput = flops, peak_flops, goodput
    self._pending: tuple[int, dict] | None = None
    self._sums: dict[str, tuple] = {}
    self._row_start = self._step_start = time.perf_counter()
    self._steps, self._audio_seconds, self._waited = 0, 0.0, 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What is done in it (evaluating, saving) counts neither as time of a step nor as waiting."""
    start = time.perf_counter()
    yield
    away = time.perf_counter() - start
    self._row_start += away
    self._step_start += away

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around the call that may have to wait for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def add(self, step: int, found: dict) -> None:
    """Takes the metrics of `step`, which may still be computed; fetches those of the step before."""
    self.flush()
    self._pending = (step, found)

  def flush(self) -> None:
    if self._pending is None:
      return
    step, found = self._pending
    self._pending = None
    found = self._skipped.update(step, jax.device_get(found))
    now = time.perf_counter()
    self._goodput.productive_seconds += now - self._step_start
    self._step_start = now
    self._bar.update()
    self._steps += 1
    self._audio_seconds += float(found['audio_seconds'][0])
    self._sums = metrics_lib.merge(self._sums, found)
    if step % self._config.train.log_every and step != self._config.train.num_steps:
      return
    values = metrics_lib.result(self._sums) | self._measured(max(now - self._row_start, 1e-9))
    values['skipped_steps'] = self._skipped.total
    self._sums = {}
    self._steps, self._audio_seconds, self._waited, self._row_start = 0, 0.0, 0.0, now
    alarms, lines = self._alarms.update(step, values)
    self._writer.write(step, values | alarms)
    for line in lines if is_writer() else ():
      self._bar.write(line)
    used = values.get('model_flop_utilisation')
    text = (
        f'mel {values["loss/mel"]:.2f}, distill {values["loss/distillation"]:.3f}, '
        f'd {values["loss/discriminator"]:.2f}, {values["audio_seconds_per_second"]:.1f} audio s/s'
        + (f', {used:.1%} of peak' if used is not None else '')
        + (f', {values["waiting_for_data"]:.0%} waiting' if values['waiting_for_data'] > 0.05 else '')
        + ''.join(f', {mark.upper()}' for mark in self._alarms.marks))
    if not self._bar.disable:
      self._bar.set_postfix_str(text)
    elif is_writer():  # no terminal: a line for the log
      print(f'step {step}/{self._config.train.num_steps}: {text}', flush=True)

  def _measured(self, elapsed: float) -> dict[str, float]:
    """What the clock says of the steps since the last row."""
    values = {'audio_seconds_per_second': self._audio_seconds / elapsed, 'waiting_for_data': self._waited / elapsed,
              'goodput': self._goodput.share}
    if self._peak_flops is not None:
      values['model_flop_utilisation'] = self._flops * self._steps / elapsed / self._peak_flops
    return values
