"""`lmspt evaluate` on an untrained model and real speech: what is counted, repeated, compared and said about faults."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import soundfile
from _browser import NAMES, chromium, look
from _tiny_run import write_run

from lmspt_jax.cli.main import main
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.errors import LmsptError
from lmspt_jax.evaluation import report, run, summary
from lmspt_jax.evaluation.run import METRICS_FILE, ROWS_FILE, Settings, evaluate
from lmspt_jax.evaluation.systems import BASELINES, load_models
from lmspt_jax.inference.tokenizer import PATHS, Tokenizer
from lmspt_jax.measures import ears, quality, signal, statistics
from lmspt_jax.measures.ears import language_code
from lmspt_jax.measures.names import METRICS
from lmspt_jax.models.whisper_decoding import Listener

SPOKEN = ('asterisk-vm-reachoper', 'asterisk-queue-thereare')


@pytest.fixture(scope='module')
def recordings(tmp_path_factory, speech_folder):
  """Two of the shortest utterances, one in a language that the ASR does not know, a silent one, and no audio at all."""
  folder = tmp_path_factory.mktemp('recordings')
  rows = {row['id']: row for row in map(json.loads, (speech_folder / 'manifest.jsonl').read_text().splitlines())}
  lines = []
  for name in SPOKEN:
    (folder / f'{name}.flac').write_bytes((speech_folder / rows[name]['path']).read_bytes())
    lines.append({'id': name, 'path': f'{name}.flac', 'text': rows[name]['text'], 'language': 'en-US'})
  (folder / 'c_foreign.flac').write_bytes((folder / f'{SPOKEN[0]}.flac').read_bytes())
  soundfile.write(folder / 'd_silent.wav', np.zeros(4000, np.float32), 16_000)
  (folder / 'e_broken.wav').write_bytes(b'RIFF')
  lines += [{'id': 'c_foreign', 'path': 'c_foreign.flac', 'text': 'kdo tam', 'language': 'cs'},
            {'id': 'd_silent', 'path': 'd_silent.wav'}, {'id': 'e_broken', 'path': 'e_broken.wav', 'text': 'nothing'}]
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps({**line, 'split': 'test'}) + '\n' for line in lines))
  return folder


def _five_seconds(uri, parts=('encoder',)):
  """Whisper with windows of 5 s, which take a sixth of the time and hear the same words in recordings of 2 s."""
  found = load_whisper(uri, parts)
  return dataclasses.replace(found, dims=dataclasses.replace(found.dims, audio_context=250))


@pytest.fixture(scope='module')
def evaluated(tiny_run, recordings, tmp_path_factory):
  """Twice: with another model beside it and all at once, and alone one by one."""
  out = tmp_path_factory.mktemp('evaluated')
  other = write_run(out / 'other', name='other')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ears, 'Listener', functools.partial(Listener, max_tokens=12))  # noise can be heard as a long text
    patch.setattr(run, 'load_whisper', _five_seconds)
    # The slowest of all; tests/test_evaluation_metrics.py has it.
    patch.setattr(quality, 'dnsmos_scores', lambda audio_N: dict.fromkeys(quality.NAMES.values(), float(audio_N.max())))
    settings = Settings(str(tiny_run), f'folder:{recordings}', baselines=(str(other),), batch_size=8,
                        teacher='package:tiny.en')
    whole = evaluate(settings, out / 'all', processes=0)
    single = evaluate(dataclasses.replace(settings, baselines=(), batch_size=1), out / 'one', processes=0)
  rows = {name: [json.loads(line) for line in (out / name / ROWS_FILE).read_text().splitlines()]
          for name in ('all', 'one')}
  assert json.loads((out / 'all' / METRICS_FILE).read_text()) == whole
  return whole, single, rows, out


def test_batch_size_changes_no_number(evaluated):
  whole, single, rows, _ = evaluated
  assert single['systems'].keys() == {'original', *PATHS, *BASELINES}
  for system, entry in single['systems'].items():
    assert entry == whole['systems'][system], system
  assert single['tokens']['model'] == whole['tokens']['model']
  assert single['hashes']['data'] == whole['hashes']['data']
  for one, many in zip(rows['one'], rows['all'], strict=True):
    assert all(many['systems'][system] == found for system, found in one['systems'].items())


def test_what_is_missing_is_counted_with_its_reason(evaluated):
  whole, _, rows, _ = evaluated
  figures = {system: entry['metrics'] for system, entry in whole['systems'].items()}
  for system in figures:
    for name, figure in figures[system].items():
      assert figure['count'] + figure['missing'] == 5, (system, name)
  assert figures['full'].keys() == METRICS.keys()
  assert figures['original'].keys() == {name for name, metric in METRICS.items() if not metric.needs_original}
  assert (figures['original']['wer']['count'], figures['original']['wer']['missing']) == (2, 3)
  assert figures['narrow_8k']['pesq']['count'] == 3 and figures['full']['mel_distance']['count'] == 4
  by_id = {row['id']: row for row in rows['all']}
  assert 'English only' in by_id['c_foreign']['systems']['full']['missing']['wer']
  assert by_id['d_silent']['systems']['full']['missing']['wer'] == 'no transcript with words'
  assert 'silent' in by_id['d_silent']['systems']['narrow_8k']['missing']['pesq']
  assert 'e_broken' in by_id['e_broken']['fault'] and whole['data']['faults'].keys() == {'e_broken'}
  assert whole['data']['utterances'] == 5


def test_rows_are_the_metrics_by_hand(evaluated, tiny_run, speech_folder):
  whole, _, rows, _ = evaluated
  original_N, rate = soundfile.read(speech_folder / f'audio/{SPOKEN[0]}.flac', dtype='float32')
  tokenizer = Tokenizer.from_pretrained(tiny_run)
  codes = tokenizer.encode(original_N, sample_rate=rate)
  decoded_N = tokenizer.decode(codes, 'resynthesis')
  row = next(row for row in rows['all'] if row['id'] == SPOKEN[0])
  assert row['codes'][''] == codes.ids.tolist()
  found = row['systems']['resynthesis']
  assert found['values']['si_sdr'] == pytest.approx(signal.si_sdr(original_N, decoded_N[:len(original_N)]), abs=1e-4)
  assert found['values']['teacher_distance'] == pytest.approx(np.mean(found['along_time']), abs=1e-3)
  assert len(found['along_time']) == -(-len(original_N) // 320)
  tokens = whole['tokens']['model']
  assert [entry['size'] for entry in tokens] == [32, 16, 16, 16]
  assert whole['systems']['full']['bitrate'] == 50 * (5 + 4 + 4 + 4)
  assert whole['hashes']['model'] == tokenizer.model_hash and len(whole['hashes']['asr']) == 64


def test_good_speech_beats_an_untrained_model(evaluated):
  figures = {system: entry['metrics'] for system, entry in evaluated[0]['systems'].items()}
  assert figures['original']['wer']['value'] < 0.3 < figures['full']['wer']['value']
  for name in ('pesq', 'stoi', 'speaker_similarity', 'voicing_f1'):
    assert figures['opus_12k'][name]['value'] > figures['full'][name]['value'], name
  for name in ('mel_distance', 'stft_distance', 'teacher_distance'):
    assert figures['opus_12k'][name]['value'] < figures['full'][name]['value'], name


def test_models_are_compared_pair_by_pair(evaluated):
  whole = evaluated[0]
  pairs = {(entry['first'], entry['second']): entry['metrics'] for entry in whole['comparisons']}
  assert {('full', 'other/full'), ('semantic', 'other/semantic'), ('full', 'opus_6k')} <= pairs.keys()
  same = pairs['full', 'other/full']['mel_distance']  # its weights are the same
  assert (same['value'], same['low'], same['high'], same['p'], same['count']) == (0, 0, 0, 1, 4)
  assert pairs['full', 'opus_6k']['mel_distance']['p'] == 2 / 2**4
  assert 'pesq' not in pairs['full', 'original'] and 'wer' in pairs['full', 'original']


def test_a_ratio_is_of_sums_and_comparisons_need_both():
  def row(**systems):
    return {'systems': {name: {'values': values} for name, values in systems.items()}}

  wrong = lambda errors, words: {'wer': errors / words, 'word_errors': errors, 'words': words}
  rows = [row(a=wrong(1, 10), b=wrong(3, 10)), row(a=wrong(1, 2), b=wrong(1, 2)), row(a=wrong(9, 9), b={})]
  assert summary.system_figures(rows, 'a')['wer']['value'] == 11 / 21
  found = summary.comparisons(rows, 'a', 'b')['wer']
  assert (found['value'], found['count'], found['missing']) == (-2 / 12, 2, 1)
  assert found['p'] == statistics.compare([1, 1], [3, 1], [10, 2]).p


def test_labels_of_languages_and_systems(tiny_run):
  assert [language_code(label) for label in ('', 'en', 'en-GB', 'pt_BR')] == ['en', 'en', 'en', 'pt']
  with pytest.raises(LmsptError, match='another system is called'):
    load_models(str(tiny_run), [str(tiny_run), str(tiny_run)])


def test_the_command_line(tiny_run, recordings, tmp_path, capsys, monkeypatch):
  seen = []

  def recorded(settings, out):
    seen.append((settings, out))
    nothing = {'value': None, 'low': None, 'high': None}
    return {'systems': {'full': {'metrics': {'wer': {'value': 0.5, 'low': 0.4, 'high': 0.6}, 'cer': nothing}}},
            'data': {'utterances': 5, 'seconds': 3.0, 'faults': {}}}

  monkeypatch.setattr(run, 'evaluate', recorded)
  command = ['evaluate', f'--model={tiny_run}', f'--out={tmp_path}']
  assert main([*command, '--data=folder:x', '--baseline=a', '--baseline=b',
               '--beams=5', '--limit=3', '--split=test', '--batch-size=2']) == 0
  assert seen == [(Settings(str(tiny_run), 'folder:x', 'test', 3, ('a', 'b'), beams=5, batch_size=2), str(tmp_path))]
  assert '0.500 0.40-0.60' in capsys.readouterr().out
  monkeypatch.undo()
  for arguments, words in ((['--batch-size=0'], '--batch-size=0: must be at least 1'),
                           (['--split=no'], "no utterances in split 'no'"), (['--asr=tiny'], "'tiny'"),
                           (['--teacher=hf:none'], '--teacher=package:tiny.en')):
    assert main([*command, f'--data=folder:{recordings}', *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


@pytest.mark.skipif(chromium() is None, reason=f'no Chromium: none of {", ".join(NAMES)} (apt-get install chromium)')
def test_the_report_in_chromium(evaluated, tmp_path):
  """Opened from disk: every player sounds, nothing is asked of the network, and it fits a phone, light and dark."""
  found = look(evaluated[3] / 'all' / report.REPORT_FILE, tmp_path / 'report.png')
  assert found['said'] == [] and set(found['asked']) <= {'file', 'data', 'blob'}
  names = [player['name'] for player in found['played']]
  assert len(names) == len(set(names)) == 4 * 4  # four utterances have audio
  assert all(player['seconds'] > 0.2 and player['others'] <= 1 for player in found['played'])
  assert any(player['cursor'] not in ('', '0%') for player in found['played'])
  assert found['unnamed'] == 0 and found['too_wide'] <= 0 and found['light'] != found['dark']
  assert all(text and width > 1 and height > 1 for text, width, height in found['images'])
  assert len(found['images']) == 4 * 5 and all(text and count for text, count in found['charts'])
  assert found['headings'] == ['Summary', 'Differences', 'Distributions over utterances', 'Codebooks', 'Utterances',
                               'Worst utterances']
  assert (tmp_path / 'report.png').stat().st_size > 50_000


def test_the_report_shows_what_it_is_given(evaluated, tmp_path):
  whole, _, rows, out = evaluated
  text = (out / 'all' / report.REPORT_FILE).read_text('utf-8')
  assert not re.search(r'(src|href)="(?!data:)', text) and 'url(' not in text and '@import' not in text
  full = whole['systems']['full']['metrics']['mel_distance']
  assert f'<td>{full["value"]:.3g}<small>[{full["low"]:.3g}, {full["high"]:.3g}]</small>' in text
  hostile = {**rows['all'][0], 'id': '<script>x</script>', 'text': '<img src=x onerror=y> press'}
  hostile['systems'] = {**hostile['systems'], 'full': {**hostile['systems']['full'], 'heard': '<b>'}}
  example = report.Example(hostile, {'full': np.zeros(1600, np.float32)}, np.zeros((4, 3), int))
  settings = {**whole['settings'], 'model': '"><script>'}
  page = report.page({**whole, 'settings': settings}, rows['all'], [example], [], {'loss/mel': ([0, 10], [2.0, 1.0])})
  assert page.count('<script>') == 1 and '<img src=x' not in page and '<b>' not in page
  assert 'loss/mel: 2 to 1' in page and '<del title="not heard">' in page
  hostile['systems']['full']['heard'] = 'do ' * 100
  page = report.page(whole, rows['all'], [dataclasses.replace(example, row=hostile)], [], {})
  assert re.search(r'do do … \(7\d more words\)</ins>', page) and page.count('do do') < 24


def test_curves_are_of_runs_alone(tmp_path):
  assert report.run_curves(str(tmp_path / 'model.safetensors')) == {}
  rows = [{'step': 0, 'held_out/mel': 3.0, 'loss/codebook': 0.0, 'time/step': 1.0},
          {'step': 10, 'held_out/mel': 2.0, 'loss/codebook': 0.0, 'loss/mel': None}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 2')
  assert report.run_curves(str(tmp_path)) == {'held_out/mel': ([0, 10], [3.0, 2.0])}


def test_the_worst_have_most_words_wrong():
  def row(**values):
    return {'systems': {'full': {'values': values}} if values else {}}

  rows = [row(wer=0.1, mel_distance=9), row(wer=0.9, mel_distance=1), row(mel_distance=20), row(),
          row(wer=0.9, mel_distance=2), row(wer=0.5, mel_distance=5), row(wer=0.2, mel_distance=5),
          row(wer=0.4, mel_distance=5)]
  assert report.choose(rows) == ([0, 4, 7], [1, 5, 6])
  assert report.choose([row()]) == ([], [])
