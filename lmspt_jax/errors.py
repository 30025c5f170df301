"""The one exception type that reaches a user as a single line, and how a command ends.

Anything a user can cause (a missing file, a field that does not exist, a shard cut short) is raised as
`LmsptError`; the command line prints its text and exits with status 1. Every other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAULT = 1  # a fault the user can mend
EXIT_USAGE = 2  # a command line that cannot be read
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: not a fault, start the same command again
EXIT_KEYBOARD = 130  # 128 + SIGINT


class LmsptError(Exception):
  """A fault the user can mend. The message is one line: what, which value, and the way out."""


class Interrupted(Exception):
  """Training was told to stop and has saved; running the same command again goes on."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
  """A phrase like "did you mean 'a' or 'b'?" for an unknown name; lists what is known if nothing is close."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
  if close:
    return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
  return 'known: ' + ', '.join(known)
