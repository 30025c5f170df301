"""The one exception type that reaches a user as a single line, and how a command ends.

Anything a user can cause (a missing file, a field that does not exist, a shard cut short) is raised as
`LmsptError`; the command line prints its text and exits with status 1. Every other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE = 1000  # characters
_MAX_SHOWN = 200  # characters of a name or value
_MAX_KNOWN = 40  # names that are listed
_MAX_COMPARED = 2000  # names that are compared

EXIT_FAULT = 1  # a fault the user can mend
EXIT_USAGE = 2  # a command line that cannot be read
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: not a fault, start the same command again
EXIT_KEYBOARD = 130  # 128 + SIGINT
EXIT_READER_GONE = 141  # 128 + SIGPIPE: nobody reads what a stream writes


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxlist, _REPR.maxdict = 3, 20, 20, 20
_REPR.maxstring, _REPR.maxlong, _REPR.maxother = _MAX_SHOWN, _MAX_SHOWN, _MAX_SHOWN


class LmsptError(Exception):
  """A fault the user can mend. The message is one line: what, which value, and the way out.

  It may quote what stands in a stranger's file: line ends become spaces, what a terminal would obey or can't show is
  escaped, and of a very long message the middle is left out.
  """

  def __init__(self, message: str):
    line = _cut(' '.join(message.split()))
    if not line.isprintable():
      line = _cut(''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line))
    super().__init__(line)


class UsageError(LmsptError):
  """A command line that cannot be read."""


class Interrupted(Exception):
  """Training was told to stop and has saved; running the same command again goes on."""


def _cut(line: str) -> str:
  return line if len(line) <= MAX_MESSAGE else f'{line[:MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 4:]}'


def shown(value: Any) -> str:
  """The `repr` of a value for a message, whatever it is: of what is long or nested deeply only the beginning."""
  try:
    return _REPR.repr(value)
  except ValueError:  # a number of more digits than Python writes
    return f'a {type(value).__name__} that can\'t be shown'


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
  """A phrase like "did you mean 'a' or 'b'?" for an unknown name; lists what is known if nothing is close."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(name[:_MAX_SHOWN], known[:_MAX_COMPARED], n=count, cutoff=0.5)
  if close:
    return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
  more = f' and {len(known) - _MAX_KNOWN} more' if len(known) > _MAX_KNOWN else ''
  return f'known: {", ".join(known[:_MAX_KNOWN])}{more}'
