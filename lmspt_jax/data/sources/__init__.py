"""Random-access sources of utterances, opened from a KIND:URI.

  folder:DIR             audio files, with an optional DIR/manifest.jsonl
  librispeech:DIR        LibriSpeech or LibriTTS as unpacked
  vctk:DIR               VCTK as unpacked
  emilia:DIR             Emilia's mp3 and json pairs, unpacked
  arrayrecord:DIR        shards and dataset.json as written by `lmspt prepare`
  webdataset:PATTERN     tars, e.g. DIR/{000..099}.tar
  parquet:PATTERN        parquet files with a column of audio bytes
  tfds:NAME[/CONFIG]     a prepared TensorFlow dataset
  package:NAME           a folder that comes with the package (speech_sample)

Every kind orders its utterances by (split, id), so the same corpus in any of them gives the same training batches.
Where there is no split, one utterance in eight (`metadata.auto_split`) is 'valid' and the rest 'train'.
"""

from __future__ import annotations

import importlib

import numpy as np
import pyarrow.compute as pc

from lmspt_jax.data.sources.base import Source, Utterance
from lmspt_jax.errors import LmsptError, nearest

__all__ = ['KINDS', 'Source', 'Utterance', 'open_source']

KINDS = {  # kind -> module, function that takes (uri, what follows the colon)
  'arrayrecord': ('arrayrecord', 'ArrayRecordSource'),
  'emilia': ('layouts', 'EmiliaSource'),
  'folder': ('folder', 'FolderSource'),
  'librispeech': ('layouts', 'LibriSpeechSource'),
  'package': ('folder', 'package_source'),
  'parquet': ('parquet', 'ParquetSource'),
  'tfds': ('tfds', 'TfdsSource'),
  'vctk': ('layouts', 'VctkSource'),
  'webdataset': ('webdataset', 'WebDatasetSource'),
}


def open_source(uri: str, split: str = '') -> Source:
  """Opens KIND:URI. `split` '' takes every utterance.

  Raises LmsptError: unknown KIND, no such file, bad metadata (named), no such split, nothing in it.
  """
  kind, colon, where = uri.partition(':')
  if not colon or not where:
    raise LmsptError(f'data {uri!r}: write KIND:URI, e.g. folder:DIR or arrayrecord:DIR')
  if kind not in KINDS:
    raise LmsptError(f'data {uri!r}: unknown kind {kind!r}, {nearest(kind, KINDS)}')
  module, name = KINDS[kind]
  source = getattr(importlib.import_module(f'lmspt_jax.data.sources.{module}'), name)(uri, where)
  if not len(source):
    raise LmsptError(f'data {uri!r}: no utterances; it needs wav, flac, ogg or mp3 files')
  if not split:
    return source
  rows = np.flatnonzero(pc.equal(source.index.table.column('split'), split).to_numpy())
  if not len(rows):
    have = ', '.join(f'{name} ({count})' for name, count in source.index.counts('split').items())
    raise LmsptError(f'data {uri!r}: no utterances in split {split!r}; it has {have}')
  return source.select(rows)
