"""LM-SPT speech tokenizers in JAX: train, encode, decode (arXiv 2506.16738).

    from lmspt_jax import Tokenizer
    tokenizer = Tokenizer.from_pretrained('runs/demo/run')
    codes = tokenizer.encode(audio, sample_rate=16_000)
    audio = tokenizer.decode(codes)

Importing the package loads neither jax nor anything else that is slow: data workers are spawned and import it too.
"""

from typing import Any

from lmspt_jax.errors import LmsptError
from lmspt_jax.version import __version__

__all__ = ['Codes', 'LmsptError', 'Tokenizer', '__version__']


def __getattr__(name: str) -> Any:
  if name in ('Tokenizer', 'Codes'):
    from lmspt_jax.inference import tokenizer

    return getattr(tokenizer, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
