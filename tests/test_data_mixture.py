"""Mixtures: shares, temperature, filters and limits, with the order still a function of (seed, index). Real speech."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from lmspt_jax.config import CorpusConfig, DataConfig
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.data.pipeline import training_batches
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.sources.folder import ASSETS
from lmspt_jax.errors import LmsptError

SAMPLE = CorpusConfig('package:speech_sample', split='')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """The bundled speech with made-up languages (40 en, 16 de, 8 fr), scores and, on every fourth line, no duration."""
  folder = tmp_path_factory.mktemp('corpus')
  shutil.copytree(ASSETS / 'speech_sample' / 'audio', folder / 'audio')
  rows = [json.loads(line) for line in (ASSETS / 'speech_sample' / 'manifest.jsonl').read_text().splitlines()]
  for number, row in enumerate(rows):
    row['language'] = 'fr' if number % 8 == 0 else 'de' if number % 4 == 1 else 'en'
    row['dnsmos'] = number / 10
    if number % 4 == 3:
      del row['seconds']
    if number == 5:
      del row['dnsmos']
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return CorpusConfig(f'folder:{folder}', split='')


def mixed(*corpora, **changes):
  return DataConfig(train=corpora, batch_size=8, num_workers=0, **changes)


def records(config, count, seed=1, **where):
  with training_batches(config, sample_rate=8_000, crop_samples=80, seed=seed, **where) as batches:
    return np.concatenate([next(batches)['record'] for _ in range(count)])


def languages(config, count):
  mixture = Mixture(config)
  return Counter(mixture[record].language for record in records(config, count).tolist())


# ---------------------------------------------------------------- shares


def test_weights_are_the_shares_of_the_examples(corpus):
  config = mixed(dataclasses.replace(SAMPLE, weight=3.0), dataclasses.replace(corpus, weight=1.0))
  drawn = records(config, 100)  # 800 examples
  assert (drawn < 64).mean() == pytest.approx(0.75, abs=0.005)
  for start in range(0, 768, 64):  # evenly: every stretch has its share
    assert (drawn[start:start + 64] < 64).sum() == pytest.approx(48, abs=2)
  first = drawn[drawn < 64]
  for epoch in range(len(first) // 64):  # each corpus goes through its own epochs
    assert sorted(first[epoch * 64:(epoch + 1) * 64]) == list(range(64))


def test_temperature_evens_languages_out(corpus):
  assert Mixture(mixed(corpus)).groups[0].language == ''
  shares = {}
  for temperature in (2.0, 1e9):
    found = languages(mixed(corpus, language_temperature=temperature), 50)
    shares[temperature] = {language: count / 400 for language, count in found.items()}
  roots = {language: (count / 64) ** 0.5 for language, count in {'en': 40, 'de': 16, 'fr': 8}.items()}
  assert shares[2.0] == pytest.approx({k: v / sum(roots.values()) for k, v in roots.items()}, abs=0.01)
  assert shares[1e9] == pytest.approx(dict.fromkeys(roots, 1 / 3), abs=0.01)


def test_temperature_keeps_corpora_in_proportion_within_a_language(corpus):
  config = mixed(dataclasses.replace(SAMPLE, weight=3.0), corpus, language_temperature=3.0)
  mixture = Mixture(config)
  english = [group for group in mixture.groups if group.language == 'en']
  assert english[0].weight / english[1].weight == pytest.approx(3.0 / (40 / 64))
  assert sum(group.weight for group in mixture.groups) == pytest.approx(1)


def test_a_mixture_is_the_same_for_hosts_workers_and_resumption(corpus):
  config = mixed(SAMPLE, dataclasses.replace(corpus, weight=2.0), language_temperature=2.0)
  expected = records(config, 6)
  assert np.array_equal(records(dataclasses.replace(config, num_workers=2), 6), expected)
  assert np.array_equal(records(config, 2, start_batch=4), expected[32:])
  hosts = [records(config, 6, rows=rows).reshape(6, 4) for rows in (range(4), range(4, 8))]
  assert np.array_equal(np.concatenate(hosts, axis=1).ravel(), expected)
  assert not np.array_equal(records(config, 6, seed=2), expected)


# ---------------------------------------------------------------- which utterances


@pytest.mark.parametrize('where, kept', [
    ('language = de', lambda row: row['language'] == 'de'),
    ('language in de,fr', lambda row: row['language'] in ('de', 'fr')),
    ('language not in de, fr and seconds < 4', lambda row: row['language'] == 'en' and row['length'] < 4),
    ('seconds >= 2 and seconds<4.5', lambda row: 2 <= row['length'] < 4.5),  # measured where the manifest has none
    ('dnsmos>3', lambda row: row.get('dnsmos', 0) > 3),  # a row without the score does not pass
    ('dnsmos != 3', lambda row: row.get('dnsmos', 3) != 3),
    ('speaker != asterisk-allison', lambda row: row['speaker'] != 'asterisk-allison'),
])
def test_filters(corpus, where, kept):
  mixture = Mixture(mixed(dataclasses.replace(corpus, where=where)))
  folder = open_source(corpus.uri)
  lengths = {utterance.id: len(utterance.load(16_000)) / 16_000 for utterance in folder}
  rows = [json.loads(line) for line in open(f'{folder.root}/manifest.jsonl')]
  expected = {row['id'] for row in rows if kept({**row, 'length': lengths[row['id']]})}
  assert 0 < len(expected) < 64
  assert {mixture[record].id for record in range(len(mixture))} == expected


def test_limits_nest_and_keep_the_order(corpus):
  def ids(**limits):
    mixture = Mixture(mixed(dataclasses.replace(corpus, **limits)))
    return [mixture[record].id for record in range(len(mixture))]

  few, more = ids(max_utterances=10), ids(max_utterances=20)
  assert len(few) == 10 and len(more) == 20 and set(few) < set(more)
  source = open_source(corpus.uri)
  assert more == [utterance.id for utterance in source if utterance.id in more]
  seconds = {utterance.id: len(utterance.load(16_000)) / 16_000 for utterance in source}
  minute = ids(max_hours=1 / 60)
  assert 45 < sum(seconds[key] for key in minute) <= 60
  assert set(ids(max_hours=1 / 120)) < set(minute)
  assert len(ids(max_hours=10)) == 64


@pytest.mark.parametrize('change, message', [
    ({'where': 'dnsmoss > 3'}, r"data\.train\.0\.where: the metadata has no 'dnsmoss', did you mean 'dnsmos'"),
    ({'where': 'language > de'}, r'language is text and can\'t be compared by >'),
    ({'where': 'seconds in 1,2'}, r'seconds in 1,2: seconds is a number'),
    ({'where': 'seconds > long'}, r'seconds > long: seconds is a number'),
    ({'where': 'short ones'}, r"'short ones' is no condition"),
    ({'where': 'language = nl'}, r"none of the 64 utterances .* where = 'language = nl'"),
    ({'weight': 0.0}, r'data\.train\.0\.weight = 0\.0: use a positive number'),
    ({'uri': ''}, r"data\.train\.0\.uri = '': give KIND:URI"),
])
def test_what_a_corpus_is_refused_for(corpus, change, message):
  config = mixed(dataclasses.replace(corpus, **change))
  with pytest.raises(LmsptError, match=message) as error:
    config.check()
    Mixture(config)
  assert '\n' not in str(error.value)


def test_the_fingerprint_is_of_utterances_and_shares_not_of_places(corpus, tmp_path):
  base = Mixture(mixed(corpus)).fingerprint
  shutil.copytree(open_source(corpus.uri).root, tmp_path / 'moved')
  moved = dataclasses.replace(corpus, uri=f'folder:{tmp_path / "moved"}')
  assert Mixture(mixed(moved)).fingerprint == base
  assert Mixture(mixed(moved, language_temperature=2.0)).fingerprint != base
  heavy = dataclasses.replace(SAMPLE, weight=2.0)
  assert Mixture(mixed(moved, heavy)).fingerprint not in (base, Mixture(mixed(heavy, moved)).fingerprint)
  (tmp_path / 'moved' / 'manifest.jsonl').write_text(''.join(
      (tmp_path / 'moved' / 'manifest.jsonl').read_text().splitlines(keepends=True)[1:]))
  assert Mixture(mixed(moved)).fingerprint != base


def test_a_large_index_is_mapped_from_the_cache_folder(corpus, tmp_path, monkeypatch):
  expected = records(mixed(corpus), 3)
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr('lmspt_jax.data.index.MAX_IN_MEMORY', 0)
  assert np.array_equal(records(mixed(corpus, language_temperature=1.0), 3), expected)
  assert np.array_equal(records(dataclasses.replace(mixed(corpus), num_workers=1), 3), expected)
  (cached,) = (tmp_path / 'cache' / 'index').iterdir()
  cached.write_bytes(cached.read_bytes()[:1000])  # cut short by a full disk
  assert np.array_equal(records(mixed(corpus), 3), expected)
  (tmp_path / 'file').touch()
  monkeypatch.setenv('LMSPT_CACHE', str(tmp_path / 'file'))
  with pytest.raises(LmsptError, match=r'the index can\'t be cached there .*; set LMSPT_CACHE'):
    records(mixed(corpus), 1)


def test_what_strangers_write_into_metadata_is_bounded(tmp_path):
  def opened(*rows):
    (tmp_path / 'manifest.jsonl').write_text('\n'.join(json.dumps({'path': f'{i}.wav', **row})
                                                       for i, row in enumerate(rows)))
    return open_source(f'folder:{tmp_path}')

  many = opened(*({'dnsmos': 3.0, **{f'score{i}_{j}': 1 for j in range(100)}} for i in range(100)))
  assert len(many.index.number_columns) == 65 and {'seconds', 'dnsmos'} < set(many.index.number_columns)
  odd = opened({'position': 5.0, 'path': '0.wav', 'huge': 10 ** 400, 'flag': True, 'nan': float('nan'), 'n': 1})
  assert odd.index.number_columns == ['seconds', 'n']
  for row, message in (({'text': '\ud800'}, 'text = .* holds half a character'), ({'text': ['a']}, r"text = \['a'\]"),
                       ({'speaker': 1.5}, 'speaker = 1.5: must be text'), ({'split': '../x'}, "split = '../x'")):
    with pytest.raises(LmsptError, match=rf'manifest\.jsonl:1: {message}'):
      opened(row)
