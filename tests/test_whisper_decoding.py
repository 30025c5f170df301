"""Greedy and beam search against one written out in Python, and what a recording's length and neighbours change."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jiwer
import numpy as np
import pytest
import soundfile
from _whisper_files import SMALL, small_params
from whisper_normalizer.english import EnglishTextNormalizer

from lmspt_jax.convert import whisper as convert
from lmspt_jax.models import whisper
from lmspt_jax.models.whisper_decoding import Listener, WhisperVocabulary, beam_search

SAMPLE = Path(__file__).parents[1] / 'lmspt_jax/assets/speech_sample'
PROMPT, END, SUPPRESSED, AT_FIRST, MAX_TOKENS = (3, 5), 6, (1, 2), (4, 6), 8


@pytest.fixture(scope='module')
def decoder():
  """A small decoder that is sure of little: hypotheses end at different steps, and beams change places."""
  params = small_params()['decoder']
  table_VD = params['embedding']['embedding']
  table_VD *= 0.15
  table_VD[END] *= 2
  return params


def _searched(logits, beams: int) -> list[int]:
  """openai-whisper's search in words: every candidate is ranked, and those that end are taken until the beams are full.

  `logits` takes tokens and gives those of the next one.
  """
  going, ended = [(0.0, [])], []
  for i in range(MAX_TOKENS):
    candidates = []
    for score, tokens in going:
      next_V = np.array(logits([*PROMPT, *tokens]), np.float64)
      next_V[list(SUPPRESSED if i else SUPPRESSED + AT_FIRST)] = -np.inf
      log_V = next_V - np.log(np.sum(np.exp(next_V)))
      candidates += [(score + log_V[token], [*tokens, token]) for token in np.argsort(-log_V)[:beams + 1]]
    going = []
    for score, tokens in sorted(candidates, key=lambda candidate: -candidate[0]):
      if tokens[-1] == END:
        ended += [(score / i, tokens[:-1])] if len(ended) < beams else []
      else:
        going.append((score, tokens))
      if len(going) == beams:
        break
    if len(ended) == beams:
      break
  ended += [(score / MAX_TOKENS, tokens) for score, tokens in going[:beams - len(ended)]]
  return max(ended, key=lambda found: found[0])[1]


@pytest.mark.parametrize('beams', [1, 3])
def test_the_search_is_the_reference_s(decoder, beams):
  encoded_BTD = 4 * jax.random.normal(jax.random.key(0), (7, 10, 16))
  used_B = np.array([True] * 6 + [False])
  found_BL = np.asarray(beam_search(SMALL, decoder, encoded_BTD, used_B, PROMPT, END, SUPPRESSED, AT_FIRST, MAX_TOKENS,
                                    beams))
  all_logits = jax.jit(lambda tokens, encoded: whisper.bind(whisper.WhisperDecoder, SMALL, decoder)(tokens, encoded))
  lengths = set()
  for encoded_TD, found_L in zip(encoded_BTD[:6], found_BL[:6], strict=True):
    def logits(tokens, encoded_TD=encoded_TD):
      padded = np.zeros((1, len(PROMPT) + MAX_TOKENS), np.int32)
      padded[0, :len(tokens)] = tokens
      return all_logits(padded, encoded_TD[None])[0, len(tokens) - 1]

    expected = _searched(logits, beams)
    assert found_L.tolist() == expected + [END] * (MAX_TOKENS - len(expected))
    lengths.add(len(expected))
  assert len(lengths) > 1 and MAX_TOKENS in lengths, 'all end, or none: the test shows little'
  assert (found_BL[6] == END).all()


@pytest.fixture(scope='module')
def tiny():
  return convert.load_whisper('package:tiny.en', ('encoder', 'decoder'))


@pytest.fixture(scope='module')
def rows():
  """Some of the sample's, short ones first."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text('utf-8').splitlines()]
  return sorted(rows, key=lambda row: row['seconds'])[::9]


def _audio(row):
  return soundfile.read(SAMPLE / row['path'], dtype='float32')[0]


def _words_wrong(rows, texts):
  normalise = EnglishTextNormalizer()
  return jiwer.wer([normalise(row['text']) for row in rows], [normalise(text) for text in texts])


def test_neighbours_change_nothing_and_all_windows_are_heard(tiny, rows):
  """Among them eight utterances with pauses as one recording of 37 s, and one without a sample."""
  vocabulary = WhisperVocabulary.from_file(tiny.tokenizer_path)
  audios = [_audio(row) for row in rows]
  long_N = np.concatenate([np.pad(audio, (0, 8000)) for audio in audios])
  assert 30 * 16_000 < len(long_N) < 60 * 16_000
  given = [long_N, *audios[::3], np.zeros(0, np.float32)]
  listener = Listener(tiny.dims, tiny.params, vocabulary, beams=3, rows=3)
  heard = listener.listen(given)
  listener._devices *= 2  # as with two of them, calls are under way while others are fetched
  for one, other, audio in zip(heard, listener.listen(given[::-1])[::-1], given, strict=True):
    assert one.text == other.text
    np.testing.assert_array_equal(one.features_TD, other.features_TD)
    assert one.features_TD.shape == (-(-len(audio) // 320), 384)
  assert _words_wrong([{'text': ' '.join(row['text'] for row in rows)}], [heard[0].text]) < 0.25
  assert _words_wrong(rows[::3], [one.text for one in heard[1:-1]]) < 0.2
  assert heard[-1].text == ''
