"""A run's tokenizer as a checkpoint in the layout of the authors' release."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmspt_jax import checkpoint
from lmspt_jax.convert.release_file import ReleaseCheckpoint
from lmspt_jax.inference.license import data_license


def release_of_run(workdir: str | Path, average: bool = True) -> ReleaseCheckpoint:
  """The newest checkpoint's. The release counts how often a code is drawn as its share of all of its quantizers' draws.

  Args:
    workdir, average: as in `checkpoint.restore_for_inference`.

  Raises:
    LmsptError: there is no checkpoint.
  """
  restored = checkpoint.restore_for_inference(workdir, average)
  usage = {}
  for part, found in restored.codebooks.items():
    counts = [np.asarray(quantizer['counts']) for _, quantizer in sorted(found['quantizers'].items())]
    usage[part] = np.stack([count / (len(counts) * count.size) for count in counts]).astype(np.float32)
  return ReleaseCheckpoint(restored.config.model, restored.params, restored.codebooks, usage,
                           data_license(restored.config.data.train))
