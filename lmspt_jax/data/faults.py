"""Faults of one utterance or file, which the data pipeline skips and counts."""

from __future__ import annotations

from lmspt_jax.errors import LmsptError

# Why audio can't be used; the number in this list travels in batches.
REASONS = ('missing', 'undecodable', 'truncated', 'empty', 'non-finite', 'silent', 'too large', 'bad rate',
           'corrupt record', 'unreachable')


class AudioError(LmsptError):
  """Audio that can't be used; `reason` is one of REASONS. A single file given by a user ends in its one line."""

  def __init__(self, message: str, reason: str = 'undecodable'):
    super().__init__(message)
    self.reason = reason
