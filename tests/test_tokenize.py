"""`lmspt tokenize`: a corpus of real speech to token shards."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import grain.python as grain
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from _small_corpus import small_folder
from _tiny_run import write_run

from lmspt_jax import Tokenizer
from lmspt_jax.cli import main as cli
from lmspt_jax.data import dataset_info
from lmspt_jax.data.audio_io import read_audio
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import sha256
from lmspt_jax.slm import plan, quality, recordings
from lmspt_jax.slm.corpus import tokenize
from lmspt_jax.slm.manifest import read_manifest
from lmspt_jax.slm.token_rows import from_table, unpack_row
from lmspt_jax.slm.verification import verify

COUNT, PER_SHARD = 12, 5  # utterances; a split 'test' of 3, a split 'train' of 9
SHARDS = ['test-00000-of-00001', 'train-00000-of-00002', 'train-00001-of-00002']


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  """Several parts a shard."""
  monkeypatch.setattr(plan, '_PART_UTTERANCES', 2)


@pytest.fixture(scope='module')
def speech(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('speech')
  small_folder(folder, COUNT)
  return folder


@pytest.fixture(scope='module')
def tokens(tiny_tokenizer, speech, tmp_path_factory) -> Path:
  """The corpus tokenised without a break."""
  out = tmp_path_factory.mktemp('tokens')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, '_PART_UTTERANCES', 2)
    tokenize(tiny_tokenizer, f'folder:{speech}', out, shard_utterances=PER_SHARD, progress=False)
  return out


def files(out: Path) -> dict[str, bytes]:
  """All that a finished run leaves, but for its notes."""
  return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def parquet_rows(out: Path):
  return [row for path in read_manifest(out).paths(out, '.parquet') for row in from_table(pq.read_table(path))]


# ---------------------------------------------------------------- what is written


def test_every_utterance_once_with_its_own_codes(tiny_tokenizer, speech, tokens):
  manifest = [json.loads(line) for line in (speech / 'manifest.jsonl').read_text().splitlines()]
  rows = parquet_rows(tokens)
  assert [row.id for row in rows] == [row['id'] for row in sorted(manifest, key=lambda row: (row['split'], row['id']))]
  by_id = {row['id']: row for row in manifest}
  for row in rows:
    audio, rate = read_audio(speech / by_id[row.id]['path'], name=row.id)
    codes = tiny_tokenizer.encode(audio.T, sample_rate=rate)
    assert row.ids.dtype == np.uint16
    np.testing.assert_array_equal(row.ids, codes.ids)
    assert row.num_samples == codes.num_samples
    assert (row.text, row.language, row.speaker) == tuple(by_id[row.id][key] for key in ('text', 'language', 'speaker'))


def test_read_back_by_datasets_and_by_grain(tokens):
  rows = {row.id: row for row in parquet_rows(tokens)}
  found = read_manifest(tokens)
  table = datasets.load_dataset('parquet', data_files=[str(path) for path in found.paths(tokens, '.parquet')],
                                split='train', cache_dir=str(tokens.parent / 'hf'))
  assert [row['id'] for row in table] == list(rows)
  for row in table:
    np.testing.assert_array_equal(np.array(row['ids'], np.uint16), rows[row['id']].ids)
  source = grain.ArrayRecordDataSource([str(path) for path in found.paths(tokens, '.arrayrecord')])
  for row in grain.MapDataset.source(source).map(unpack_row):
    expected = rows.pop(row.id)
    assert row.ids.dtype == np.uint16
    np.testing.assert_array_equal(row.ids, expected.ids)
    assert (row.text, row.language, row.speaker, row.num_samples) == (
        expected.text, expected.language, expected.speaker, expected.num_samples)
  assert not rows


def test_the_manifest_says_what_is_there(tiny_tokenizer, tokens):
  manifest, rows = read_manifest(tokens), parquet_rows(tokens)
  assert [shard.name for shard in manifest.shards] == SHARDS
  assert [shard.utterances for shard in manifest.shards] == [3, 5, 4]
  for shard in manifest.shards:
    for suffix, file in shard.files.items():
      assert (tokens / f'{shard.name}{suffix}').stat().st_size == file['bytes']
      assert sha256(tokens / f'{shard.name}{suffix}') == file['sha256']
  assert manifest.model['hash'] == tiny_tokenizer.model_hash
  assert manifest.model['license'] == tiny_tokenizer.license
  assert (manifest.frame_rate, manifest.sample_rate, manifest.hop, manifest.dtype) == (50, 24_000, 480, 'uint16')
  assert manifest.codebook_sizes == (32, 16, 16, 16)
  assert manifest.vocabulary.to_json()['codebooks'] == [{'offset': 3, 'size': 32}, {'offset': 35, 'size': 16},
                                                       {'offset': 51, 'size': 16}, {'offset': 67, 'size': 16}]
  assert manifest.vocabulary.size == 83
  assert manifest.utterances == COUNT and manifest.frames == sum(row.ids.shape[1] for row in rows)
  assert manifest.tokens == 4 * manifest.frames
  assert manifest.hours == pytest.approx(sum(row.num_samples for row in rows) / 24_000 / 3600, abs=1e-6)
  assert {name: total['utterances'] for name, total in manifest.splits.items()} == {'test': 3, 'train': 9}
  assert manifest.languages == {'en': {'utterances': COUNT, 'hours': manifest.hours}}
  assert manifest.speakers == len({row.speaker for row in rows})
  assert manifest.data['licenses'] == {'CC-BY-SA-3.0': COUNT}
  for k, use in enumerate(manifest.codebooks):
    counts = np.bincount(np.concatenate([row.ids[k] for row in rows]))
    shares = counts[counts > 0] / counts.sum()
    assert use['used'] == len(shares)
    assert use['entropy'] == pytest.approx(-np.sum(shares * np.log2(shares)), abs=1e-4)
    assert use['perplexity'] == pytest.approx(2**use['entropy'], rel=1e-4)
  listed = [json.loads(line) for line in (tokens / 'degenerate.jsonl').read_text().splitlines()]
  assert manifest.degenerate == len(listed)


# ---------------------------------------------------------------- killed, and split over hosts


class Killed(BaseException):
  """Raised in a run's place of dying: nothing catches it."""


