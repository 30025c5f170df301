"""Device mesh and how arrays lie on it.

The batch is split over both axes, `data` and `fsdp`. Parameters and optimizer states are split over `fsdp` along
their largest axis that it divides, and replicated over `data`; what it divides nowhere is replicated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmspt_jax.config import MeshConfig
from lmspt_jax.errors import LmsptError

BATCH = PartitionSpec(('data', 'fsdp'))


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
  """The mesh over all devices of all hosts.

  Raises:
    LmsptError: the sizes don't fit the number of devices, or the batch is not divisible by it.
  """
  count = jax.device_count()
  sizes = {'data': config.data, 'fsdp': config.fsdp}
  free = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
    raise LmsptError(f'config field mesh = {sizes}: sizes are positive, and one of them may be -1')
  if free and fixed <= count and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if int(np.prod(list(sizes.values()))) != count:
    raise LmsptError(f'config field mesh = {sizes}: there are {count} devices; the product of the sizes must be that')
  if batch_size % count:
    raise LmsptError(f'config field data.batch_size = {batch_size}: not divisible by the {count} devices of the mesh; '
                     f'use {max(1, batch_size // count) * count}')
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The largest axis that `fsdp` divides is split; ties go to the last one. Vectors stay whole."""
  axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or len(shape) < 2 or not axes:
    return PartitionSpec()
  widest = max(axes, key=lambda axis: (shape[axis], axis))
  return PartitionSpec(*[None] * widest, 'fsdp')


def state_shardings(abstract: Any, mesh: Mesh) -> Any:
  """A sharding for every array of a pytree of shapes (train state, teacher parameters)."""
  return jax.tree.map(lambda x: NamedSharding(mesh, parameter_spec(x.shape, mesh.shape['fsdp'])), abstract)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows to the devices; together the hosts' rows are the global batch."""
  sharding = NamedSharding(mesh, BATCH)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def parameter_table(tree: Any, mesh: Mesh) -> str:
  """A line per array: path, shape, dtype, split, bytes per device."""
  rows = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    spec = parameter_spec(leaf.shape, mesh.shape['fsdp'])
    split = mesh.shape['fsdp'] if 'fsdp' in tuple(spec) else 1
    name = '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path)
    rows.append((name, str(leaf.shape), str(leaf.dtype), str(tuple(spec)), leaf.size * leaf.dtype.itemsize // split))
  total = sum(row[-1] for row in rows)
  lines = [f'{n:<78} {s:>22} {d:>8} {p:>22} {b:>12,}' for n, s, d, p, b in rows]
  return '\n'.join([*lines, f'{"total bytes per device":<78} {"":>22} {"":>8} {"":>22} {total:>12,}', ''])
