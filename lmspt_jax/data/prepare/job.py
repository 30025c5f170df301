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

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmspt_jax.data.dataset_info import replacing
from lmspt_jax.data.index import Index
from lmspt_jax.data.sources import Source
from lmspt_jax.errors import LmsptError

FORMAT = 2  # of what is kept; raise it when the same source comes out differently
_META = b'lmspt'


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

  def relative(self, name: str) -> str:
    """What the source calls a file or an utterance, without the folder that the source lies in."""
    return name.removeprefix(f'{self.source.root}/')

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


@contextlib.contextmanager
def named_errors(out: Path) -> Iterator[None]:
  """Turns an OSError of writing under `out` into an LmsptError."""
  try:
    yield
  except OSError as error:
    cause = error.strerror or ' '.join(str(error).split())
    path = error.filename2 or error.filename or out
    raise LmsptError(f'{path}: can\'t be written ({cause}); choose another --out or make room') from error


def digest(value: Any) -> str:
  """sha256 of the JSON of a value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- Arrow files with a note in JSON


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.Table], note: Mapping[str, Any]) -> None:
  """Each table becomes a record batch. Raises OSError."""
  schema = schema.with_metadata({_META: json.dumps(note)})
  with replacing(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
    for table in batches:
      for batch in table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema)]:
        writer.write_batch(batch)


def write_rows(path: Path, table: pa.Table, note: Mapping[str, Any]) -> None:
  """A table and its note in one file. Raises OSError."""
  write_batches(path, table.schema, [table], note)


def read_batch(path: Path, number: int = 0) -> tuple[pa.Table, dict[str, Any]]:
  """(one record batch, the note); mapped, not read."""
  with pa.memory_map(str(path)) as file:
    reader = pa.ipc.open_file(file)
    return pa.Table.from_batches([reader.get_batch(number)]), json.loads(reader.schema.metadata[_META])


def read_note(path: Path) -> dict[str, Any] | None:
  """None if there is no such file, or one that was cut short."""
  try:
    with pa.memory_map(str(path)) as file:
      return json.loads(pa.ipc.open_file(file).schema.metadata[_META])
  except (OSError, pa.ArrowInvalid):
    return None
