"""Held-out metrics in training: which are asked for, that they are those of `lmspt evaluate`, the best by one of them,
and what TensorBoard gets to show and to play."""

from __future__ import annotations

import io
import math
import struct

import jax
import numpy as np
import pytest
import soundfile
from make_golden_step import TINY, replaced
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from lmspt_jax.checkpoint import Best
from lmspt_jax.data.pipeline import held_out_utterances
from lmspt_jax.errors import LmsptError
from lmspt_jax.measures import measure, names
from lmspt_jax.measures.measure import Measured
from lmspt_jax.measures.names import METRICS
from lmspt_jax.measures.pictures import spectrogram
from lmspt_jax.measures.signal import si_sdr
from lmspt_jax.measures.spectral import spectral_distances
from lmspt_jax.metrics import MetricWriter
from lmspt_jax.models.tokenizer import PATHS
from lmspt_jax.training import evaluators
from lmspt_jax.training.best import BestEvaluation
from lmspt_jax.training.evaluators import Evaluators, wanted_metrics
from lmspt_jax.training.held_out import Sample, in_a_line, show

HELD = replaced(TINY, data__held_out='package:speech_sample', train__eval_seconds=2.0)


def asking(**train):
  return replaced(HELD, **{f'train__{key}': value for key, value in train.items()})


# ---------------------------------------------------------------- which


def test_what_is_asked_for():
  assert wanted_metrics(HELD) == ()
  assert wanted_metrics(asking(eval_metrics='pesq, wer,')) == ('pesq', 'wer')
  assert wanted_metrics(asking(eval_metrics='all')) == tuple(METRICS)
  with pytest.raises(LmsptError, match=r"train\.eval_metrics = 'pesq,wer,mos': 'mos' is none; use 'all' or some of"):
    wanted_metrics(asking(eval_metrics='pesq,wer,mos'))
  with pytest.raises(LmsptError, match='nothing is held out'):
    wanted_metrics(replaced(TINY, train__eval_metrics='pesq'))


def test_only_what_is_asked_for_needs_its_packages(monkeypatch):
  utterances = held_out_utterances(HELD.data, 16_000, 32_000, 2)
  find = names.importlib.util.find_spec
  monkeypatch.setattr(names.importlib.util, 'find_spec', lambda name: None if name == 'speechmos' else find(name))
  Evaluators(HELD, ('stoi', 'mel_distance'), utterances)
  with pytest.raises(LmsptError, match=r"needs speechmos: pip install 'lmspt_jax\[evaluate\]'"):
    Evaluators(HELD, ('stoi', 'dnsmos'), utterances)


def test_transcripts_of_what_was_cut_off_are_not_scored():
  utterances = held_out_utterances(HELD.data, 16_000, 32_000, 2)
  assert utterances['whole'] == [False, False] and utterances['num_samples'].tolist() == [32_000, 32_000]
  assert held_out_utterances(HELD.data, 16_000, 480_000, 2)['whole'] == [True, True]
  with pytest.raises(LmsptError, match=r'none has a transcript and is within train\.eval_seconds = 2; raise that'):
    Evaluators(asking(eval_metrics='wer'), ('wer',), utterances)
  config = asking(eval_metrics='wer', eval_asr='package:nothing')
  with pytest.raises(LmsptError, match=r"train\.eval_asr = 'package:nothing'"):
    Evaluators(config, ('wer',), {**utterances, 'whole': [True, True]})


# ---------------------------------------------------------------- what


@pytest.fixture
def here(monkeypatch):
  """The pool measures in this process."""
  monkeypatch.setattr(evaluators, 'Pool', lambda processes: measure.Pool(0))


def test_they_are_the_metrics_of_evaluate(here, monkeypatch):
  """On the run's mesh; a model at another rate; equal audio is perfect, and noise is what it is by hand."""
  utterances = held_out_utterances(HELD.data, 16_000, 32_000, 2)
  wanted = ('si_sdr', 'mel_distance', 'pitch_error')
  evaluate, meshes = Evaluators(HELD, wanted, utterances), []
  measure_on_device = evaluators.measure_on_device
  monkeypatch.setattr(evaluators, 'measure_on_device', lambda *arguments: (
      meshes.append(jax.sharding.get_abstract_mesh()), measure_on_device(*arguments))[1])
  noise_N = 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
  originals = list(utterances['audio'])
  longer = [np.pad(audio_N, (0, 160)) for audio_N in originals]  # as a decoder may give it
  waves = [{'full': long_N, 'semantic': audio_N + noise_N, 'resynthesis': np.zeros(32_000, np.float32)}
           for audio_N, long_N in zip(originals, longer, strict=True)]
  with jax.set_mesh(jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3)):
    found = evaluate(waves)
  assert meshes and all(mesh.empty for mesh in meshes)  # the other hosts of a mesh would not take part
  assert found['full/si_sdr'] == 100 and found['full/mel_distance'] == found['full/pitch_error'] == 0
  by_hand = [(si_sdr(audio_N, audio_N + noise_N), spectral_distances(audio_N, audio_N + noise_N)[0])
             for audio_N in originals]
  assert (found['semantic/si_sdr'], found['semantic/mel_distance']) == pytest.approx(np.mean(by_hand, axis=0))
  assert math.isnan(found['resynthesis/si_sdr']) and found['resynthesis/si_sdr_missing'] == 2
  assert not any(name.startswith('original') or 'voicing' in name for name in found)
  assert evaluate(waves).items() >= {k: v for k, v in found.items() if v == v}.items()  # and again


