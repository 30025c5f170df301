"""What may be done with trained weights: they carry the licences of the data they were trained on."""

from __future__ import annotations

from collections.abc import Sequence

from lmspt_jax.config import CorpusConfig
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError


def data_license(corpora: Sequence[CorpusConfig]) -> str:
  """One line for a model that was trained on these."""
  if not corpora:
    return 'not known: the run names no training data'
  licenses = set()
  for corpus in corpora:
    try:
      licenses |= set(open_source(corpus.uri, corpus.split).index.counts('license'))
    except LmsptError:
      return f'that of the training data, {corpus.uri} (not on this machine)'
  return f'that of the training data: {", ".join(sorted(licenses - {""})) or "not named there"}'
