"""`prepare` of each kind of source: the same utterances give the same shards, and a store that is down is no fault."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from _corpus_formats import utterances, write_everywhere, write_tars
from _object_store import s3, upload
from _small_corpus import SAMPLE

from lmspt_jax.data.prepare import prepare
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'cache'))


def test_any_format_gives_the_same_shards(tmp_path):
  found = {kind: prepare(uri, tmp_path / 'out' / kind, num_shards=2, num_workers=1, progress=False)
           for kind, uri in write_everywhere(utterances(12), tmp_path / 'in').items()}
  assert found.keys() >= {'folder', 'webdataset', 'parquet', 'tfds'}
  sources = {kind: open_source(f'arrayrecord:{tmp_path / "out" / kind}') for kind in found}
  for kind, info in found.items():
    assert info.utterances == 12 and not info.faults
    if kind != 'tfds':  # which holds samples, so the FLAC is new
      assert info.shards == found['folder'].shards
    for row in range(12):
      here, there = sources[kind][row], sources['folder'][row]
      assert here.id == there.id and here.text == there.text and here.split == there.split
      assert np.array_equal(here.decode()[0], there.decode()[0])


def test_missing_and_broken_tars_are_named(tmp_path):
  write_tars(utterances(12), tmp_path / 'in')
  (tmp_path / 'in' / '001.tar').unlink()
  with open(tmp_path / 'in' / '002.tar', 'r+b') as file:
    file.truncate(200_000)
  info = prepare(f'webdataset:{tmp_path}/in/{{000..002}}.tar', tmp_path / 'out', num_workers=1, progress=False)
  assert 4 < info.utterances < 8
  assert info.faults['missing']['names'] == ['001.tar'] and '002.tar' in info.faults['truncated']['names']


def test_tars_in_a_store(tmp_path):
  write_tars(utterances(12), tmp_path / 'in')
  shutil.copy(SAMPLE / 'ATTRIBUTION.md', tmp_path / 'in')
  bucket, server = upload(tmp_path / 'in', 'prepared-tars'), s3()
  local = prepare(f'webdataset:{tmp_path}/in/{{000..002}}.tar', tmp_path / 'local', num_workers=1, progress=False)
  source, out = f'webdataset:{bucket}/{{000..002}}.tar', tmp_path / 'out'
  requests, answer = itertools.count(), server.answer

  def fails_after_a_while(method, path, headers, body):
    late = method == 'GET' and headers.get('Range') and next(requests) > 25
    return (503, {}, b'') if late else answer(method, path, headers, body)
  server.answer = fails_after_a_while
  with pytest.raises(LmsptError, match=r"can't be reached") as error:
    prepare(source, out, num_workers=1, progress=False)
  assert '\n' not in str(error.value) and not (out / 'dataset.json').exists()
  assert any((out / '.prepare' / 'parts').glob('*.arrow'))  # it was well under way
  server.answer = answer
  info = prepare(source, out, num_workers=1, progress=False)
  assert (info.shards, info.faults) == (local.shards, {})
  assert (out / 'ATTRIBUTION.md').read_bytes() == (SAMPLE / 'ATTRIBUTION.md').read_bytes()