def test_a_figure_is_a_ratio_of_sums_and_what_is_missing_is_counted():
  wrong = lambda errors, words: Measured({'wer': errors / words, 'word_errors': errors, 'words': words, 'stoi': 0.5})
  rows = [{'original': wrong(0, 10), **dict.fromkeys(PATHS, wrong(1, 10))},
          {'original': wrong(0, 2), **dict.fromkeys(PATHS, wrong(2, 2))},
          {'original': Measured(), **dict.fromkeys(PATHS, Measured(missing={'wer': 'no transcript'}))}]
  found = evaluators._figures(('wer', 'stoi'), rows)
  assert found['full/wer'] == 3 / 12 and found['full/wer_missing'] == 1
  assert found['original/wer'] == 0 and found['full/stoi'] == 0.5 and 'original/stoi' not in found
  assert in_a_line({'mel': 1.0, **found}) == 'mel 1, full/wer 0.25, full/stoi 0.5'


# ---------------------------------------------------------------- the best


def test_the_best_is_the_first_of_the_best():
  lowest, highest = (BestEvaluation(asking(best_metric=name), ('pesq',)) for name in
                     ('held_out/mel', 'held_out/full/pesq'))
  values = [0.1, 3.0, math.nan, 2.0, 2.0, 4.0]  # step 0 is none
  assert [lowest.update(step, {'mel': value}) for step, value in enumerate(values)] == [
      False, True, False, True, False, False]
  assert lowest.record == {'metric': 'held_out/mel', 'step': 3, 'value': 2.0}
  assert [highest.update(step, {'full/pesq': value}) for step, value in enumerate(values)] == [
      False, True, False, False, False, True]
  again = BestEvaluation(asking(best_metric='held_out/mel'), ())
  again.resume(Best.of({'best': lowest.record}))
  assert not again.update(6, {'mel': 2.5}) and again.update(7, {'mel': 1.5})
  again.resume(Best.of({'best': highest.record}))
  assert again.best is None  # by another metric
  off = BestEvaluation(HELD, ())
  assert not off.update(1, {'mel': 1.0}) and off.record is None


def test_a_metric_that_is_not_measured_is_refused():
  with pytest.raises(LmsptError, match=r'full/pesq.: not measured; use held_out/mel, .*held_out/full/stoi'):
    BestEvaluation(asking(best_metric='held_out/full/pesq'), ('stoi',))
  with pytest.raises(LmsptError, match='nothing is held out'):
    BestEvaluation(replaced(TINY, train__best_metric='held_out/mel'), ())


# ---------------------------------------------------------------- TensorBoard


def events(folder):
  """What TensorBoard's files hold: framed as length, checksum, data, checksum."""
  found = []
  for path in sorted(folder.glob('events*')):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack_from('<Q', data)
      found.append(Event.FromString(data[12:12 + length]))
      data = data[16 + length:]
  return [(event.step, value) for event in found for value in event.summary.value]


def test_tensorboard_can_play_and_show_them(tmp_path, capsys):
  rates = {'original': 24_000, 'full': 24_000, 'semantic': 24_000, 'resynthesis': 16_000}
  tone = lambda rate, hertz: np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
  waves = {kind: tone(rate, hertz) for (kind, rate), hertz in zip(rates.items(), (440, 440, 880, 3000), strict=True)}
  waves['full'] = 2 * waves['full']  # past full scale, which must not be an error
  writer = MetricWriter(tmp_path, 0)
  show([Sample('a b/ü', waves, rates)], 7, tmp_path / 'held_out', writer)
  writer.close()
  assert capsys.readouterr().out == ''  # tensorboardX would tell of clipping
  assert len(list((tmp_path / 'held_out').glob('a b_ü.*.wav'))) == 4
  found = {value.tag: (step, value) for step, value in events(tmp_path / 'tensorboard')}
  assert found.keys() == {f'held_out/a_b_ü/{kind}' for kind in (*rates, 'original_full_semantic_resynthesis')}
  for kind, rate in rates.items():
    step, value = found[f'held_out/a_b_ü/{kind}']
    audio_N, played = soundfile.read(io.BytesIO(value.audio.encoded_audio_string))
    assert step == 7 and played == value.audio.sample_rate == rate
    np.testing.assert_allclose(audio_N, np.clip(waves[kind], -1, 1), atol=1e-4)
  picture = np.asarray(Image.open(io.BytesIO(
      found['held_out/a_b_ü/original_full_semantic_resynthesis'][1].image.encoded_image_string)).convert('L'))
  parts = np.split(picture, [80, 84, 164, 168, 248, 252])
  assert [part.shape for part in parts[::2]] == [(80, 101)] * 4 and all((gap == 255).all() for gap in parts[1::2])
  loudest = [80 - int(np.median(np.argmax(part[:, 10:-10], axis=0))) for part in parts[::2]]
  assert abs(loudest[0] - loudest[1]) <= 1 < loudest[2] - loudest[1] < loudest[3] - loudest[2]  # bands from below
  expected = np.round(255 * spectrogram(waves['resynthesis'])[::-1])
  np.testing.assert_array_equal(parts[-1], expected)
