"""Compiles the train step for a TPU slice without a TPU, and says what it would need there.

Three kinds of numbers, kept apart in a `Plan`: `compiler` is what XLA's TPU compiler says of the program it made;
`counted` is read from that program, or from the traced step; `projected` follows from both by the roofline of the
chip's published figures, and is a bound, not a measurement.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from lmspt_jax.chips import Topology
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.convert.whisper import whisper_dims
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.teachers import TEACHER_SIZES, TeacherDims, encoder_of
from lmspt_jax.models.whisper import abstract_params
from lmspt_jax.planning.hlo import Program
from lmspt_jax.planning.roofline import Roofline
from lmspt_jax.sharding import Placement, make_mesh
from lmspt_jax.training.compiled import abstract_batch, compile_step, trace_step
from lmspt_jax.training.flops import Arithmetic, count_flops
from lmspt_jax.training.state import Experiment, TrainState
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.teacher import stored_params

_LIBTPU = re.compile(r'libtpu\s*==\s*([\d.]+\.)\*')
_STATE_GROUPS = {'generator': 'parameters', 'discriminator': 'parameters', 'codebooks': 'parameters',
                 'average': 'average', 'generator_opt': 'optimizer', 'discriminator_opt': 'optimizer'}


@dataclass(frozen=True)
class Plan:
  """What one slice would need for a train step; bytes and FLOPs are of one chip unless named otherwise.

  Attributes:
    topology: e.g. 'v5e:4x4'.
    setup: chips, hosts, mesh, batch size, audio seconds in a step.
    resident: bytes by what they hold (parameters, optimizer, average, teacher, batch), from the shardings.
    compiler: memory, flops, bytes_accessed, compile_seconds; of a step that does not fit, memory alone.
    counted: collectives by kind, model FLOPs of all chips by part, the compiler's cycles by part.
    projected: seconds by what bounds them, utilisation, audio hours a day.
    fits: whether the compiler found room for it.
  """

  topology: str
  setup: dict[str, Any]
  resident: dict[str, int]
  compiler: dict[str, Any]
  counted: dict[str, Any]
  projected: dict[str, Any]
  fits: bool


def teacher_dims(config: ExperimentConfig) -> TeacherDims | None:
  """Sizes of the configured teacher; of a well-known one by its name, of a local file from its header.

  Raises LmsptError for a name that is not known.
  """
  if config.teacher.strategy == 'none':
    return None
  name = re.split('[:/]', config.teacher.checkpoint.partition('@')[0])[-1].removeprefix('whisper-')
  known = re.match('package:|hf://', config.teacher.checkpoint)
  if known and name in TEACHER_SIZES:
    return TEACHER_SIZES[name]
  if known:
    raise LmsptError(f'teacher.checkpoint = {config.teacher.checkpoint!r}: its sizes are not known and nothing is '
                     f'downloaded for a plan; use a local copy, or a name that ends in {", ".join(TEACHER_SIZES)}')
  return whisper_dims(config.teacher.checkpoint)


def require_compiler() -> None:
  """Raises LmsptError where the TPU compiler is not installed, or is not the one that this jax takes on a TPU.

  jaxlib can't read some programs of a newer compiler, which shows when they have been compiled for minutes.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise LmsptError("lmspt plan needs the TPU compiler, libtpu: pip install 'lmspt_jax[plan]'")
  try:
    found = metadata.version('libtpu')
  except metadata.PackageNotFoundError:  # such a build has a name of its own
    found = 'of a nightly build'
  wanted = next((match[1] for text in metadata.requires('jax') or () if (match := _LIBTPU.match(text))), '')
  if not f'{found}.'.startswith(wanted):
    raise LmsptError(f"libtpu {found}: jax {jax.__version__} takes {wanted}*, and can't read every program of another; "
                     "pip install 'lmspt_jax[plan]'")


def slice_devices(topology: Topology) -> list[jax.Device]:
  """Devices to compile for, one a chip. Raises LmsptError for a slice that the compiler does not know."""
  require_compiler()
  # By default a v4 chip would be two devices; a training run sees it as one.
  options = {'chip_config_name': 'megacore'} if topology.chip.cores > 1 else {}
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise LmsptError(f'topology {topology.name}: {_first_line(error)}; use a shape such as '
                     f'{topology.chip.example}') from error
  if len(devices) != topology.chips:
    raise LmsptError(f'topology {topology.name}: the compiler makes {len(devices)} devices of {topology.chips} chips; '
                     f'use a shape such as {topology.chip.example}')
  return devices


