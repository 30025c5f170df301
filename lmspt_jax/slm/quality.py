"""What tokens of a corpus show when something went wrong with a model or with the audio.

Axes: K codebooks, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmspt_jax.metrics import perplexity
from lmspt_jax.slm.token_rows import TokenRow

MOST_OF_ONE = 0.5  # share of an utterance's frames that one code may have
LEAST_FRAMES = 8  # shorter utterances may well be of few codes
LEAST_USED = 0.05  # share of a codebook's codes: with less it is said that the codebook is hardly used
ENOUGH = 20  # frames per code of a codebook, from which on its use can be judged


def count_codes(ids_KT: np.ndarray, counts: Sequence[np.ndarray]) -> None:
  """Adds an utterance's codes to int64 [size] of each codebook."""
  for ids_T, counts_C in zip(ids_KT, counts, strict=True):
    counts_C += np.bincount(ids_T, minlength=len(counts_C))


def degenerate(row: TokenRow) -> dict[str, Any] | None:
  """{'id', 'codebook', 'code', 'share'} where one code takes more than MOST_OF_ONE of an utterance's frames: silence,
  noise or a tone throughout, or a codebook that has collapsed. Of the codebook where it is worst."""
  if row.ids.shape[1] < LEAST_FRAMES:
    return None
  found = []
  for codebook, ids_T in enumerate(row.ids):
    codes, counts = np.unique(ids_T, return_counts=True)
    found.append((counts.max() / len(ids_T), -codebook, int(codes[counts.argmax()])))
  share, codebook, code = max(found)
  if share <= MOST_OF_ONE:
    return None
  return {'id': row.id, 'codebook': -codebook, 'code': code, 'share': round(float(share), 4)}


def describe_use(counts: Sequence[np.ndarray]) -> list[dict[str, Any]]:
  """Per codebook: its size, how many codes occur, their share, the perplexity and entropy (bits) of its codes."""
  rows = []
  for counts_C in counts:
    worth = perplexity(counts_C)
    used = int(np.count_nonzero(counts_C))
    rows.append({'size': len(counts_C), 'used': used, 'usage': round(used / len(counts_C), 6),
                 'perplexity': round(worth, 4), 'entropy': round(float(np.log2(worth)), 6)})
  return rows


def warnings(counts: Sequence[np.ndarray]) -> list[str]:
  """A line for each codebook of which hardly any code is used, once there are frames enough to say so."""
  return [f'codebook {k}: {np.count_nonzero(counts_C)} of {len(counts_C)} codes are used; has it collapsed?'
          for k, counts_C in enumerate(counts) if counts_C.sum() >= ENOUGH * len(counts_C)
          and np.count_nonzero(counts_C) < LEAST_USED * len(counts_C)]
