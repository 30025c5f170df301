"""What all tasks of a run share: the source, the options, and where in OUT/.prepare things lie.

  source.arrow        the source's index, a record batch per part
  parts/N.records     the packed records of part N, one after the other
  parts/N.arrow       a row per record, and the part's faults
  order.arrow         which record of which part comes where, a record batch per shard
  shards/NAME.arrow   the rows of a finished shard, as index.parquet will have them
  done.json           what a finished dataset was made from

Tasks are numbers; whoever runs them needs the job and the files, so both must be reachable from every worker.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmspt_jax.data.index import Index
from lmspt_jax.data.kept import named_errors, read_batch
from lmspt_jax.data.sources import Source

FORMAT = 2  # of what is kept; raise it when the same source comes out differently


@dataclass(frozen=True)
class Job:
  """One run of `prepare`; it travels to the workers."""

  out: Path
  source: Source  # without rows (those are in source.arrow); its shard faults are those that no row would show
  sample_rate: int | None  # Hz
  max_seconds: float

  @property
  def state(self) -> Path:
    return self.out / '.prepare'

  @property
  def index(self) -> Path:
    return self.state / 'source.arrow'

  @property
  def order(self) -> Path:
    return self.state / 'order.arrow'

  @property
  def done(self) -> Path:
    return self.state / 'done.json'

  def part(self, number: int) -> Path:
    """Its rows; the records are in the file of the same name with the suffix .records."""
    return self.state / 'parts' / f'{number:06d}.arrow'

  def shard(self, name: str) -> Path:
    return self.state / 'shards' / f'{name}.arrow'

  def part_source(self, number: int) -> Source:
    """The source with the rows of one part."""
    chosen = copy.copy(self.source)
    chosen.index = Index(read_batch(self.index, number)[0])
    return chosen


def task(function: Callable[[Job, int], None]) -> Callable[[Job, int], None]:
  """Marks a task: what the disk does to it becomes one line."""
  @functools.wraps(function)
  def run(job: Job, number: int) -> None:
    with named_errors(job.out):
      function(job, number)
  return run
