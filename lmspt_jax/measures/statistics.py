"""A number over many utterances: its 95 % interval by the bootstrap, and whether two systems differ.

Utterances are what is drawn: an interval says how far the number would move on other utterances of the same kind, not
on another training run. (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 15.2)

Axes: U utterances, R resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test

RESAMPLES = 1000
PERMUTATIONS = 9999
CONFIDENCE = 0.95
SEED = 0
_AT_ONCE = 1 << 22  # numbers of the permutation test held in memory


@dataclass(frozen=True)
class Figure:
  """One number.

  Attributes:
    value: None where no utterance has it.
    low, high: of the 95 % percentile interval; None for fewer than two utterances.
    count: utterances it was taken over.
    missing: utterances for which it is not defined.
  """

  value: float | None
  low: float | None
  high: float | None
  count: int
  missing: int = 0


@functools.lru_cache(maxsize=4)
def _draws(count: int) -> np.ndarray:
  """How often each of `count` utterances is in each resample, [R, U]. The same for every metric."""
  rng = np.random.default_rng(SEED)
  return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.uint32)


def spread(statistic: Callable[[np.ndarray], float], count: int) -> Figure:
  """Of a statistic of how often each utterance is there, [U], that grows with how many different ones there are: an
  entropy, a number of codes. A resample holds two thirds of them, so the percentiles are moved by what the mean of the
  resamples is off."""
  if not count:
    return Figure(None, None, None, 0)
  value = float(statistic(np.ones(count)))
  if count < 2:
    return Figure(value, None, None, count)
  values_R = np.array([statistic(draws_U) for draws_U in _draws(count)])
  return Figure(value, *_percentiles(values_R - values_R.mean() + value), count)


def _percentiles(values_R: np.ndarray) -> tuple[float, float]:
  tail = 100 * (1 - CONFIDENCE) / 2
  low, high = np.percentile(values_R, [tail, 100 - tail])
  return float(low), float(high)


def ratio(numerators_U: np.ndarray, denominators_U: np.ndarray, missing: int = 0) -> Figure:
  """Sum over sum: a word error rate's errors over words, a mean's values over ones. Denominators are positive."""
  terms_U2 = np.stack([numerators_U, denominators_U], axis=1).astype(np.float64)
  count = len(terms_U2)
  if not count:
    return Figure(None, None, None, 0, missing)
  top, bottom = terms_U2.sum(axis=0)
  low = high = None
  if count > 1:
    blocks = np.array_split(_draws(count), max(1, count // 10_000))  # a part at a time becomes float64
    sums_R2 = np.concatenate([block @ terms_U2 for block in blocks])
    low, high = _percentiles(sums_R2[:, 0] / sums_R2[:, 1])
  return Figure(float(top / bottom), low, high, count, missing)


def mean(values_U: np.ndarray, missing: int = 0) -> Figure:
  return ratio(values_U, np.ones(len(values_U)), missing)


@dataclass(frozen=True)
class Comparison:
  """Two systems on the same utterances.

  Attributes:
    difference: the first's number minus the second's, with its 95 % interval.
    p: of the two-sided paired permutation test that signs of the utterances' differences are chance; None for fewer
      than two utterances. Exact where all signs can be tried.
  """

  difference: Figure
  p: float | None


def compare(first_U: np.ndarray, second_U: np.ndarray, denominators_U: np.ndarray, missing: int = 0) -> Comparison:
  """Of two ratios with the same denominators: the words of the references, or ones."""
  difference_U = np.asarray(first_U, np.float64) - np.asarray(second_U, np.float64)
  figure = ratio(difference_U, denominators_U, missing)
  if figure.count < 2:
    return Comparison(figure, None)
  if not difference_U.any():
    return Comparison(figure, 1.0)
  statistic = lambda x, axis: np.sum(x, axis=axis)
  # Of one sample 'samples' flips signs: of the differences, that is exchange the two systems of an utterance.
  test = permutation_test((difference_U,), statistic, permutation_type='samples', vectorized=True,
                          n_resamples=PERMUTATIONS, batch=max(1, _AT_ONCE // len(difference_U)),
                          rng=np.random.default_rng(SEED))
  return Comparison(figure, float(test.pvalue))
