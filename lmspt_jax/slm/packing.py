"""Codes [K, T] as a language model reads them, and back: flattened, delayed, or the semantic codes alone.

All layouts hold tokens of the shared vocabulary, int32 (vocabulary.py), and each has an inverse that checks what it is
given, as a model's output may be anything. `bos` and `eos` are left to whoever joins utterances.

Axes: K codebooks, T frames, N = T * K tokens, S = T + K - 1 steps.
"""

from __future__ import annotations

import numpy as np

from lmspt_jax.errors import LmsptError
from lmspt_jax.slm.vocabulary import Vocabulary


def flatten(ids_KT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """int32 [N], frame by frame: the tokens of frame 0 in the order of the codebooks, then frame 1, ...

  Raises LmsptError: not as many codebooks as the vocabulary has, or a code that its codebook doesn't have.
  """
  return _tokens(ids_KT, vocabulary).T.reshape(-1)


def unflatten(tokens_N: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """The codes that `flatten` was given, int32 [K, T].

  Raises LmsptError: no whole frames, or a token that is none of its codebook's.
  """
  tokens_N, count = np.asarray(tokens_N), len(vocabulary.codebook_sizes)
  if tokens_N.ndim != 1 or len(tokens_N) % count:
    raise LmsptError(f'tokens of shape {tokens_N.shape}: frames of {count} tokens each are needed; cut the rest off')
  return _codes(tokens_N.reshape(-1, count).T, vocabulary)


def delay(ids_KT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """int32 [K, S]: codebook k is k steps late, so that a step sees the coarser codes of a frame; the rest is `pad`.

  The pattern of MusicGen (arXiv 2306.05284, section 2.2). Raises LmsptError as `flatten`.
  """
  tokens_KT = _tokens(ids_KT, vocabulary)
  count, frames = tokens_KT.shape
  delayed_KS = np.full((count, frames + count - 1), vocabulary.pad, np.int32)
  for k, tokens_T in enumerate(tokens_KT):
    delayed_KS[k, k:k + frames] = tokens_T
  return delayed_KS


def undelay(tokens_KS: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """The codes that `delay` was given, int32 [K, T].

  Raises LmsptError: too few steps, a token that is none of its codebook's, or one where there must be `pad`.
  """
  tokens_KS, count = np.asarray(tokens_KS), len(vocabulary.codebook_sizes)
  if tokens_KS.ndim != 2 or len(tokens_KS) != count or tokens_KS.shape[1] < count:
    raise LmsptError(f'tokens of shape {tokens_KS.shape}: [{count}, at least {count}] are needed')
  frames = tokens_KS.shape[1] - count + 1
  steps_S = np.arange(tokens_KS.shape[1])
  for k, tokens_S in enumerate(tokens_KS):
    outside = (steps_S < k) | (steps_S >= k + frames)
    if (tokens_S[outside] != vocabulary.pad).any():
      raise LmsptError(f'codebook {k}: a token other than pad ({vocabulary.pad}) outside of steps {k} to '
                       f'{k + frames - 1}: not a delayed layout of {frames} frames')
  return _codes(np.stack([tokens_S[k:k + frames] for k, tokens_S in enumerate(tokens_KS)]), vocabulary)


def semantic_only(ids_KT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """int32 [T], the tokens of codebook 0. Raises LmsptError as `flatten`."""
  return _tokens(ids_KT, vocabulary)[0]


def from_semantic_only(tokens_T: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """The semantic codes, int32 [1, T], as `Tokenizer.decode` takes them. Raises LmsptError: another codebook's token."""
  tokens_T = np.asarray(tokens_T)
  if tokens_T.ndim != 1:
    raise LmsptError(f'tokens of shape {tokens_T.shape}: [frames] are needed')
  return _codes(tokens_T[None], vocabulary)


def _tokens(ids_KT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  ids_KT, count = np.asarray(ids_KT), len(vocabulary.codebook_sizes)
  if ids_KT.ndim != 2 or len(ids_KT) != count or ids_KT.dtype.kind not in 'iu':
    raise LmsptError(f'ids {ids_KT.dtype} of shape {ids_KT.shape}: whole numbers [{count}, frames] are needed')
  ids_KT = ids_KT.astype(np.int64)
  _check(ids_KT, np.zeros(count, np.int64), vocabulary, 'ids')
  return (ids_KT + np.array(vocabulary.offsets)[:, None]).astype(np.int32)


def _codes(tokens_KT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  if tokens_KT.dtype.kind not in 'iu':
    raise LmsptError(f'tokens of type {tokens_KT.dtype}: whole numbers are needed')
  tokens_KT, offsets_K = tokens_KT.astype(np.int64), np.array(vocabulary.offsets)[:len(tokens_KT)]
  _check(tokens_KT, offsets_K, vocabulary, 'tokens')
  return (tokens_KT - offsets_K[:, None]).astype(np.int32)


def _check(values_KT: np.ndarray, first_K: np.ndarray, vocabulary: Vocabulary, what: str) -> None:
  for k, (values_T, first, size) in enumerate(zip(values_KT, first_K, vocabulary.codebook_sizes, strict=False)):
    wrong_T = (values_T < first) | (values_T >= first + size)
    if wrong_T.any():
      frame = int(np.flatnonzero(wrong_T)[0])
      raise LmsptError(f'{what}: {values_T[frame]} in frame {frame} of codebook {k}, which has {first} to '
                       f'{first + size - 1}')
