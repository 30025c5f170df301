"""What the exported graphs are, in either format.

    encode       audio float32 [B, N] at `sample_rate`  ->  ids int32 [B, K, T], T = ceil(N / hop)
    decode       ids int32 [B, 1..K, T]                 ->  audio float32 [B, T * hop]
    resynthesis  ids int32 [B, 1..K, T]                 ->  audio float32 [B, T * hop at `resynthesis_sample_rate`]

B, N and T are free, each at least 1; zeros fill the last frame. Row 0 is the semantic codebook. `decode` also takes the
first rows alone: row 0 is what is said, without how it sounds. `resynthesis`, the auxiliary decoder, reads no row but
that; a model is complete without it.
"""

from __future__ import annotations

from pathlib import Path

from lmspt_jax.errors import LmsptError

# Of the graphs' inputs, outputs and files; raised when a program written for the old ones would not run any more.
FORMAT_VERSION = 1


def graph_names(resynthesis: bool) -> tuple[str, ...]:
  """The graphs that are written."""
  return ('encode', 'decode', 'resynthesis') if resynthesis else ('encode', 'decode')


def write_bytes(path: Path, content: bytes) -> Path:
  """Writes a file.

  Raises:
    LmsptError: it can't be written.
  """
  try:
    path.write_bytes(content)
  except OSError as error:
    raise LmsptError(f"{path}: can't be written ({error.strerror}); give a folder that exists and has room") from error
  return path
