"""Recordings that are not over yet: a causal network frame by frame, with what its layers remember in between.

Every frame is one call of one program, whatever pieces samples or codes come in. A state is never changed: what goes on
from it is a new one. So a state may be kept, copied and gone on from twice.

Axes: N samples, K codebooks, T frames, W values a frame that go in, V values a frame that come out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmspt_jax.errors import LmsptError
from lmspt_jax.models.past import Past


@dataclass(frozen=True)
class EncodingState:
  """Where the encoding of a recording stands; `Tokenizer.start` makes one.

  Attributes:
    past: what each layer remembers.
    rest_N: samples of the frame that is not whole yet, float32, fewer than a hop.
    num_samples: so many came in all.
    model_hash: of the model whose state this is.
  """

  past: tuple[jax.Array, ...]
  rest_N: np.ndarray
  num_samples: int
  model_hash: str


@dataclass(frozen=True)
class DecodingState:
  """Where the decoding of codes stands; `Tokenizer.start_decoding` makes one.

  Attributes:
    past: what each layer remembers.
    path: from codes to speech, as in `Tokenizer.decode`.
    num_samples: so many samples, at the model's rate, the codes so far stand for.
    model_hash: of the model whose state this is.
  """

  past: tuple[jax.Array, ...]
  path: str
  num_samples: int
  model_hash: str


def check_state(state: Any, kind: type[EncodingState | DecodingState], model_hash: str) -> None:
  """Raises LmsptError unless the state is of this kind and of this model."""
  if not isinstance(state, kind):
    maker = 'start' if kind is EncodingState else 'start_decoding'
    raise LmsptError(f'a state of type {type(state).__name__}: give what {maker} or the piece before returned')
  if state.model_hash != model_hash:
    raise LmsptError(f'a state of model {state.model_hash}, not of this one ({model_hash}): go on with the model that '
                     'began')


class StreamedProgram:
  """A causal network from frames to frames, evaluated frame by frame on one device."""

  def __init__(self, function: Callable[[Any, jax.Array, Past], jax.Array], weights: Any, frame_W: np.ndarray):
    """
    Args:
      function: (weights, frames [1, 1, W], past) -> frames [1, 1, V].
      weights: its arrays, on the device.
      frame_W: any frame, for its shape and dtype.
    """

    def step(weights: Any, past: tuple[jax.Array, ...] | None, frame_W: jax.Array) -> tuple[jax.Array, tuple]:
      layers = Past(past)
      return function(weights, frame_W[None, None], layers)[0, 0], tuple(layers.kept)

    self._weights, self._step = weights, jax.jit(step)
    out_V, kept = jax.eval_shape(step, weights, None, frame_W)
    self._nothing = np.zeros((0, *out_V.shape), out_V.dtype)
    self.beginning = tuple(jnp.zeros(past.shape, past.dtype) for past in kept)  # before a recording there are zeros

  def __call__(self, past: tuple[jax.Array, ...], frames_TW: np.ndarray) -> tuple[np.ndarray, tuple[jax.Array, ...]]:
    """(frames [T, V], what comes of `past`), of any number of frames."""
    found = [self._nothing]
    for frame_W in frames_TW:
      out_V, past = self._step(self._weights, past, frame_W)
      found.append(np.asarray(out_V)[None])
    return np.concatenate(found), past