def test_killed_before_every_file_it_ends_with_the_same_bytes(tiny_tokenizer, speech, tokens, tmp_path, monkeypatch):
  """A run is stopped before its first rename, then before the second, ...: all that it ever has on disk."""
  replace, left = os.replace, 0

  def dying(*paths):
    nonlocal left
    left -= 1
    if left < 0:
      raise Killed
    replace(*paths)

  monkeypatch.setattr(dataset_info.os, 'replace', dying)
  wanted, stops = files(tokens), 0
  for stop in range(100):
    left = stop
    try:
      tokenize(tiny_tokenizer, f'folder:{speech}', tmp_path / str(stop), shard_utterances=PER_SHARD, progress=False)
    except Killed:
      stops += 1
    left = 1000
    tokenize(tiny_tokenizer, f'folder:{speech}', tmp_path / str(stop), shard_utterances=PER_SHARD, progress=False)
    assert files(tmp_path / str(stop)) == wanted
    assert not list((tmp_path / str(stop) / '.tokenize' / 'parts').iterdir())
    if stops <= stop:
      break
  assert stops == 1 + 7 + 3 * 3 + 3  # job.json, parts, three files a shard, faults, degenerate, manifest


def test_finished_shards_and_parts_are_not_encoded_again(tiny_tokenizer, speech, tokens, tmp_path, monkeypatch):
  out = tmp_path / 'tokens'
  shutil.copytree(tokens, out)
  encoded = []
  encode_each = tiny_tokenizer.encode_each
  monkeypatch.setattr(tiny_tokenizer, 'encode_each', lambda recordings: encode_each(
      (encoded.append(1), blocks)[1] for blocks in recordings))
  tokenize(tiny_tokenizer, f'folder:{speech}', out, shard_utterances=PER_SHARD, progress=False)
  assert not encoded
  (out / f'{SHARDS[1]}.parquet').write_bytes((out / f'{SHARDS[1]}.parquet').read_bytes()[:-1])  # a damaged file
  tokenize(tiny_tokenizer, f'folder:{speech}', out, shard_utterances=PER_SHARD, progress=False)
  assert len(encoded) == PER_SHARD
  assert files(out) == files(tokens)


def test_recordings_that_are_done_in_another_order(tiny_tokenizer, speech, tokens, tmp_path):
  """Programs of two rows, as on an accelerator: windows of rare sizes wait for company."""
  other = Tokenizer(tiny_tokenizer.model)
  other._program('encode')._rows = 2
  tokenize(other, f'folder:{speech}', tmp_path, shard_utterances=PER_SHARD, progress=False)
  assert files(tmp_path) == files(tokens)


# The command line with small parts, which says how many recordings it encoded.
COUNTING = """
import sys
from lmspt_jax.cli.main import main
from lmspt_jax.inference.tokenizer import Tokenizer
from lmspt_jax.slm import plan

def counting(tokenizer, recordings):
  count = 0
  for found in encode_each(tokenizer, recordings):
    count += 1
    yield found
  print('encoded', count)

plan._PART_UTTERANCES = 2
encode_each, Tokenizer.encode_each = Tokenizer.encode_each, counting
sys.exit(main(sys.argv[1:]))
"""


