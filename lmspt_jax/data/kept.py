"""What work that may be killed keeps on disk: Arrow files with a note in JSON, whole or not there at all.

The note says what the file was made from, so that whoever comes next can tell whether it has to be made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmspt_jax.data.dataset_info import replacing
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import sha256

_META = b'lmspt'


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


# ---------------------------------------------------------------- ArrayRecord files


def write_records(path: Path, records: Iterable[bytes], count: int) -> None:
  """`count` records, uncompressed, each read alone; the file appears whole or not at all.

  Raises OSError, and LmsptError where fewer records arrive.
  """
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter  # starts threads
  with replacing(path) as temporary:
    temporary.touch()  # an OSError here names what is wrong; the writer's own errors don't
    try:
      writer = ArrayRecordWriter(str(temporary), 'group_size:1,uncompressed')
      for record in records:
        writer.write(record)
      writer.close()
      reader = ArrayRecordReader(str(temporary))
      written = reader.num_records() if reader.ok() else -1
      reader.close()
    except RuntimeError as error:  # what array_record raises, e.g. on a full disk
      raise LmsptError(f'{path}: can\'t be written ({" ".join(str(error).split())[:200]}); make room') from error
    if written != count:
      raise LmsptError(f'{path}: {written} of {count} records arrived on disk; make room')


def is_whole(path: Path, size: int, checksum: str) -> bool:
  """Whether a file is there with this size and sha256."""
  return path.is_file() and path.stat().st_size == size and sha256(path) == checksum


# ---------------------------------------------------------------- faults and fingerprints


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
