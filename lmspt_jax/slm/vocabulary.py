"""One vocabulary for the codes of all codebooks and a few special tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmspt_jax.errors import LmsptError, shown

SPECIAL_TOKENS = ('pad', 'bos', 'eos')
_MOST = 1 << 24  # codes in a codebook, and codebooks: what a file may say


@dataclass(frozen=True)
class Vocabulary:
  """Special tokens first, then the codes of codebook 0, of codebook 1, ...

  Code c of codebook k is token `offsets[k] + c`. A language model that has a vocabulary already puts this one behind
  it, by adding its own size to every token.
  """

  codebook_sizes: tuple[int, ...]

  @property
  def pad(self) -> int:
    """Where a layout has no code."""
    return SPECIAL_TOKENS.index('pad')

  @property
  def bos(self) -> int:
    """Before an utterance."""
    return SPECIAL_TOKENS.index('bos')

  @property
  def eos(self) -> int:
    """After an utterance."""
    return SPECIAL_TOKENS.index('eos')

  @property
  def offsets(self) -> tuple[int, ...]:
    """Of each codebook's code 0."""
    return tuple(itertools.accumulate(self.codebook_sizes[:-1], initial=len(SPECIAL_TOKENS)))

  @property
  def size(self) -> int:
    """Number of tokens."""
    return len(SPECIAL_TOKENS) + sum(self.codebook_sizes)

  def to_json(self) -> dict[str, Any]:
    """What a manifest says of it."""
    return {'size': self.size, 'special_tokens': {name: number for number, name in enumerate(SPECIAL_TOKENS)},
            'codebooks': [{'offset': offset, 'size': size}
                          for offset, size in zip(self.offsets, self.codebook_sizes, strict=True)]}

  @classmethod
  def from_json(cls, value: Any, where: str) -> Vocabulary:
    """Raises LmsptError naming `where`: not a vocabulary as `to_json` makes it."""
    codebooks = value.get('codebooks') if isinstance(value, dict) else None
    sizes = [row.get('size') if isinstance(row, dict) else None for row in codebooks] if isinstance(
        codebooks, list) else []
    if not sizes or not _all_counts(sizes) or cls(tuple(sizes)).to_json() != value:
      raise LmsptError(f'{where}: vocabulary = {shown(value)}: not as lmspt tokenize writes it; get the file again')
    return cls(tuple(sizes))


def _all_counts(sizes: Sequence[Any]) -> bool:
  return all(type(size) is int and 1 <= size <= _MOST for size in sizes)