def test_two_hosts_of_two_devices_share_the_work(speech, tokens, tiny_run, tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  command = [sys.executable, '-c', COUNTING, 'tokenize', f'--model={tiny_run}', f'--data=folder:{speech}',
             f'--out={tmp_path / "out"}', f'--shard_utterances={PER_SHARD}', f'--coordinator=127.0.0.1:{port}',
             '--num-processes=2']
  started = [subprocess.Popen([*command, f'--process-id={host}'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'})
             for host in range(2)]
  ended = [process.communicate(timeout=120) for process in started]
  assert [process.returncode for process in started] == [0, 0], ended
  assert 'describes them' in ended[0][0] and 'describes them' not in ended[1][0]
  assert [int(out.split('encoded ')[1].split()[0]) for out, _ in ended] == [3 + 4, 5]  # shards 0 and 2, shard 1
  assert files(tmp_path / 'out') == files(tokens)


# ---------------------------------------------------------------- what can't be used


def test_bad_recordings_are_counted_and_the_rest_is_whole(tiny_tokenizer, speech, tokens, tmp_path, monkeypatch):
  folder = tmp_path / speech.name
  shutil.copytree(speech, folder)
  rows = [json.loads(line) for line in (folder / 'manifest.jsonl').read_text().splitlines()]
  cut, silent, gone, text = (row['id'] for row in rows[1:9:2])
  paths = {row['id']: folder / row['path'] for row in rows}
  paths[cut].write_bytes(paths[cut].read_bytes()[:-3000])
  soundfile.write(paths[silent], np.zeros(16_000), 16_000)
  paths[gone].unlink()
  paths[text].write_text('no audio at all')
  monkeypatch.setattr(recordings, '_WHOLE', 4000)  # all are decoded in blocks, in their turn
  data, options = f'folder:{folder}', {'shard_utterances': PER_SHARD, 'progress': False}
  with pytest.raises(LmsptError, match=r'4 of \d+ utterances can.t be used, more than max_fault_rate = 0.1'):
    tokenize(tiny_tokenizer, data, tmp_path / 'out', max_fault_rate=0.1, **options)
  faults = {cut: 'truncated', silent: 'silent', gone: 'missing', text: 'undecodable'}
  # The first that was met is mended: the part that it is in has to be made again.
  first = min(faults, key=lambda name: next((row['split'], name) for row in rows if row['id'] == name))
  shutil.copy(speech / paths[first].relative_to(folder), paths[first])
  del faults[first]
  manifest = tokenize(tiny_tokenizer, data, tmp_path / 'out', max_fault_rate=0.5, **options)
  assert {reason: entry['count'] for reason, entry in manifest.faults.items()} == dict.fromkeys(faults.values(), 1)
  listed = [json.loads(line) for line in (tmp_path / 'out' / 'faults.jsonl').read_text().splitlines()]
  assert {row['id']: row['reason'] for row in listed} == faults
  good = {row.id: row for row in parquet_rows(tmp_path / 'out')}
  assert good.keys() == {row['id'] for row in rows} - faults.keys()
  for row in parquet_rows(tokens):
    if row.id in good:
      np.testing.assert_array_equal(good[row.id].ids, row.ids)
  for row in rows:  # mended, and run again
    shutil.copy(speech / row['path'], folder / row['path'])
  tokenize(tiny_tokenizer, data, tmp_path / 'out', **options)
  mended, whole = files(tmp_path / 'out'), files(tokens)
  assert mended.keys() == whole.keys()
  assert [name for name in whole if mended[name] != whole[name]] == []


def test_tokens_of_another_model_or_of_other_data_are_refused(tiny_tokenizer, speech, tokens, tmp_path):
  out = tmp_path / 'tokens'
  shutil.copytree(tokens, out)
  other = Tokenizer.from_pretrained(write_run(tmp_path / 'run', name='other', quirks=tiny_tokenizer.config.quirks,
                                              model=dataclasses.replace(tiny_tokenizer.config.model, causal=True)))
  options = {'shard_utterances': PER_SHARD, 'progress': False}
  with pytest.raises(LmsptError, match=f'holds tokens made with model {tiny_tokenizer.model_hash}, not model '
                                       f'{other.model_hash}'):
    tokenize(other, f'folder:{speech}', out, **options)
  with pytest.raises(LmsptError, match=r'holds tokens made with data .*choose another --out'):
    tokenize(tiny_tokenizer, f'folder:{speech}', out, split='train', **options)
  with pytest.raises(LmsptError, match='not of this one'):
    verify(other, f'folder:{speech}', out, 3)
  assert files(out) == files(tokens)


def test_a_full_disk_costs_one_line_and_nothing_else(tiny_run, speech, tokens, tmp_path, capsys):
  arguments = ['tokenize', f'--model={tiny_run}', f'--data=folder:{speech}', f'--out={tmp_path}',
               f'--shard_utterances={PER_SHARD}']
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # enough for parts, not for a shard
  try:
    status = cli.main(arguments)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  line = capsys.readouterr().err.splitlines()[-1]
  assert status == 1 and line.startswith('lmspt: error: ') and 'make room' in line and str(tmp_path) in line
  assert cli.main(arguments) == 0
  assert files(tmp_path) == files(tokens)


@pytest.mark.parametrize('arguments, message', [
    (['--shard_utterances=0'], 'shard_utterances = 0'),
    (['--max_fault_rate=2'], 'max_fault_rate = 2.0'),
    (['--verify=0'], '--verify=0'),
    (['--verify'], 'manifest.json: no such file'),
    (['--split=none'], "no utterances in split 'none'"),
])
def test_wrong_arguments_are_one_line(arguments, message, tiny_run, speech, tmp_path, capsys):
  assert cli.main(['tokenize', f'--model={tiny_run}', f'--data=folder:{speech}', f'--out={tmp_path}', *arguments]) == 1
  assert message in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- verification and quality


def test_verification_finds_what_differs(tiny_run, tiny_tokenizer, speech, tokens, tmp_path, capsys):
  arguments = ['tokenize', f'--model={tiny_run}', '--verify=12', f'--out={tokens}']
  assert cli.main([*arguments, f'--data=folder:{speech}']) == 0
  assert f'{read_manifest(tokens).tokens} tokens of 12 utterances compared' in capsys.readouterr().out
  folder = tmp_path / 'speech'
  shutil.copytree(speech, folder)
  row = json.loads((folder / 'manifest.jsonl').read_text().splitlines()[2])
  audio, rate = soundfile.read(folder / row['path'])
  soundfile.write(folder / row['path'], 0.5 * audio, rate)
  found = verify(tiny_tokenizer, f'folder:{folder}', tokens, 12)
  assert list(found.differing) == [row['id']] and 0 < found.differing[row['id']] < found.tokens / 4
  assert cli.main([*arguments, f'--data=folder:{folder}']) == 1
  assert f'the first {row["id"]!r}' in capsys.readouterr().err
  assert verify(tiny_tokenizer, f'folder:{speech}', tokens, 4, seed=1).utterances == 4
  shutil.copytree(tokens, tmp_path / 'tokens')
  path = tmp_path / 'tokens' / f'{SHARDS[0]}.arrayrecord'
  path.write_bytes(path.read_bytes()[:-1] + b'\1')
  with pytest.raises(LmsptError, match=f'{SHARDS[0]}.arrayrecord: not as manifest.json says'):
    verify(tiny_tokenizer, f'folder:{speech}', tmp_path / 'tokens', 1)


def test_an_utterance_of_mostly_one_code_is_listed(tiny_tokenizer, speech, tokens, tmp_path):
  row = parquet_rows(tokens)[0]
  assert quality.degenerate(row) is None
  tone = tmp_path / 'tone'
  tone.mkdir()
  soundfile.write(tone / 'tone.wav', 0.3 * np.sign(np.sin(np.arange(48_000) * np.pi * 100 / 24_000)), 24_000)
  shutil.copy(speech / 'audio' / f'{row.id}.flac', tone)
  manifest = tokenize(tiny_tokenizer, f'folder:{tone}', tmp_path / 'out', progress=False)
  listed = [json.loads(line) for line in (tmp_path / 'out' / 'degenerate.jsonl').read_text().splitlines()]
  assert [row['id'] for row in listed] == ['tone'] and manifest.degenerate == 1
  ids = {row.id: row.ids for row in parquet_rows(tmp_path / 'out')}['tone']
  codes, counts = np.unique(ids[listed[0]['codebook']], return_counts=True)
  assert listed[0]['code'] == codes[counts.argmax()]
  assert listed[0]['share'] == pytest.approx(counts.max() / ids.shape[1], abs=1e-4)


def test_a_codebook_that_is_hardly_used_is_said():
  used, collapsed, unknown = np.full(100, 30), np.zeros(100, np.int64), np.zeros(100, np.int64)
  collapsed[:3], unknown[:3] = 1000, 300
  assert quality.warnings([used, collapsed, unknown]) == [
      'codebook 1: 3 of 100 codes are used; has it collapsed?']
