"""How near a decoded recording is to its original, sample for sample: PESQ, STOI, SI-SDR. float [N] at 16 kHz.

Packages `pesq` (ITU-T P.862.2, wide band) and `pystoi` (Taal et al., IEEE TASLP 19(7), 2011); SI-SDR as in Le Roux et
al., arXiv 1811.02508.
"""

from __future__ import annotations

import warnings

import numpy as np
from pesq import PesqError, pesq
from pystoi import stoi

from lmspt_jax.measures.measure import RATE
from lmspt_jax.measures.undefined import Undefined

MAX_PESQ = 30  # seconds: P.862 is for no longer ones, and its code has room for 50 utterances
MOST_SI_SDR = 100.0  # dB: what is nearer is float32's rounding


def _need_sound(*recordings: np.ndarray) -> None:
  if not all(np.any(audio_N != audio_N[:1]) for audio_N in recordings):
    raise Undefined('one of the recordings is silent')


def pesq_wide_band(original_N: np.ndarray, decoded_N: np.ndarray) -> float:
  """MOS-LQO, 1.0 to 4.64. Raises Undefined for what P.862 hears no speech in, and for over 30 s."""
  if len(original_N) > MAX_PESQ * RATE:
    raise Undefined(f'longer than the {MAX_PESQ} s that PESQ is for')
  _need_sound(original_N, decoded_N)
  try:
    return float(pesq(RATE, original_N, decoded_N, 'wb'))
  except PesqError as error:
    text = error.args[0] if error.args else type(error).__name__
    raise Undefined(f'PESQ: {text.decode() if isinstance(text, bytes) else text}') from error


def short_time_intelligibility(original_N: np.ndarray, decoded_N: np.ndarray) -> float:
  """STOI, about 0 to 1. Raises Undefined for less than 0.4 s of speech and for silence."""
  _need_sound(original_N, decoded_N)
  with warnings.catch_warnings():
    warnings.simplefilter('error', RuntimeWarning)  # how the package says that it could not measure
    try:
      return float(stoi(original_N, decoded_N, RATE))
    except RuntimeWarning as error:
      raise Undefined(f'STOI: {str(error).partition(".")[0]}') from error


def si_sdr(original_N: np.ndarray, decoded_N: np.ndarray) -> float:
  """Scale-invariant signal-to-distortion ratio in dB, at most 100. Raises Undefined for silence."""
  _need_sound(original_N, decoded_N)
  target_N = np.asarray(original_N, np.float64) - np.mean(original_N, dtype=np.float64)
  estimate_N = np.asarray(decoded_N, np.float64) - np.mean(decoded_N, dtype=np.float64)
  part_N = target_N * (estimate_N @ target_N / (target_N @ target_N))
  signal, noise = part_N @ part_N, np.sum((estimate_N - part_N) ** 2)
  least = 10 ** (-MOST_SI_SDR / 10)
  return float(10 * np.log10(max(signal, least * noise) / max(noise, least * signal)))
