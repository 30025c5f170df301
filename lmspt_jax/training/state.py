"""What training carries from step to step, and the static parts it is interpreted with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array

from lmspt_jax import optim, rng
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.models.discriminators import Discriminators
from lmspt_jax.models.teachers import TeacherDims
from lmspt_jax.models.tokenizer import SpeechTokenizer, split_tokenizer
from lmspt_jax.training.teacher import make_distillation


@struct.dataclass
class TrainState:
  """Everything that changes in training; all of it is checkpointed. The teacher is not in it.

  Attributes:
    step: int32, updates done.
    generator: {'tokenizer': ..., 'distillation': ...}, trainable arrays of the codec and of the strategy's student.
    codebooks: codebook states (usage, moving averages).
    discriminator: trainable arrays of the discriminators.
    generator_opt, discriminator_opt: optax states.
    average: {'params', 'codebooks'}, the tokenizer averaged over steps (train.ema_decay), what is evaluated and
      exported; empty without averaging.
    skipped_in_row: int32, steps in a row, up to this one, that were skipped for numbers that are not finite.
  """

  step: Array
  generator: dict[str, Any]
  codebooks: dict[str, Any]
  discriminator: dict[str, Any]
  generator_opt: Any
  discriminator_opt: Any
  average: dict[str, Any]
  skipped_in_row: Array


class Experiment:
  """The static side of a config: module structures, optimizers and the distillation strategy.

  Args:
    config: the experiment's.
    teacher_dims: sizes of the teacher's encoder; None without a teacher.
  """

  def __init__(self, config: ExperimentConfig, teacher_dims: TeacherDims | None):
    self.config, self.teacher_dims = config, teacher_dims
    self.distillation = make_distillation(config, teacher_dims)
    self._tokenizer_def = nnx.graphdef(nnx.eval_shape(self._make_tokenizer))
    self._discriminator_def = nnx.graphdef(nnx.eval_shape(self._make_discriminators))
    steps = config.train.num_steps
    self.generator_tx = optim.optimizer(config.generator_optimizer, steps)
    self.discriminator_tx = optim.optimizer(
        config.discriminator_optimizer, steps, pytorch_default=config.quirks.discriminator_default_lr)

  def init(self) -> TrainState:
    """The state before step 0: a pure function of the config, to be jitted with shardings."""
    _, tokenizer, codebooks = split_tokenizer(self._make_tokenizer())
    generator = {
        'tokenizer': tokenizer,
        'distillation': self.distillation.init(rng.stream(self.config.train.seed, 'distillation'))}
    discriminator = nnx.to_pure_dict(nnx.state(self._make_discriminators(), nnx.Param))
    return TrainState(
        step=jnp.zeros((), jnp.int32), generator=generator, codebooks=codebooks, discriminator=discriminator,
        generator_opt=self.generator_tx.init(generator), discriminator_opt=self.discriminator_tx.init(discriminator),
        average=self.first_average(tokenizer, codebooks), skipped_in_row=jnp.zeros((), jnp.int32))

  def first_average(self, tokenizer: dict[str, Any], codebooks: dict[str, Any]) -> dict[str, Any]:
    """What averaging starts from. Copies: the train step donates its buffers, each once."""
    if not self.config.train.ema_decay:
      return {}
    return jax.tree.map(jnp.copy, {'params': tokenizer, 'codebooks': codebooks})

  def exported(self, state: TrainState) -> dict[str, Any]:
    """{'params', 'codebooks'} of the tokenizer that is evaluated and exported."""
    return state.average or {'params': state.generator['tokenizer'], 'codebooks': state.codebooks}

  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of `init`, nothing computed."""
    return jax.eval_shape(self.init)

  def tokenizer(self, params: dict[str, Any], codebooks: dict[str, Any]) -> SpeechTokenizer:
    """The module around given arrays, inside or outside of jit."""
    return nnx.merge(self._tokenizer_def, params, codebooks)

  def discriminators(self, params: dict[str, Any]) -> Discriminators:
    """The module around given arrays."""
    return nnx.merge(self._discriminator_def, params)

  def _make_tokenizer(self) -> SpeechTokenizer:
    rngs = nnx.Rngs(rng.stream(self.config.train.seed, 'tokenizer'))
    return SpeechTokenizer(self.config.model, rngs=rngs, compute=self.config.compute)

  def _make_discriminators(self) -> Discriminators:
    key = rng.stream(self.config.train.seed, 'discriminators')
    return Discriminators(self.config.discriminator, self.config.model.sample_rate, rngs=nnx.Rngs(key),
                          compute=self.config.compute)
