"""The train step as it is compiled: traced on shapes, so that a run and a plan without devices do the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmspt_jax.config import ComputeConfig, ExperimentConfig
from lmspt_jax.sharding import BATCH, Placement
from lmspt_jax.training.state import TrainState
from lmspt_jax.training.step import TrainStep


def abstract_batch(config: ExperimentConfig, placement: Placement) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch, split as `shard_batch` does."""
  size, sharding = config.data.batch_size, NamedSharding(placement.mesh, BATCH)
  return {'audio': jax.ShapeDtypeStruct((size, config.crop_samples), jnp.float32, sharding=sharding),
          'num_samples': jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)}


def placed(tree: Any, shardings: Any) -> Any:
  """The shapes and dtypes of `tree`, each with its sharding."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def trace_step(step: TrainStep, config: ExperimentConfig, placement: Placement, abstract: TrainState,
               shardings: TrainState, teacher_params: Any) -> jax.stages.Traced:
  """The jitted step, its state donated, ready for `.lower()` and `compile_step`.

  Args:
    step: of `make_train_step`.
    config: the experiment's.
    placement: on the mesh that is set (`jax.set_mesh`).
    abstract, shardings: shapes of the state, and where they lie.
    teacher_params: arrays or shapes.
  """
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  teacher = placed(teacher_params, placement.teacher(teacher_params))
  return jitted.trace(placed(abstract, shardings), teacher, abstract_batch(config, placement))


def tpu_options(compute: ComputeConfig) -> dict[str, str]:
  """What XLA's compiler for TPUs is told."""
  return {'xla_jf_convolution_performance_target': str(compute.tpu_convolution_target)}


def compile_step(lowered: jax.stages.Lowered, config: ExperimentConfig, platform: str) -> jax.stages.Compiled:
  """For 'tpu', 'gpu' or 'cpu'. Called with (state, teacher_params, batch), each where the placement puts it."""
  return lowered.compile(compiler_options=tpu_options(config.compute) if platform == 'tpu' else {})
