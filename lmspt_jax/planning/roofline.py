"""The least time a step can take on a chip: the longest of computing, moving memory and sending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmspt_jax.chips import Chip


@dataclass(frozen=True)
class Roofline:
  """Counts of one step, and the chip they are held against.

  Attributes:
    chip, chips: which, and how many.
    flops: of one chip.
    passes: how often the bfloat16 unit does an operation (above 1 where float32 products are asked for).
    bytes_moved: read and written in one chip's memory.
    bytes_sent: by one chip to others.
    model_flops: of all chips, nothing counted twice.
    audio_seconds: that a step learns from.
  """

  chip: Chip
  chips: int
  flops: float
  passes: float
  bytes_moved: float
  bytes_sent: float
  model_flops: float
  audio_seconds: float

  @property
  def seconds(self) -> dict[str, float]:
    """Each resource alone, at its published peak."""
    return {
      'compute': self.flops * self.passes / self.chip.peak_flops,
      'memory': self.bytes_moved / self.chip.hbm_bytes_per_second,
      'network': self.bytes_sent / self.chip.ici_bytes_per_second}

  @property
  def step_seconds(self) -> float:
    """If the three overlap wholly."""
    return max(self.seconds.values())

  @property
  def bound(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  @property
  def utilisation(self) -> float:
    """Model FLOPs over what the chips could do in that time: an upper bound of what a run can reach."""
    return self.model_flops / (self.chips * self.chip.peak_flops * self.step_seconds)

  def figures(self) -> dict[str, Any]:
    """All of it under plain names."""
    return {
      **{f'{name}_seconds': value for name, value in self.seconds.items()}, 'step_seconds': self.step_seconds,
      'bound': self.bound, 'utilisation': self.utilisation,
      'audio_hours_per_day': self.audio_seconds / self.step_seconds * 24}
