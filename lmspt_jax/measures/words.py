"""Words and characters that an ASR gets wrong, after the text normalisers of Whisper's authors.

`whisper_normalizer` (arXiv 2212.04356, appendix C) and `jiwer` (minimum edit distance).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from lmspt_jax.measures.undefined import Undefined

# Written without spaces: their letters are compared, as Whisper's authors do.
WITHOUT_SPACES = ('zh', 'ja', 'th', 'lo', 'my', 'yue')


@dataclass(frozen=True)
class TextErrors:
  """Of one utterance. Rates are sums of errors over sums of words or characters.

  Attributes:
    reference, heard: normalised.
    words, characters: of the reference.
    word_errors, character_errors: substitutions, deletions and insertions.
    aligned: ('equal', 'substitute', 'delete' or 'insert', words of the reference, words that were heard), in order.
  """

  reference: str
  heard: str
  words: int
  word_errors: int
  characters: int
  character_errors: int
  aligned: tuple[tuple[str, str, str], ...]


@functools.cache
def normaliser(language: str) -> Callable[[str], str]:
  """For one of Whisper's language codes."""
  return EnglishTextNormalizer() if language == 'en' else BasicTextNormalizer(split_letters=language in WITHOUT_SPACES)


def text_errors(reference: str, heard: str, language: str = 'en') -> TextErrors:
  """Raises Undefined for a reference without words."""
  normalise = normaliser(language)
  reference, heard = ' '.join(normalise(reference).split()), ' '.join(normalise(heard).split())
  if not reference:
    raise Undefined('no transcript with words')
  words, characters = jiwer.process_words(reference, heard), jiwer.process_characters(reference, heard)
  wanted, got = words.references[0], words.hypotheses[0]
  aligned = tuple(
      (chunk.type, ' '.join(wanted[chunk.ref_start_idx:chunk.ref_end_idx]),
       ' '.join(got[chunk.hyp_start_idx:chunk.hyp_end_idx])) for chunk in words.alignments[0])
  wrong = lambda found: found.substitutions + found.deletions + found.insertions
  return TextErrors(reference, heard, len(wanted), wrong(words), len(characters.references[0]), wrong(characters),
                    aligned)
