"""The metrics by name: what they are called, which way is better, what they are taken over, what they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmspt_jax.errors import LmsptError


@dataclass(frozen=True)
class Metric:
  """
  Attributes:
    label: in tables.
    unit: '' for a plain number.
    better: 'higher' or 'lower'.
    over: a row's numerator and denominator, whose sums' ratio the number is; () for the mean of its values.
    needs_original: whether it compares with the original, which then has none itself.
    packages: import names, of the extra [evaluate].
  """

  label: str
  unit: str
  better: str
  over: tuple[str, ...] = ()
  needs_original: bool = True
  packages: tuple[str, ...] = ()

  def terms(self, name: str, values: Mapping[str, float]) -> tuple[float, float] | None:
    """What an utterance with these values adds to numerator and denominator; None where it is missing."""
    if name not in values:
      return None
    return tuple(values[part] for part in self.over) if self.over else (values[name], 1.0)


_WORDS = ('jiwer', 'tokenizers', 'whisper_normalizer')
_SIGNAL = ('pesq', 'pystoi')
_DNSMOS = ('librosa', 'onnxruntime', 'requests', 'speechmos')

METRICS = {
  'wer': Metric('word error rate', '', 'lower', ('word_errors', 'words'), needs_original=False, packages=_WORDS),
  'cer': Metric('character error rate', '', 'lower', ('character_errors', 'characters'), needs_original=False,
                packages=_WORDS),
  'pesq': Metric('PESQ, wide band', 'MOS-LQO', 'higher', packages=_SIGNAL),
  'stoi': Metric('STOI', '', 'higher', packages=_SIGNAL),
  'si_sdr': Metric('SI-SDR', 'dB', 'higher', packages=_SIGNAL),
  'mel_distance': Metric('mel distance', '', 'lower'),
  'stft_distance': Metric('STFT distance', '', 'lower'),
  'dnsmos': Metric('DNSMOS, overall', 'MOS', 'higher', needs_original=False, packages=_DNSMOS),
  'dnsmos_speech': Metric('DNSMOS, speech', 'MOS', 'higher', needs_original=False, packages=_DNSMOS),
  'dnsmos_background': Metric('DNSMOS, background', 'MOS', 'higher', needs_original=False, packages=_DNSMOS),
  'dnsmos_p808': Metric('DNSMOS, P.808', 'MOS', 'higher', needs_original=False, packages=_DNSMOS),
  'speaker_similarity': Metric('speaker similarity', 'cosine', 'higher', packages=('librosa',)),
  'pitch_error': Metric('pitch error', 'cents', 'lower', packages=('pyworld',)),
  'voicing_f1': Metric('voicing F1', '', 'higher', packages=('pyworld',)),
  'teacher_distance': Metric('distance in the teacher', '', 'lower'),
}


def check_packages(names: Iterable[str], also: Iterable[str] = ()) -> None:
  """Raises LmsptError naming what isn't installed of what these metrics, and `also`, need; before any work is done."""
  needed = {package for name in names for package in METRICS[name].packages} | set(also)
  missing = [package for package in sorted(needed) if importlib.util.find_spec(package) is None]
  if missing:
    raise LmsptError(f"evaluation needs {', '.join(missing)}: pip install 'lmspt_jax[evaluate]'")
