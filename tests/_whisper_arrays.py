"""Whisper parameters one by one, layers apart: what a foreign file holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def named_arrays(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """('encoder/blocks/0/mlp/up/kernel', array) and so on of {'encoder': ..., 'decoder': ...} or of one of them."""
  for key_path, value in jax.tree.leaves_with_path(params):
    names = [str(key.key) for key in key_path]
    if names[:2] != ['encoder', 'blocks']:  # the encoder's are stacked
      yield '/'.join(names), np.asarray(value)
      continue
    for layer, array in enumerate(np.asarray(value)):
      yield '/'.join([*names[:2], str(layer), *names[2:]]), array
