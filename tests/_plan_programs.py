"""Run by test_plan.py in a process of its own, for the TPU compiler stays in a process that has loaded it.

    python tests/_plan_programs.py OUT CONFIG     # compiles for v5e:2x2 and writes what came out to OUT
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from lmspt_jax.cli.plan import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from make_golden_step import TINY, replaced

from lmspt_jax.chips import parse_topology
from lmspt_jax.cli import flags
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.whisper import WhisperDims, WhisperEncoder, abstract_params
from lmspt_jax.planning import plan as planning
from lmspt_jax.planning import report
from lmspt_jax.sharding import BATCH, Placement, make_mesh
from lmspt_jax.training.compiled import placed
from lmspt_jax.training.teacher import FrozenTeacher, stored_params

SLICE = parse_topology('v5e:2x2')


def known_program(mesh: Mesh) -> str:
  """Three rounds of a product whose weights are gathered over 'b' and whose gradients are summed over 'a'."""

  def loss(weights, x):
    with jax.named_scope('codec'):
      x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    with jax.named_scope('teacher'):
      return jnp.sum(jnp.square(x))

  place = lambda shape, *axes: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
  weights, x = place((3, 512, 512), None, 'b'), place((1024, 512), ('a', 'b'))
  step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, weights.sharding))
  return step.trace(weights, x).lower(lowering_platforms=('tpu',)).compile().as_text()


def exchange_program(mesh: Mesh) -> str:
  """An all-to-all over all four, and two permutations around 'b'; jax gives them all one channel."""

  def exchange(x):
    x = jax.lax.all_to_all(x, ('a', 'b'), 1, 0, tiled=True)
    around = lambda x: jax.lax.ppermute(x, 'b', [(0, 1), (1, 0)])
    return around(jnp.sort(around(x), axis=0))

  spec = PartitionSpec(('a', 'b'))
  step = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))
  x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=NamedSharding(mesh, spec))
  return step.trace(x).lower(lowering_platforms=('tpu',)).compile().as_text()


def teacher_program() -> str:
  """A teacher's features of half a second for each chip, and their gradient, its parameters split over 'fsdp'."""
  config = replaced(TINY, mesh__fsdp=4, mesh__data=1, data__batch_size=4, compute__dtype='bfloat16')
  mesh = make_mesh(config, planning.slice_devices(SLICE))
  dims = WhisperDims(n_mels=80, width=256, heads=4, audio_layers=3, text_layers=0, vocab_size=8)
  teacher = FrozenTeacher(dims, 16_000, 'crop', compute=config.compute)
  params = jax.eval_shape(lambda params: stored_params(params, config.compute), abstract_params(WhisperEncoder, dims))
  with jax.set_mesh(mesh):
    params = placed(params, Placement(config, mesh).teacher(params))
    audio = jax.ShapeDtypeStruct((4, 8000), jnp.float32, sharding=NamedSharding(mesh, BATCH))
    step = jax.jit(jax.grad(lambda audio, params: jnp.sum(jnp.square(teacher.features(params, audio)))))
    return step.trace(audio, params).lower(lowering_platforms=('tpu',)).compile().as_text()


def step_of(size: int):
  """Stands in for the train step: sorts size x size numbers on each chip."""

  def make_train_step(experiment, shardings):
    def step(state, teacher_params, batch):
      row = jnp.arange(size) * jnp.sum(batch['audio'])
      return state.replace(step=state.step + 1), jnp.sort(jnp.sin(row)[:, None] * jnp.cos(row), axis=0)[0]
    return step

  return make_train_step


def main(out: Path, config_file: str) -> None:
  devices = planning.slice_devices(SLICE)
  mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2, devices=devices)
  (out / 'known.txt').write_text(known_program(mesh))
  (out / 'exchange.txt').write_text(exchange_program(mesh))
  (out / 'teacher.txt').write_text(teacher_program())

  config = flags.load(config_file)
  real, planning.make_train_step = planning.make_train_step, step_of(100_000)
  too_large = planning.plan(config, SLICE)
  planning.make_train_step = step_of(100)
  toy = planning.plan(config, SLICE)
  planning.make_train_step = real
  (out / 'does_not_fit.json').write_text(json.dumps(dataclasses.asdict(too_large)))
  (out / 'table.txt').write_text(report.as_table([toy, too_large]))
  (out / 'picture.svg').write_text(report.as_picture([toy, too_large]))

  counts = {}
  for name in ('v4:2x2x4', 'v5e:4x4', 'v5e:16x16', 'v5p:2x2x4', 'v6e:4x4', 'v5e:3x5'):
    try:
      devices = planning.slice_devices(parse_topology(name))
      counts[name] = [len(devices), devices[0].device_kind]
    except LmsptError as error:
      counts[name] = str(error)
  (out / 'slices.json').write_text(json.dumps(counts))


if __name__ == '__main__':
  main(Path(sys.argv[1]), sys.argv[2])
