"""What a TPU chip can do, as its maker says, and what a slice of them is called.

`peak_flops` is bfloat16. `ici_bytes_per_second` is what one chip can send over all its links to its neighbours at
once: half of the documents' bidirectional figure; for v4, whose page has none, its share of the pod's all-reduce
bandwidth. Read in November 2026 from the pages named here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lmspt_jax.errors import LmsptError


@dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    name: as in a topology, e.g. 'v5e'.
    device_kind: what `jax.Device.device_kind` says of it.
    peak_flops: bfloat16 operations a second.
    hbm_bytes: memory.
    usable_bytes: what the compiler (libtpu 0.0.52) says a program may use of it.
    hbm_bytes_per_second: from and to that memory.
    ici_bytes_per_second: that one chip sends to its neighbours over all links.
    cores: TensorCores; JAX sees the chip as one device.
    chips_per_host: of a slice of several hosts.
    dimensions: of its torus.
    example: a topology.
    source: where the figures are from.
  """

  name: str
  device_kind: str
  peak_flops: float
  hbm_bytes: int
  usable_bytes: int
  hbm_bytes_per_second: float
  ici_bytes_per_second: float
  cores: int
  chips_per_host: int
  dimensions: int
  example: str
  source: str


_GIB = 2**30

CHIPS = {chip.name: chip for chip in (
  Chip('v4', 'TPU v4', 275e12, 32 * _GIB, round(30.75 * _GIB), 1200e9, 268e9, cores=2, chips_per_host=4, dimensions=3,
       example='v4:2x2x4', source='https://cloud.google.com/tpu/docs/v4'),
  Chip('v5e', 'TPU v5 lite', 197e12, 16 * _GIB, round(15.75 * _GIB), 819e9, 200e9, cores=1, chips_per_host=4,
       dimensions=2, example='v5e:4x4', source='https://cloud.google.com/tpu/docs/v5e'),
  Chip('v5p', 'TPU v5', 459e12, 95 * _GIB, round(95.73 * _GIB), 2765e9, 600e9, cores=2, chips_per_host=4, dimensions=3,
       example='v5p:2x2x4', source='https://cloud.google.com/tpu/docs/v5p'),
  Chip('v6e', 'TPU v6 lite', 918e12, 32 * _GIB, round(31.24 * _GIB), 1600e9, 400e9, cores=1, chips_per_host=4,
       dimensions=2, example='v6e:4x4', source='https://cloud.google.com/tpu/docs/v6e'),
)}
_KINDS = {chip.device_kind: chip for chip in CHIPS.values()} | {
  f'TPU {name}': CHIPS[name] for name in ('v5e', 'v5p', 'v6e')}  # as other versions of libtpu say


@dataclass(frozen=True)
class Topology:
  """A slice: so many chips along each axis."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    """As libtpu takes it, e.g. 'v5e:4x4'."""
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def hosts(self) -> int:
    return -(-self.chips // self.chip.chips_per_host)


def parse_topology(text: str) -> Topology:
  """'v5e:4x4' (also 'v5e 4x4', 'v5e-4x4'), one number for each dimension of the chip's torus.

  Raises LmsptError, naming what is known.
  """
  found = re.fullmatch(r'\s*(\w+?)\s*[:\s_-]\s*(\d+(?:x\d+)*)\s*', text)
  examples = ', '.join(chip.example for chip in CHIPS.values())
  if found is None or found[1].lower() not in CHIPS:
    raise LmsptError(f'topology {text!r}: use CHIP:SHAPE; known are {examples} and other shapes of these chips')
  chip = CHIPS[found[1].lower()]
  shape = tuple(map(int, found[2].split('x')))
  if len(shape) != chip.dimensions or 0 in shape:
    raise LmsptError(f'topology {text!r}: {chip.name} slices have {chip.dimensions} sizes, e.g. {chip.example}')
  return Topology(chip, shape)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that a device is; None for a CPU, a GPU and chips that are not in the table."""
  return _KINDS.get(device_kind)
