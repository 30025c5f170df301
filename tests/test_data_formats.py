"""One corpus in five formats: the same training batches, and a run may move from one to another. Real speech."""

from __future__ import annotations

import hashlib

import pytest
from _corpus_formats import utterances, write_everywhere

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import held_out_utterances, training_batches
from lmspt_jax.data.prepare import prepare

KINDS = ('folder', 'webdataset', 'parquet', 'tfds', 'arrayrecord')


@pytest.fixture(scope='module')
def uris(tmp_path_factory):
  root = tmp_path_factory.mktemp('formats')
  found = write_everywhere(utterances(), root)
  prepare(found['folder'], root / 'shards', num_shards=3, num_workers=1, progress=False)
  return {**found, 'arrayrecord': f'arrayrecord:{root / "shards"}'}


def hashes(uri, count, *, workers=0, split='train', **where):
  config = DataConfig(train=(CorpusConfig(uri, split),), batch_size=6, num_workers=workers)
  with training_batches(config, sample_rate=24_000, crop_samples=48_000, seed=3, **where) as batches:
    return [hashlib.sha256(b''.join(batch[key].tobytes() for key in sorted(batch))).hexdigest()
            for batch, _ in zip(batches, range(count), strict=False)]


@pytest.mark.parametrize('kind', KINDS)
def test_batches_are_those_of_the_bundled_folder(uris, kind):
  assert hashes(uris[kind], 12) == hashes('package:speech_sample', 12)  # into the second epoch
  assert hashes(uris[kind], 2, split='valid') == hashes('package:speech_sample', 2, split='valid')
  assert hashes(uris[kind], 2, split='') == hashes('package:speech_sample', 2, split='')


@pytest.mark.parametrize('kind', KINDS)
def test_workers_read_every_kind(uris, kind):
  assert hashes(uris[kind], 3, workers=2, start_batch=2) == hashes('package:speech_sample', 5)[2:]


def test_a_run_may_go_on_in_another_format_on_another_number_of_hosts(uris):
  fingerprints = {Mixture(DataConfig(train=uris[kind])).fingerprint for kind in KINDS}
  assert len(fingerprints) == 1
  for kind in KINDS:
    for rows in (range(3), range(3, 6)):  # two hosts
      assert (hashes(uris[kind], 2, start_batch=5, rows=rows)
              == hashes('package:speech_sample', 2, start_batch=5, rows=rows))


@pytest.mark.parametrize('kind', KINDS)
def test_held_out_utterances_and_labels_are_the_same(uris, kind):
  def held_out(uri):
    return held_out_utterances(DataConfig(held_out=uri), 16_000, 32_000, 4)

  found, expected = held_out(uris[kind]), held_out('package:speech_sample')
  assert found['ids'] == expected['ids'] and found['texts'] == expected['texts']
  assert found['audio'].tobytes() == expected['audio'].tobytes()
  filtered = DataConfig(train=(CorpusConfig(uris[kind], where='seconds >= 3 and speaker = asterisk-allison'),))
  assert 10 < len(Mixture(filtered)) < 54


def test_a_tilde_is_the_home_folder(uris, monkeypatch):
  where = {kind: uri.partition(':')[2] for kind, uri in uris.items()}
  home = where['folder'].rpartition('/')[0]
  monkeypatch.setenv('HOME', home)
  for kind, path in where.items():
    assert path.startswith(home)
    assert len(Mixture(DataConfig(train=f'{kind}:~{path.removeprefix(home)}'))) == 54
