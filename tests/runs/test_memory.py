"""What recomputation saves: of each network what its backward pass keeps, from shapes alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from make_golden_step import DIMS, TINY, replaced, speech_batches, tiny_teacher

from lmspt_jax.config import ComputeConfig
from lmspt_jax.models.discriminators import Discriminators
from lmspt_jax.models.tokenizer import SpeechTokenizer
from lmspt_jax.models.whisper import WhisperEncoder, bind


def kept_bytes(function, *arguments) -> int:
  """What a forward pass keeps for its backward pass, without its arguments."""
  kept = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
  size = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return size(kept) - size(arguments)


def test_recomputation_keeps_less():
  audio = jnp.asarray(speech_batches(TINY, 1)[0]['audio'])
  config = replaced(TINY, model__dilations=(1, 3, 9))

  def codec(remat):
    graphdef, params, rest = nnx.split(
        SpeechTokenizer(config.model, rngs=nnx.Rngs(0), compute=ComputeConfig(remat_codec=remat)), nnx.Param, ...)
    return kept_bytes(lambda p: nnx.merge(graphdef, p, rest)(audio).audio, params)

  def judges(remat):
    graphdef, params = nnx.split(Discriminators(
        TINY.discriminator, 16_000, rngs=nnx.Rngs(0), compute=ComputeConfig(remat_discriminators=remat)))
    return kept_bytes(lambda p: [maps[-1] for maps in nnx.merge(graphdef, p)(audio)], params)

  def teacher(remat):
    mel = jnp.zeros((2, 40, 80))
    return kept_bytes(lambda mel: bind(WhisperEncoder, DIMS, tiny_teacher(), remat=remat)(mel), mel)

  none, unit, block = map(codec, ('none', 'unit', 'block'))
  assert block < 0.8 * unit < 0.8 * 0.6 * none
  assert judges('block') < 0.2 * judges('none')
  assert teacher(True) < 0.7 * teacher(False)
