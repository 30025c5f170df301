"""The one exception type that reaches a user as a single line.

Anything a user can cause (a missing file, a field that does not exist, a shard cut short) is raised as
`LmsptError`; the command line prints its text and exits with status 1. Every other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmsptError(Exception):
  """A fault the user can mend. The message is one line: what, which value, and the way out."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
  """A phrase like "did you mean 'a' or 'b'?" for an unknown name; lists what is known if nothing is close."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
  if close:
    return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
  return 'known: ' + ', '.join(known)
