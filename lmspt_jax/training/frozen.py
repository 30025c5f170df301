"""Arrays that training leaves as they are (config field train.freeze), for fine-tuning."""

from __future__ import annotations

import re
from typing import Any

import jax

from lmspt_jax.errors import LmsptError

PARTS = ('generator', 'codebooks', 'discriminator')  # of the train state


class Frozen:
  """The arrays in whose path an expression is found: those of `parameters.txt`, such as
  generator/tokenizer/semantic_encoder/conv_in/bias. An empty expression freezes nothing."""

  def __init__(self, expression: str):
    self._expression = expression

  def check(self, state: Any) -> None:
    """Raises LmsptError where a train state has no such array."""
    named = [name for part in PARTS for name in jax.tree.leaves(_names(part, getattr(state, part)))]
    if self._expression and not any(map(self._chosen, named)):
      raise LmsptError(f'config field train.freeze = {self._expression!r}: is found in no path of {", ".join(PARTS)}; '
                       f'they are like {named[0]}')

  def hold(self, part: str, tree: Any) -> Any:
    """The same arrays; no gradient reaches the frozen ones, nor is it computed."""
    if not self._expression:
      return tree
    return jax.tree.map(lambda name, x: jax.lax.stop_gradient(x) if self._chosen(name) else x, _names(part, tree), tree)

  def keep(self, part: str, new: Any, old: Any) -> Any:
    """`new` with the frozen arrays of `old`: weight decay and codebook rules change arrays that have no gradient."""
    if not self._expression:
      return new
    return jax.tree.map(lambda name, n, o: o if self._chosen(name) else n, _names(part, new), new, old)

  def _chosen(self, name: str) -> bool:
    return re.search(self._expression, name) is not None


def _names(part: str, tree: Any) -> Any:
  """A tree of paths in place of arrays."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: f'{part}/{jax.tree_util.keystr(path, simple=True, separator="/")}', tree)
