"""Device mesh data x fsdp x tensor, and how arrays lie on it.

The batch is split over data x fsdp. Where a parameter, its moments in the optimizer and its moving average lie is
said by rules, 'REGEX = AXES': the first one whose expression is found in the array's path decides, one axis of the
array after the other ('-' leaves one whole, 'fsdp+tensor' splits one over both), and a path that no rule knows is an
error. A size that the devices do not divide stays whole; the parameter table says so.

Codec and discriminators are small against what they compute, so they are split in storage alone: the train step
gathers their parameters once (`gathered`), works on data x fsdp x tensor shares of the batch (`spread`), and its
gradients return to the shards. The teacher is large, so it is split in use as well: its projections over `tensor`
(arXiv 1909.08053, section 3), and what is left over `fsdp`, gathered layer by layer (ZeRO, arXiv 1910.02054).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmspt_jax.config import ExperimentConfig
from lmspt_jax.errors import LmsptError

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))
SPREAD = PartitionSpec(AXES)

# Kernels are [taps, in, out], of discriminators [rows, columns, in, out]; the teacher's blocks are stacked, their
# arrays begin with an axis of layers.
DEFAULT_RULES = (
    r'^teacher/blocks/.*(query|key|value|up)/kernel$ = -, fsdp, tensor',
    r'^teacher/blocks/.*(query|value|up)/bias$ = -, tensor',
    r'^teacher/blocks/.*(out|down)/kernel$ = -, tensor, fsdp',
    r'^teacher/conv\d/kernel$ = -, -, fsdp',
    r'^teacher/(positions|.*(bias|scale))$ =',
    r'/discriminators/.*/weight_v$ = -, -, -, fsdp+tensor',
    r'/weight_v$ = -, -, fsdp+tensor',
    r'/distillation/kernel$ = -, fsdp+tensor',
    r'/(weight_g|bias|alpha)$ =',
    r'/(codebook|counts|sums|mass)$ =',
    r'(^|/)(step|count|skipped_in_row)$ =',
)


def make_mesh(config: ExperimentConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices of all hosts, or over those given.

  Raises:
    LmsptError: the sizes don't fit the number of devices, or the batch is not divisible by it.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
    raise LmsptError(f'config field mesh = {sizes}: sizes are positive, and one of them may be -1')
  if free and fixed <= count and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if math.prod(sizes.values()) != count:
    raise LmsptError(f'config field mesh = {sizes}: there are {count} devices; the product of the sizes must be that')
  whole = count * config.compute.accumulation
  if config.data.batch_size % whole:
    parts = f' times compute.accumulation = {config.compute.accumulation}' if whole > count else ''
    raise LmsptError(f'config field data.batch_size = {config.data.batch_size}: not divisible by the {count} devices '
                     f'of the mesh{parts}; use {max(1, config.data.batch_size // whole) * whole}')
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


# -------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
  """`text` as it was written; arrays whose path `pattern` is found in are split so: mesh axes for each array axis."""

  text: str
  pattern: re.Pattern[str]
  axes: tuple[tuple[str, ...], ...]

  def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where an array lies; sizes that the devices do not divide stay whole. Raises LmsptError for too many axes."""
    if len(self.axes) > len(shape):
      raise LmsptError(f'mesh rule {self.text!r}: {path} has the shape {shape}, fewer axes than the rule')
    entries = [axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
               for axes, size in zip(self.axes, shape, strict=False)]
    while entries and not entries[-1]:
      entries.pop()
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in entries))


def parse_rule(text: str) -> Rule:
  """'REGEX = AXES', e.g. 'teacher/.*/kernel$ = -, fsdp, tensor'. Raises LmsptError naming what can't be read."""
  pattern, equals, axes = text.rpartition('=')
  if not equals:
    raise LmsptError(f"config field mesh.rules: {text!r} has no '='; write 'REGEX = AXES', e.g. '/kernel$ = -, fsdp'")
  try:
    compiled = re.compile(pattern.strip())
  except re.error as error:
    raise LmsptError(f'config field mesh.rules: {pattern.strip()!r} is no regular expression ({error})') from error
  parts = [part.strip() for part in axes.split(',')] if axes.strip() else []
  entries = tuple(() if part == '-' else tuple(name.strip() for name in part.split('+')) for part in parts)
  used = [name for entry in entries for name in entry]
  if any(name not in AXES for name in used) or len(set(used)) < len(used):
    raise LmsptError(f"config field mesh.rules: {text!r}: axes are {', '.join(AXES)} or '-', each once at most")
  return Rule(text, compiled, entries)


