"""What hosts tell each other: texts through the coordination service, arrays through the devices."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the service's client has no public face
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmspt_jax.errors import LmsptError

_calls = itertools.count()


def is_writer() -> bool:
  """Whether this host writes the run's files."""
  return jax.process_index() == 0


def gather(name: str, text: str) -> list[str]:
  """Every host's text, host by host. For what is rare: all hosts call it, in the same order, and wait for the last."""
  client = distributed.global_state.client
  if client is None:
    return [text]
  folder = f'lmspt/gather/{next(_calls)}_{name}'
  client.key_value_set(f'{folder}/{jax.process_index()}', text)
  return [_wait_for(client, f'{folder}/{host}') for host in range(jax.process_count())]


def _wait_for(client: Any, key: str) -> str:
  while True:  # in short waits, between which Python looks for signals
    try:
      return client.blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def told_by_writer(name: str, value: Any) -> Any:
  """What host 0 gives here, as JSON carries it (NaN too). As `gather`, all hosts call it and wait for host 0."""
  return json.loads(gather(name, json.dumps(value) if is_writer() else '')[0])


def check_same(name: str, text: str, way_out: str) -> None:
  """Raises LmsptError on every host unless all have the same text under this name."""
  texts = gather('same', text)
  other = next((host for host, found in enumerate(texts) if found != texts[0]), None)
  if other is not None:
    raise LmsptError(f'{name}: not the same on host {other} as on host 0; {way_out}')


class Exchange:
  """Small numpy arrays of every host for every host, as part of the devices' work.

  `send` before a step is dispatched and `receive` after: the arrays arrive while the step before is being finished,
  so that the devices are never without work. All hosts send the same names, shapes and dtypes.
  """

  def __init__(self, mesh: Mesh):
    self._devices = list(mesh.devices.flat)
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._layout: tuple | None = None
    self._sent: Any = None

  def send(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Starts the exchange; returns at once."""
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    layout = tuple((name, value.shape, value.dtype.str) for name, value in arrays.items())
    if layout != self._layout:
      check_same('mesh', repr(layout), 'give each host as many rows of the batch as the others')
      self._layout = layout
    if jax.process_count() == 1:
      self._sent = {name: value[None] for name, value in arrays.items()}
      return
    data = np.frombuffer(b''.join(value.tobytes() for value in arrays.values()), np.uint8)
    # One row per device of the mesh; this host's bytes are laid over its own, as int32: 64-bit types are off in JAX.
    mine = [row for row, device in enumerate(self._devices) if device.process_index == jax.process_index()]
    width = -(-len(data) // (4 * len(mine)))
    rows = np.pad(data, (0, 4 * width * len(mine) - len(data))).view(np.int32).reshape(len(mine), 1, width)
    self._sent = self._gather(jax.make_array_from_callback(
        (len(self._devices), width), self._sharding, lambda index: rows[mine.index(index[0].start or 0)]))

  def receive(self) -> dict[str, np.ndarray]:
    """What was sent last, [hosts, ...] each."""
    sent, self._sent = self._sent, None
    if jax.process_count() == 1:
      return sent
    rows = np.asarray(sent)
    owners = np.array([device.process_index for device in self._devices])
    data = np.stack([np.ascontiguousarray(rows[owners == host]).view(np.uint8).reshape(-1)
                     for host in range(jax.process_count())])
    found, start = {}, 0
    for name, shape, dtype in self._layout:
      size = int(np.prod(shape)) * np.dtype(dtype).itemsize
      found[name] = np.ascontiguousarray(data[:, start:start + size]).view(dtype).reshape(len(data), *shape)
      start += size
    return found


def whole_batch(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """[hosts, local rows, ...] as [rows, ...] in the order of `index`; what several hosts hold is taken once."""
  flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in rows.items()}
  _, first = np.unique(flat['index'], return_index=True)
  return {name: value[first] for name, value in flat.items()}
