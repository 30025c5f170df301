"""A corpus folder in every format, for the scripts that compare them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import _corpus_formats as formats  # noqa: E402
from tensorflow_datasets.core import shuffle  # noqa: E402

from lmspt_jax.data.prepare import prepare  # noqa: E402
from lmspt_jax.data.sources import open_source  # noqa: E402


def every_format(corpus: Path, work: Path, num_shards: int = 16) -> dict[str, str]:
  """Kind -> URI. What an earlier call wrote into WORK is used again."""
  uris = {'folder': f'folder:{corpus}', 'webdataset': f'webdataset:{work}/tars/*.tar',
          'parquet': f'parquet:{work}/parquet/*.parquet', 'tfds': f'tfds:{work}/tfds/speech_corpus/1.0.0',
          'arrayrecord': f'arrayrecord:{work}/shards'}
  if not (work / 'done').exists():
    source = open_source(uris['folder'])
    found = [source[position] for position in range(len(source))]
    formats.write_tars(found, work / 'tars', num_shards)
    formats.write_parquet(found, work / 'parquet', 16)
    shuffle.MAX_MEM_BUFFER_SIZE = 16 << 30  # beyond it TFDS writes its buckets with TensorFlow
    formats.write_tfds(found, work / 'tfds', 16)
    prepare(uris['folder'], work / 'shards', num_shards=num_shards, num_workers=2)
    (work / 'done').touch()
  return uris