@dataclass(frozen=True)
class Placed:
  """An array and where it lies: `path` in the state, `rule` that decided, `bytes_per_device`."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  rule: Rule
  spec: PartitionSpec
  bytes_per_device: int


class Placement:
  """The rules of a config on a mesh."""

  def __init__(self, config: ExperimentConfig, mesh: Mesh):
    """Raises LmsptError for rules that can't be read."""
    self.mesh = mesh
    self.rules = tuple(parse_rule(text) for text in (*config.mesh.rules, *DEFAULT_RULES))

  def table(self, tree: Any) -> list[Placed]:
    """A row per array of a train state or of {'teacher': parameters}. Raises LmsptError for a path without a rule."""
    return [self._place(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

  def shardings(self, tree: Any) -> Any:
    """A sharding for every array of the same trees."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(self.mesh, self._place(_name(path), leaf).spec), tree)

  def teacher(self, params: Any) -> Any:
    """`shardings` of a teacher's parameters."""
    return self.shardings({'teacher': params})['teacher']

  def _place(self, path: str, leaf: Any) -> Placed:
    rule = next((rule for rule in self.rules if rule.pattern.search(path)), None)
    if rule is None:
      raise LmsptError(f'mesh.rules: no rule for {path} {tuple(leaf.shape)}; add one, e.g. '
                       f"--config.mesh.rules=\"('{re.escape(path)}$ =',)\"")
    spec = rule.spec(path, leaf.shape, self.mesh)
    shard = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
    return Placed(path, tuple(leaf.shape), str(leaf.dtype), rule, spec, math.prod(shard) * leaf.dtype.itemsize)


def _name(path: tuple[Any, ...]) -> str:
  return '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path)


def _spec_text(spec: PartitionSpec) -> str:
  return ', '.join('-' if entry is None else entry if isinstance(entry, str) else '+'.join(entry)
                   for entry in spec) or 'whole'


def parameter_table(rows: list[Placed]) -> str:
  """A line per array: path, shape, dtype, split, bytes per device; then the sum."""
  width = max(len(row.path) for row in rows)
  lines = [f'{row.path:<{width}} {"x".join(map(str, row.shape)):>18} {row.dtype:>8} {_spec_text(row.spec):>18} '
           f'{row.bytes_per_device:>13,}' for row in rows]
  total = sum(row.bytes_per_device for row in rows)
  return '\n'.join([*lines, f'{"total bytes per device":<{width}} {"":>18} {"":>8} {"":>18} {total:>13,}', ''])


def parameter_summary(rows: list[Placed]) -> str:
  """A line per part of the state and split: arrays, numbers in them, bytes per device."""
  groups: dict[tuple[str, str], list[Placed]] = {}
  for row in rows:
    groups.setdefault((row.path.partition('/')[0], _spec_text(row.spec)), []).append(row)
  lines = [f'{"part":<18} {"split":<20} {"arrays":>7} {"numbers":>14} {"bytes per device":>17}']
  for (part, split), found in groups.items():
    numbers = sum(math.prod(row.shape) for row in found)
    here = sum(row.bytes_per_device for row in found)
    lines.append(f'{part:<18} {split:<20} {len(found):>7} {numbers:>14,} {here:>17,}')
  total = sum(row.bytes_per_device for row in rows)
  return '\n'.join([*lines, f'{"total":<18} {"":<20} {len(rows):>7} {"":>14} {total:>17,}'])


# -------------------------------------------------------------------- inside the train step


def constrain(tree: Any, spec: PartitionSpec) -> Any:
  """The same values, laid out so on the mesh that is set (`jax.set_mesh`); without one, as they are."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def over_fsdp() -> bool:
  """Whether the mesh that is set splits parameters over `fsdp`."""
  return jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) > 1


def gathered(params: Any) -> Any:
  """Whole parameters on every device; their gradients are summed back into the shards."""
  return constrain(params, PartitionSpec())


# -------------------------------------------------------------------- the batch


@functools.lru_cache(maxsize=8)  # asked for with every batch
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Global rows of a batch that this host's devices hold, read-only ascending int64.

  Devices are laid out for the network, not by host, so they need not be neighbours; with a tensor axis across hosts,
  several hosts hold the same.
  """
  sharding = NamedSharding(mesh, BATCH)
  held = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held]))
  rows.flags.writeable = False  # the cache hands the same array to everyone
  return rows


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
  """This host's rows (`local_rows`) to its devices; together the hosts' rows are the global batch."""
  sharding, rows = NamedSharding(mesh, BATCH), local_rows(mesh, batch_size)

  def place(values: np.ndarray) -> jax.Array:
    pick = lambda index: values[np.searchsorted(rows, np.arange(batch_size)[index[0]])]
    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, pick)

  return {key: place(values) for key, values in batch.items()}
