"""A train state that begins with another model's arrays (config section `init`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from lmspt_jax import hosts
from lmspt_jax.checkpoint import saved_run
from lmspt_jax.config import ExperimentConfig, ModelConfig, changed_fields, to_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.tokenizer import abstract_tokenizer
from lmspt_jax.pretrained.loading import load
from lmspt_jax.training.state import Experiment, TrainState

# Of the model's config, what training alone reads.
_FREE = ('dropout', 'ema_decay', 'data_init', 'usage_decay')


def started_from(config: ExperimentConfig, experiment: Experiment, fresh: TrainState,
                 shardings: TrainState) -> TrainState:
  """The fresh state with what `config.init` names in it: tokenizer and codebooks, on demand discriminators and moments.

  The moving average begins with the same tokenizer. What the strategy's student has of its own (a pooled teacher's
  linear map) begins anew, unless moments are asked for: those are of all of it.

  Raises:
    LmsptError: the model can't be loaded, or has arrays of other shapes; they are listed.
  """
  init = config.init
  # A release file need not tell all of its config: it is checked against this one.
  given = config.model if init.model.endswith('.safetensors') else None
  model = load(init.model, given, average=init.weights == 'average')
  hosts.check_same('init.model', model.hash, 'give all hosts the same model')
  _, params, codebooks = abstract_tokenizer(config.model)
  _compare(init.model, {'tokenizer': model.params, 'codebooks': model.codebooks},
           {'tokenizer': params, 'codebooks': codebooks}, model.config.model, config.model)
  if hosts.is_writer():
    others = _other_fields(model.config.model, config.model)
    print(f'starting from {model.source}, {model.config.name} step {model.step}'
          + (f'; it was trained with another {", ".join(others)}' if others else ''), flush=True)
  state = fresh.replace(
      generator={**fresh.generator, 'tokenizer': _place(model.params, shardings.generator['tokenizer'])},
      codebooks=_place(model.codebooks, shardings.codebooks))
  if init.discriminators:
    state = _with_discriminators(config, experiment, state, shardings)
  average = experiment.first_average(state.generator['tokenizer'], state.codebooks)
  return jax.device_put(state.replace(average=average), shardings)


def _with_discriminators(config: ExperimentConfig, experiment: Experiment, state: TrainState,
                         shardings: TrainState) -> TrainState:
  init, ours = config.init, experiment.abstract_state()
  try:
    run = saved_run(init.model)
  except LmsptError as error:
    raise LmsptError(f'config field init.discriminators = True: {error}') from error
  theirs = Experiment(run.config, experiment.teacher_dims).abstract_state()
  parts = ['discriminator', *(('generator', 'generator_opt', 'discriminator_opt') if init.optimizers else ())]
  pick = lambda tree: {part: getattr(tree, part) for part in parts}
  _compare(init.model, pick(theirs), pick(ours))
  wanted = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), pick(ours),
                        pick(shardings))
  found = run.restore(wanted)
  for part in ('generator_opt', 'discriminator_opt'):
    # The moments and their number of steps, not the schedule's.
    if part in found and optax.tree.get_all_with_path(found[part], 'count', _is_schedule):
      # Each its own copy: the train step donates its buffers, each once.
      found[part] = optax.tree.set(found[part], _is_schedule, count=jnp.copy(state.step))
  return state.replace(**found)


def _is_schedule(path: Any, _: Any) -> bool:
  return any(getattr(key, 'tuple_name', '') == 'ScaleByScheduleState' for key in path)


def _place(arrays: Any, shardings: Any) -> Any:
  """Each host's devices take their part of what all of them have read."""
  def place(x: Any, where: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return jax.tree.map(place, arrays, shardings)


def _compare(source: str, theirs: Any, ours: Any, their_config: ModelConfig | None = None,
             config: ModelConfig | None = None) -> None:
  """Raises LmsptError naming config fields and arrays that differ."""
  shapes = [{jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
             for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (theirs, ours)]
  differing = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
  if not differing:
    return
  show = lambda shape: 'absent' if shape is None else list(shape)
  told = [f'model.{text}' for text in _other_fields(their_config, config).values()] if config else []
  told += [f'{name} {show(shapes[0].get(name))} there, {show(shapes[1].get(name))} now' for name in differing[:5]]
  more = f' and {len(differing) - 5} more' if len(differing) > 5 else ''
  raise LmsptError(f'config field init.model = {source!r}: its arrays are of other shapes: {", ".join(told)}{more}; '
                   'use its widths, or another model')


def _other_fields(theirs: ModelConfig, ours: ModelConfig) -> dict[str, str]:
  """Fields that change what the arrays compute."""
  return {name: text for name, text in changed_fields(to_dict(theirs), to_dict(ours)).items()
          if not name.rpartition('.')[2].startswith('revive_') and name.rpartition('.')[2] not in _FREE}
