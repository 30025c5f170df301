"""What corpora say of an utterance, under the names they use, to the names used here."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from lmspt_jax.errors import LmsptError, shown

LABELS = ('id', 'split', 'text', 'language', 'speaker', 'license')
SPLIT_PATTERN = re.compile(r'[A-Za-z0-9_.+-]{1,64}')
MAX_LABEL = 1 << 20  # characters
MAX_SCORES = 64
_NAMES = {  # first one that is there
  'id': ('id', '_id', 'utterance_id', 'segment_id'),
  'split': ('split',),
  'text': ('text', 'transcript', 'transcription', 'sentence', 'normalized_text'),
  'language': ('language', 'lang', 'locale'),
  'speaker': ('speaker', 'speaker_id', 'client_id'),
  'license': ('license', 'licence'),
  'seconds': ('seconds', 'duration'),
}
_TAKEN = {name for names in _NAMES.values() for name in names} | {'path', 'position', 'size'}  # no names for scores


def row_from(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """A metadata object (a manifest's line, a tar's json member, a parquet row) to an index row without its place.

  Returns:
    The labels as text ('' where absent; numbers, as LibriSpeech's speakers are, become text), seconds (float, NaN where
    absent) and scores: other numbers by name, at most MAX_SCORES.

  Raises:
    LmsptError: `where`, the field and its value, if a label is neither text nor a whole number, or a split is no name.
  """
  row: dict[str, Any] = {name: _label(values, name, where) for name in LABELS}
  if row['split'] and not SPLIT_PATTERN.fullmatch(row['split']):
    raise LmsptError(f'{where}: split = {shown(row["split"])}: use up to 64 letters, digits and . _ + -')
  row['seconds'] = next((float(values[name]) for name in _NAMES['seconds'] if _is_number(values.get(name))), math.nan)
  scores = {name: float(value) for name, value in values.items()
            if _is_number(value) and name not in _TAKEN and name.isprintable()}
  row['scores'] = dict(sorted(scores.items())[:MAX_SCORES])
  return row


def _label(values: Mapping[str, Any], name: str, where: str) -> str:
  value = next((values[key] for key in _NAMES[name] if values.get(key) is not None), '')
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str) or len(value) > MAX_LABEL:
    raise LmsptError(f'{where}: {name} = {shown(value)}: must be text of at most {MAX_LABEL} characters')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise LmsptError(f'{where}: {name} = {shown(value)}: holds half a character (a lone surrogate)') from error
  return value


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def auto_split(key: str) -> str:
  """'valid' for one key in eight, else 'train'. `key` is the transcript, or the id where there is none.

  The md5 of the lower-cased letters and digits decides, so utterances that say the same are never on both sides.
  """
  plain = ''.join(c for c in key.lower() if c.isalnum())
  return 'valid' if int(hashlib.md5(plain.encode(), usedforsecurity=False).hexdigest(), 16) % 8 == 0 else 'train'