def plan(config: ExperimentConfig, topology: Topology, keep_text: Callable[[str], object] | None = None) -> Plan:
  """Compiles the config's train step for a slice and reads what came out; minutes for a large model.

  `keep_text` gets the compiled program, which is large.

  Raises:
    LmsptError: mesh or batch do not fit the number of chips, the teacher or the slice is not known, or the compiler
      writes what this version does not read.
  """
  dims = teacher_dims(config)
  mesh = make_mesh(config, slice_devices(topology))
  placement = Placement(config, mesh)
  experiment = Experiment(config, dims)
  teacher = {} if dims is None else jax.eval_shape(
      lambda params: stored_params(params, config.compute), abstract_params(encoder_of(dims), dims))
  setup = {
    'chips': topology.chips, 'hosts': topology.hosts, 'mesh': dict(mesh.shape), 'batch_size': config.data.batch_size,
    'audio_seconds': config.data.batch_size * config.crop_samples / config.model.sample_rate,
    'dtype': config.compute.dtype}
  start = time.perf_counter()
  with jax.set_mesh(mesh):
    abstract = experiment.abstract_state()
    shardings = placement.shardings(abstract)
    step = make_train_step(experiment, shardings)
    traced = trace_step(step, config, placement, abstract, shardings, teacher)
    arithmetic = count_flops(traced.jaxpr)
    resident = _resident(config, placement, abstract, teacher)
    counted = {'model_flops': dict(arithmetic.parts)}
    lowered = traced.lower(lowering_platforms=('tpu',))
    try:
      compiled = compile_step(lowered, config, 'tpu')
    except jax.errors.JaxRuntimeError as error:
      memory = {'memory': _exhausted(error)}
      return Plan(topology.name, setup, resident, memory, counted, {}, fits=False)
  seconds = time.perf_counter() - start
  text = compiled.as_text()
  if keep_text is not None:
    keep_text(text)
  return _read(topology, setup, resident, compiled, Program(text), arithmetic, seconds)


def _resident(config: ExperimentConfig, placement: Placement, abstract: TrainState, teacher: Any) -> dict[str, int]:
  """Bytes on a chip between two steps, by what they are."""
  totals = {'parameters': 0, 'optimizer': 0, 'average': 0, 'teacher': 0, 'batch': 0}
  for row in placement.table(abstract):
    totals[_STATE_GROUPS.get(row.path.partition('/')[0], 'parameters')] += row.bytes_per_device
  totals['teacher'] = sum(row.bytes_per_device for row in placement.table({'teacher': teacher}))
  totals['batch'] = sum(_shard_bytes(leaf) for leaf in abstract_batch(config, placement).values())
  return totals


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _read(topology: Topology, setup: dict[str, Any], resident: dict[str, int], compiled: jax.stages.Compiled,
          program: Program, arithmetic: Arithmetic, seconds: float) -> Plan:
  once, costs = program.costs(loops=False), program.costs()
  analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
  # The compiler counts loop bodies once; what the further rounds cost is ours to count.
  flops = analysis['flops'] + costs.flops - once.flops
  moved = analysis['bytes accessed'] + costs.bytes - once.bytes
  compiler = {
    'memory': {
      'arguments': memory.argument_size_in_bytes, 'output': memory.output_size_in_bytes,
      'aliased': memory.alias_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
      'program': memory.generated_code_size_in_bytes, 'peak': memory.peak_memory_in_bytes,
      'available': topology.chip.usable_bytes},
    'flops': flops, 'flops_loops_once': analysis['flops'], 'bytes_accessed': moved,
    'bytes_accessed_loops_once': analysis['bytes accessed'], 'compile_seconds': round(seconds, 1)}
  collectives = {
    kind: {'count': costs.count[kind], 'payload_bytes': costs.payload[kind], 'sent_bytes': costs.wire[kind]}
    for kind in sorted(costs.count)}
  counted = {'collectives': collectives, 'model_flops': dict(arithmetic.parts), 'cycles': dict(costs.cycles)}
  roofline = Roofline(
    chip=topology.chip, chips=topology.chips, flops=flops, passes=arithmetic.passes / max(arithmetic.parts.total(), 1),
    bytes_moved=moved, bytes_sent=costs.wire.total(), model_flops=arithmetic.model_flops,
    audio_seconds=setup['audio_seconds'])
  return Plan(topology.name, setup, resident, compiler, counted, roofline.figures(), fits=True)


def _exhausted(error: jax.errors.JaxRuntimeError) -> dict[str, int]:
  """{'peak', 'available'} bytes of the compiler's message that memory does not suffice; other faults are raised on."""
  text = str(error)
  sizes = [float(number) * {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}[unit]
           for number, unit in re.findall(r'([\d.]+)([KMGT])\b', text)]
  if not text.startswith('RESOURCE_EXHAUSTED') or 'hbm' not in text.lower() or len(sizes) < 2:
    raise error
  return {'peak': round(sizes[0]), 'available': round(sizes[1])}


def _first_line(error: Exception) -> str:
  return str(error).partition('\n')[0]
