"""A trained tokenizer's arrays and what is known of them, wherever they came from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lmspt_jax.checkpoint import Best
from lmspt_jax.config import ExperimentConfig, ModelConfig, to_dict
from lmspt_jax.convert.release import STATISTICS
from lmspt_jax.convert.release_file import ReleaseCheckpoint
from lmspt_jax.pretrained.provenance import Provenance


@dataclass(frozen=True)
class TrainedModel:
  """What `pretrained.loading.load` returns.

  Attributes:
    config: the run's; of a file or folder, its model and quirks alone.
    params, codebooks: as `models.tokenizer.split_tokenizer` parts them.
    step: training step of the parameters; 0 where it is not known.
    teacher_id: what the semantic codes were distilled from; '' without a teacher.
    weights: 'average' over the run's steps, 'last' step, or '' where it is not known.
    source: where it was loaded from; of the hub with the commit.
    usage: of a release file, how often codes are drawn (`ReleaseCheckpoint.usage`).
    trace: looks up the provenance. Not at once, as that opens a run's training data.
    best: of a run, its best step up to this one; None where it has none.
  """

  config: ExperimentConfig
  params: dict[str, Any]
  codebooks: dict[str, Any]
  step: int = 0
  teacher_id: str = ''
  weights: str = ''
  source: str = ''
  usage: Mapping[str, np.ndarray] = field(default_factory=dict)
  trace: Callable[[], Provenance] = lambda: Provenance('not known')
  best: Best | None = None

  @functools.cached_property
  def provenance(self) -> Provenance:
    return self.trace()

  @functools.cached_property
  def hash(self) -> str:
    """16 hex digits: equal models, equal text."""
    return model_hash(self.config.model, self.params, self.codebooks)

  def released(self) -> ReleaseCheckpoint:
    """The same in the layout of the authors' release, which counts how often a code is drawn as its share of all of its
    quantizers' draws."""
    usage = dict(self.usage)
    for part, found in self.codebooks.items():
      if part not in usage:
        counts = [np.asarray(quantizer['counts']) for _, quantizer in sorted(found['quantizers'].items())]
        usage[part] = np.stack([count / (len(counts) * count.size) for count in counts]).astype(np.float32)
    return ReleaseCheckpoint(self.config.model, self.params, self.codebooks, usage, self.provenance.license)


def model_hash(config: ModelConfig, params: dict[str, Any], codebooks: dict[str, Any]) -> str:
  """sha256 over the model's config and every parameter's path, type, shape and bytes in path order; 16 hex digits.

  Usage statistics of training are left out: they change no code, and exported models don't carry them.
  """
  digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
  leaves = named_arrays(params) | named_arrays(codebooks)
  for name in sorted(leaves):
    array = np.ascontiguousarray(leaves[name])
    digest.update(f'\n{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def named_arrays(tree: dict[str, Any]) -> dict[str, Any]:
  """'decoder/blocks/0/conv/bias' -> array, without usage statistics."""
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
           for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return {name: leaf for name, leaf in named.items() if name.rpartition('/')[2] not in STATISTICS}
