"""Pitch and voicing of a decoded recording against its original's.

Package `pyworld`: DIO refined by StoneMask (Morise et al., IEICE Trans. Inf. & Syst. E99-D(7), 2016) with its own
settings, 71 to 800 Hz and a frame every 5 ms. (Harvest, its newer one, takes ten times as long.)
"""

from __future__ import annotations

import numpy as np
import pyworld

from lmspt_jax.measures.measure import RATE
from lmspt_jax.measures.undefined import Undefined


def pitch_track(audio_N: np.ndarray) -> np.ndarray:
  """Hz, [frames], 0 where unvoiced. float [N] at 16 kHz."""
  audio_N = np.ascontiguousarray(audio_N, np.float64)
  return pyworld.stonemask(audio_N, *pyworld.dio(audio_N, RATE), RATE)


def voicing_f1(original_T: np.ndarray, decoded_T: np.ndarray) -> float:
  """F1 of voiced frames of a pitch track, the original's being the truth. Raises Undefined without any."""
  truth_T, found_T = original_T > 0, decoded_T > 0
  if not truth_T.any():
    raise Undefined('no voiced speech in the original')
  return float(2 * np.sum(truth_T & found_T) / (np.sum(truth_T) + np.sum(found_T)))


def pitch_error(original_T: np.ndarray, decoded_T: np.ndarray) -> float:
  """Mean distance in cents (1200 an octave) over frames that are voiced in both. Raises Undefined without any."""
  both_T = (original_T > 0) & (decoded_T > 0)
  if not both_T.any():
    raise Undefined('no frame is voiced in both recordings')
  return float(np.mean(np.abs(1200 * np.log2(decoded_T[both_T] / original_T[both_T]))))
