"""What the codes of a corpus look like: use, entropy, bits, repeats and n-grams, per codebook.

Entropies are those of the counts (plug-in), in bits. They are too low where the corpus is short beside the codebook:
compare models on the same utterances.

Axes: U utterances, K codebooks, T frames of an utterance, M frames of all utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmspt_jax.measures.statistics import ratio, spread

NGRAMS = (2, 3)


def codebook_statistics(ids: Sequence[np.ndarray], sizes: Sequence[int], frame_rate: float) -> list[dict[str, Any]]:
  """One dictionary of figures per codebook.

  Args:
    ids: of every utterance, int [K, T].
    sizes: of the codebooks.
    frame_rate: frames a second.

  Returns:
    usage (share of the codes that are drawn), perplexity, entropy (bits a frame), bitrate (entropy times frames a
    second), repeat_rate (share of frames that have the code of the frame before), and for n-grams the distinct ones
    (distinct_2) and the bits that one more code adds (entropy_2: of a code given the one before); and plain numbers:
    size, frames, nominal_bitrate.
  """
  return [_statistics([ids_KT[k] for ids_KT in ids], size, frame_rate) for k, size in enumerate(sizes)]


def _statistics(ids: Sequence[np.ndarray], size: int, frame_rate: float) -> dict[str, Any]:
  frames_U = np.array([len(ids_T) for ids_T in ids])
  lengths = {n: np.maximum(frames_U - n + 1, 0) for n in (1, *NGRAMS)}
  grams = {n: _grams(ids, n) for n in (1, *NGRAMS)}
  owner = {n: np.repeat(np.arange(len(ids)), lengths[n]) for n in (1, *NGRAMS)}

  def counts(n: int, draws_U: np.ndarray) -> np.ndarray:
    found = np.bincount(grams[n], weights=draws_U[owner[n]])
    return found[found > 0]

  def figure(statistic: Callable[[np.ndarray], float]) -> dict[str, Any]:
    return vars(spread(statistic, len(ids)))

  entropy = lambda n, draws_U: _entropy(counts(n, draws_U))
  repeats_U = [int(np.sum(ids_T[1:] == ids_T[:-1])) for ids_T in ids]
  found = {
      'size': size, 'frames': int(frames_U.sum()), 'nominal_bitrate': float(np.log2(size) * frame_rate),
      'usage': figure(lambda draws_U: len(counts(1, draws_U)) / size),
      'perplexity': figure(lambda draws_U: 2 ** entropy(1, draws_U)),
      'entropy': figure(lambda draws_U: entropy(1, draws_U)),
      'bitrate': figure(lambda draws_U: entropy(1, draws_U) * frame_rate),
      'repeat_rate': vars(ratio(np.array(repeats_U)[lengths[2] > 0], lengths[2][lengths[2] > 0]))}
  for n in NGRAMS:
    found[f'distinct_{n}'] = figure(lambda draws_U, n=n: len(counts(n, draws_U)))
    found[f'entropy_{n}'] = figure(lambda draws_U, n=n: entropy(n, draws_U) - entropy(n - 1, draws_U))
  return found


def _grams(ids: Sequence[np.ndarray], n: int) -> np.ndarray:
  """Every run of n codes inside an utterance as a small number, int64 [M]; equal runs, equal numbers."""
  runs = [np.lib.stride_tricks.sliding_window_view(ids_T, n) for ids_T in ids if len(ids_T) >= n]
  if not runs:
    return np.zeros(0, np.int64)
  return np.unique(np.concatenate(runs), axis=0, return_inverse=True)[1].reshape(-1)


def _entropy(counts: np.ndarray) -> float:
  """Bits."""
  if not len(counts):
    return 0.0
  p = counts / counts.sum()
  return float(-np.sum(p * np.log2(p)))
