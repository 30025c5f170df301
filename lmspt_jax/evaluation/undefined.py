"""What a metric raises where it has no value, and which packages metrics need."""

from __future__ import annotations

import importlib.util

from lmspt_jax.errors import LmsptError

# Import names of the extra [evaluate].
PACKAGES = ('jiwer', 'librosa', 'matplotlib', 'onnxruntime', 'pesq', 'pycodec2', 'pystoi', 'pyworld', 'requests',
            'speechmos', 'tokenizers', 'whisper_normalizer')


class Undefined(Exception):
  """There is no such number for this recording; the text says why. It is counted as missing."""


def check_packages() -> None:
  """Raises LmsptError naming the packages that are not installed, before any work is done."""
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise LmsptError(f"evaluation needs {', '.join(missing)}: pip install 'lmspt_jax[evaluate]'")
