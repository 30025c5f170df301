"""Layouts of codes for language models, their inverses, and rows of tokens that come from strangers."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from lmspt_jax.data.index import Index, table_from_rows
from lmspt_jax.errors import LmsptError
from lmspt_jax.slm.manifest import read_manifest
from lmspt_jax.slm.packing import delay, flatten, from_semantic_only, semantic_only, undelay, unflatten
from lmspt_jax.slm.plan import plan_shards
from lmspt_jax.slm.token_rows import TokenRow, from_table, pack_row, to_table, unpack_row
from lmspt_jax.slm.vocabulary import Vocabulary

SMALL = Vocabulary((4, 2, 3))  # tokens 3 to 6, 7 and 8, 9 to 11
IDS = np.array([[3, 0], [1, 0], [2, 1]], np.uint16)
RELEASE = Vocabulary((16384, *[4096] * 7))


def test_small_layouts_by_hand():
  assert SMALL.offsets == (3, 7, 9) and SMALL.size == 12
  assert flatten(IDS, SMALL).tolist() == [6, 8, 11, 3, 7, 10]
  assert delay(IDS, SMALL).tolist() == [[6, 3, 0, 0], [0, 8, 7, 0], [0, 0, 11, 10]]
  assert semantic_only(IDS, SMALL).tolist() == [6, 3]


@pytest.mark.parametrize('frames', [1, 2, 9, 500])
@pytest.mark.parametrize('vocabulary', [SMALL, RELEASE, Vocabulary((7,))], ids=lambda v: f'{len(v.codebook_sizes)}')
def test_layouts_can_be_undone(frames, vocabulary):
  rng = np.random.default_rng(frames)
  ids = np.stack([rng.integers(0, size, frames) for size in vocabulary.codebook_sizes]).astype(np.uint16)
  ids[:, 0], ids[:, -1] = 0, np.array(vocabulary.codebook_sizes) - 1  # both ends of each codebook
  for there, back in ((flatten, unflatten), (delay, undelay)):
    tokens = there(ids, vocabulary)
    assert tokens.dtype == np.int32 and tokens.max() < vocabulary.size
    np.testing.assert_array_equal(back(tokens, vocabulary), ids)
  np.testing.assert_array_equal(from_semantic_only(semantic_only(ids, vocabulary), vocabulary), ids[:1])


@pytest.mark.parametrize('function, value, message', [
    (flatten, IDS[:2], 'of shape (2, 2)'),
    (flatten, IDS.astype(float), 'float64'),
    (flatten, IDS + np.uint16(2), 'ids: 5 in frame 0 of codebook 0, which has 0 to 3'),
    (unflatten, np.arange(4), 'frames of 3 tokens'),
    (unflatten, np.array([6, 8, 12]), 'tokens: 12 in frame 0 of codebook 2, which has 9 to 11'),
    (unflatten, np.array([6, 8, 11, 8, 8, 11]), 'tokens: 8 in frame 1 of codebook 0'),
    (undelay, np.zeros((3, 2), int), '[3, at least 3]'),
    (undelay, np.array([[6, 3, 0, 0], [7, 8, 7, 0], [0, 0, 11, 10]]), 'codebook 1: a token other than pad'),
    (undelay, np.array([[6, 0, 0, 0], [0, 8, 7, 0], [0, 0, 11, 10]]), 'tokens: 0 in frame 1 of codebook 0'),
    (from_semantic_only, np.array([3, 7]), 'tokens: 7 in frame 1 of codebook 0'),
    (from_semantic_only, np.array([3.0]), 'float64'),
])
def test_what_a_model_made_up_is_refused(function, value, message):
  with pytest.raises(LmsptError) as error:
    function(value, SMALL)
  assert message in str(error.value)


def test_rows_survive_tables_and_records():
  rows = [TokenRow('a', 'Grüße', 'de', 's', 900, IDS), TokenRow('b', '', '', '', 31, IDS[:, :1]),
          TokenRow('c', 'x', 'en', '', 5000, np.tile(IDS, 50))]
  for found in (list(from_table(to_table(rows, 'uint16'))), [unpack_row(pack_row(row)) for row in rows]):
    for row, back in zip(rows, found, strict=True):
      np.testing.assert_array_equal(back.ids, row.ids)
      assert back.ids.dtype == np.uint16
      assert (back.id, back.text, back.language, back.speaker, back.num_samples) == (
          row.id, row.text, row.language, row.speaker, row.num_samples)
  assert next(from_table(to_table(rows[:1], 'int32'))).ids.dtype == np.int32


@pytest.mark.parametrize('changed', [
    {'shape': [3]}, {'shape': [3, 3]}, {'shape': [-3, -2]}, {'dtype': 'object'}, {'dtype': 'float64'}, {'ids': 'text'},
    {'id': 4}, {'num_samples': '900'}, {'shape': [3, 2**40]}, {'shape': None},
])
def test_records_that_are_none_are_refused(changed):
  fields = msgpack.unpackb(pack_row(TokenRow('a', '', '', '', 900, IDS)))
  with pytest.raises(LmsptError, match='not a row of tokens'):
    unpack_row(msgpack.packb(fields | changed))
  for record in (b'', b'\xc1', b'audio', msgpack.packb([1]), msgpack.packb({'id': 'a'})):
    with pytest.raises(LmsptError, match='not a row of tokens'):
      unpack_row(record)


@pytest.mark.parametrize('text, message', [
    ('[]', 'not written by lmspt tokenize'),
    ('{"format": "lmspt-tokens", "version": 9}', 'another version'),
    ('{"format": "lmspt-tokens", "version": 1, "hop": 3}', 'fields are missing or unknown'),
    ('{', 'not JSON'),
])
def test_manifests_that_are_none_are_refused(text, message, tmp_path):
  (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(LmsptError, match=message):
    read_manifest(tmp_path)


def test_vocabularies_that_are_none_are_refused():
  good = SMALL.to_json()
  assert Vocabulary.from_json(good, 'm') == SMALL
  for bad in (None, {}, good | {'size': 13}, good | {'codebooks': [{'offset': 3, 'size': 10**9}]},
              good | {'codebooks': []}, good | {'special_tokens': {}}):
    with pytest.raises(LmsptError, match='m: vocabulary'):
      Vocabulary.from_json(bad, 'm')


class Listed:
  """A source of which only splits and durations matter."""

  def __init__(self, splits, seconds):
    self.index = Index(table_from_rows([{'path': '', 'split': split, 'seconds': length}
                                        for split, length in zip(splits, seconds, strict=True)]))


def test_shards_hold_one_split_and_cover_every_row():
  splits, rng = ['dev'] * 3 + ['train'] * 1000, np.random.default_rng(0)
  shards = plan_shards(Listed(splits, rng.uniform(1, 20, 1003)), 300)
  assert [shard.name for shard in shards] == ['dev-00000-of-00001', *(f'train-{n:05d}-of-00004' for n in range(4))]
  assert [row for shard in shards for part in shard.parts for row in part] == list(range(1003))
  assert [shard.bounds[-1] - shard.bounds[0] for shard in shards] == [3, 300, 300, 300, 100]
  assert max(len(part) for shard in shards for part in shard.parts) <= 256
  long = plan_shards(Listed(['train'] * 60, [4 * 3600.0] * 60), 300)  # recordings of four hours
  assert [len(shard.parts) for shard in long] == [25, 25, 10]
  assert all(len(part) == 1 for shard in long for part in shard.parts)
  unknown = plan_shards(Listed(['train'] * 600, [float('nan')] * 600), 10_000)
  assert [len(part) for part in unknown[0].parts] == [256, 256, 88]
