"""Which of how many processes this is, and where process 0 listens: as given, or as the environment says."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
from jax._src import clusters  # JAX's detection of Slurm and TPU slices has no public face

from lmspt_jax.errors import LmsptError

_VARIABLES = {'--coordinator': 'JAX_COORDINATOR_ADDRESS', '--num-processes': 'JAX_NUM_PROCESSES',
              '--process-id': 'JAX_PROCESS_ID'}


@dataclass(frozen=True)
class Place:
  """What `jax.distributed.initialize` needs: all three, or the name of one of its detections."""

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  detection: str = 'deactivate'


def find_place(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
  """None where the process is alone. Raises LmsptError where values are missing or wrong."""
  given = dict(zip(_VARIABLES, (coordinator, num_processes, process_id), strict=True))
  values = {flag: os.environ.get(name) or None if given[flag] is None else given[flag]
            for flag, name in _VARIABLES.items()}
  missing = [f'{flag} (or {name})' for flag, name in _VARIABLES.items() if values[flag] is None]
  if len(missing) == len(values):
    return _detect()
  if missing:
    present = ', '.join(f'{flag}={value}' for flag, value in values.items() if value is not None)
    raise LmsptError(f'{present}: {" and ".join(missing)} must be given too; or leave all three out')
  for flag in ('--num-processes', '--process-id'):
    try:
      values[flag] = int(values[flag])
    except ValueError as error:
      raise LmsptError(f'{flag} (or {_VARIABLES[flag]}) = {values[flag]!r}: must be a whole number') from error
  address, count, index = values.values()
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise LmsptError(f'--coordinator (or JAX_COORDINATOR_ADDRESS) = {address!r}: write HOST:PORT of process 0')
  if count < 1 or not 0 <= index < count:
    raise LmsptError(f'--num-processes={count} --process-id={index}: processes are numbered from 0 to their number - 1')
  return Place(address, count, index) if count > 1 else None


def _detect() -> Place | None:
  # A shell within a Slurm allocation sees the job's variables as well, but is no step of several tasks.
  slurm, tpu = clusters.SlurmCluster, (clusters.GkeTpuCluster, clusters.GceTpuCluster)
  if slurm.is_env_present() and int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    return Place(detection=slurm.name)
  if 'tpu' in (jax.config.jax_platforms or ''):  # JAX sets it on a TPU VM, unless told otherwise
    found = next((cluster for cluster in tpu if cluster.is_env_present()), None)
    if found and found.get_process_count() > 1:
      return Place(detection=found.name)
  return None
