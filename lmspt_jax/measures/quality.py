"""DNSMOS: quality as listeners would score it, without the original (arXiv 2110.01763). Package `speechmos`.

It is blind to missing bandwidth: the same speech at 8 kHz scores no lower.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnxruntime
from speechmos import dnsmos

from lmspt_jax.measures.measure import RATE
from lmspt_jax.measures.undefined import Undefined

_SILENCE = 1e-4  # a peak below -80 dBFS
# The package's names to those here: overall, speech, background (P.835), and overall (P.808).
NAMES = {'ovrl_mos': 'dnsmos', 'sig_mos': 'dnsmos_speech', 'bak_mos': 'dnsmos_background', 'p808_mos': 'dnsmos_p808'}


def dnsmos_scores(audio_N: np.ndarray) -> dict[str, float]:
  """Means over 9 s windows; shorter recordings are repeated up to that. float [N] at 16 kHz, clipped to [-1, 1].

  Raises Undefined for silence.
  """
  if not len(audio_N) or np.abs(audio_N).max() < _SILENCE:
    raise Undefined('DNSMOS: silent')
  found = _scorer()(np.clip(np.asarray(audio_N, np.float32), -1, 1), RATE, False)
  return {ours: float(found[theirs]) for theirs, ours in NAMES.items()}


@functools.cache
def _scorer() -> dnsmos.DNSMOS:
  """The package's, on one thread: there is a process a core (`measure.Pool`), and its threads wait by spinning."""
  paths = [str(Path(dnsmos.__file__).parent / 'dnsmos_models' / name) for name in ('sig_bak_ovr.onnx', 'model_v8.onnx')]
  scorer, options = dnsmos.DNSMOS(*paths), onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  scorer.onnx_sess, scorer.p808_onnx_sess = (
      onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider']) for path in paths)
  return scorer
