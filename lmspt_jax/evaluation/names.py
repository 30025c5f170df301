"""The metrics by name: what they are called, which way is better, and what they are taken over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
  """
  Attributes:
    label: in tables.
    unit: '' for a plain number.
    better: 'higher' or 'lower'.
    over: a row's numerator and denominator, whose sums' ratio the number is; () for the mean of its values.
    needs_original: whether it compares with the original, which then has none itself.
  """

  label: str
  unit: str
  better: str
  over: tuple[str, ...] = ()
  needs_original: bool = True


METRICS = {
  'wer': Metric('word error rate', '', 'lower', ('word_errors', 'words'), needs_original=False),
  'cer': Metric('character error rate', '', 'lower', ('character_errors', 'characters'), needs_original=False),
  'pesq': Metric('PESQ, wide band', 'MOS-LQO', 'higher'),
  'stoi': Metric('STOI', '', 'higher'),
  'si_sdr': Metric('SI-SDR', 'dB', 'higher'),
  'mel_distance': Metric('mel distance', '', 'lower'),
  'stft_distance': Metric('STFT distance', '', 'lower'),
  'dnsmos': Metric('DNSMOS, overall', 'MOS', 'higher', needs_original=False),
  'dnsmos_speech': Metric('DNSMOS, speech', 'MOS', 'higher', needs_original=False),
  'dnsmos_background': Metric('DNSMOS, background', 'MOS', 'higher', needs_original=False),
  'dnsmos_p808': Metric('DNSMOS, P.808', 'MOS', 'higher', needs_original=False),
  'speaker_similarity': Metric('speaker similarity', 'cosine', 'higher'),
  'pitch_error': Metric('pitch error', 'cents', 'lower'),
  'voicing_f1': Metric('voicing F1', '', 'higher'),
  'teacher_distance': Metric('distance in the teacher', '', 'lower'),
}
