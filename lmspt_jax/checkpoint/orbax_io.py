"""What Orbax and tensorstore need to be told, and what they raise, as one line."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from lmspt_jax.errors import LmsptError

_ARRAYS = 'd'  # folders of arrays; other files of a checkpoint are of text, or list what is in those
_MAX_METADATA = 16 << 20  # bytes of such a file
# What Orbax raises, besides OSError, for files that are not as it writes them.
DAMAGE = (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError)
# What tensorstore prefixes its ValueErrors with when it is the store that fails.
_STORE_FAULT = re.compile('(RESOURCE_EXHAUSTED|OUT_OF_RANGE|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|UNAVAILABLE|'
                          'DEADLINE_EXCEEDED|FAILED_PRECONDITION|ABORTED|DATA_LOSS|INTERNAL|UNKNOWN): ')

failed_saves: list[BaseException] = []  # what Orbax's threads have met with since the last save began


def context() -> ocp.Context:
  # By itself Orbax would save the record's text among arrays, find none there and warn with every checkpoint.
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='record')
  found = ocp.Context()
  found.checkpointables.registry = registry
  return found


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
  """What Orbax and tensorstore raise for a store that takes nothing more, as one line."""
  _hear_once()
  try:
    yield
  except (OSError, ValueError) as error:
    if not _is_of_store(error):
      raise
    raise LmsptError(cannot_write(folder, error)) from error


def _is_of_store(error: BaseException | None) -> bool:
  return isinstance(error, OSError) or (isinstance(error, ValueError) and bool(_STORE_FAULT.match(str(error))))


def cannot_write(folder: Path, error: BaseException) -> str:
  return (f'{folder}: this checkpoint could not be written ({error}), earlier ones are whole; make room there, or mend '
          'access to it, and run the same command again')


@functools.cache
def _hear_once() -> None:
  """From now on, what makes a save fail in the background is noted, and not told by Orbax with all its calls.

  Its log is where a failure can be seen at once: Orbax raises it only when all hosts have come to their end, which the
  others may not do without this one, or after twenty minutes.
  """
  show = sys.unraisablehook

  def unless_late(report: Any) -> None:
    # tensorstore tells Orbax, which has given up already, that one more of its files failed.
    if not isinstance(report.exc_value, RuntimeError) or str(report.exc_value) != 'Event loop is closed':
      show(report)

  def note(record: logging.LogRecord) -> bool:
    if not record.exc_info or f'{os.sep}orbax{os.sep}' not in record.pathname:
      return True
    if _is_of_store(record.exc_info[1]):
      failed_saves.append(record.exc_info[1])
    return False

  sys.unraisablehook = unless_late
  logging.getLogger('absl').addFilter(note)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
  """What Orbax raises for files that are missing, cut short or of other arrays, as one line.

  It opens whatever lies in the folder and takes a file of text for as long as it is, so that is looked at first.
  """
  for where, folders, files in os.walk(folder):
    for name in files + [name for name in folders if Path(where, name).is_symlink()]:
      path = Path(where, name)
      if not path.is_file():
        raise LmsptError(f'{path}: not a plain file; delete {folder} to go on from the checkpoint before it')
      if Path(where).name != _ARRAYS and path.stat().st_size > _MAX_METADATA:
        raise LmsptError(f'{path}: {path.stat().st_size} bytes, more than a checkpoint has there; delete {folder} to '
                         'go on from the checkpoint before it')
  try:
    yield
  except (OSError, *DAMAGE) as error:
    raise LmsptError(f'{folder}: can\'t be read, so it is damaged or of another version of lmspt_jax; delete it to go '
                     'on from the checkpoint before it') from error
