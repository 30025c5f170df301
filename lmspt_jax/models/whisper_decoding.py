"""Transcription with Whisper, greedy or by beam search: what scores reconstructions by word error rate.

The rules are openai-whisper's for temperature 0 without timestamps: one 30 s window at a time, no text carried over,
non-speech symbols and special tokens suppressed, no blank or end as the first token. A beam search ends when as many
hypotheses as it has beams are finished, and the mean log probability of a token chooses among them (patience 1, no
length penalty).

Axes: B windows, N samples, T encoder positions, D width, K beams, R = B * K rows of the decoder,
L tokens, C candidates, V vocabulary.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from lmspt_jax.audio.mel import WHISPER_HOP, WHISPER_SAMPLE_RATE, log_mel_spectrogram
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import read_json
from lmspt_jax.models.teachers import TeacherDims, encoder_of
from lmspt_jax.models.whisper import WhisperDecoder, WhisperDims, bind

# Symbols that stand for something other than speech: alone, doubled or inside brackets.
_NON_SPEECH = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』']
_NON_SPEECH += ['<<', '>>', '<<<', '>>>', '--', '---', '-(', '-[', "('", '("', '((', '))', '(((', ')))', '[[', ']]']
_NON_SPEECH += ['{{', '}}', '♪♪', '♪♪♪']
_MAX_VOCABULARY = 16 << 20  # bytes of a tokenizer.json; that of tiny.en has 2.2 MB
_MUSIC = [*'♩♪♫♬♭♮♯']  # share their first byte-level token: it alone is suppressed


@dataclass(frozen=True)
class WhisperVocabulary:
  """A tokenizer.json and the token ids that decoding needs. Build with `from_file`."""

  tokenizer: Any  # tokenizers.Tokenizer
  end: int
  special: dict[str, int]
  suppressed: tuple[int, ...]
  suppressed_first: tuple[int, ...]

  @classmethod
  def from_file(cls, path: str | Path | None) -> WhisperVocabulary:
    """Raises LmsptError for a missing or damaged file, and one that is not Whisper's."""
    if path is None:
      raise LmsptError(f'Whisper vocabulary {str(path)!r}: no such file; put the tokenizer.json of the model there')
    tokenizer, added = _tokenizer(Path(path))
    special = {content: i for content, i in added.items() if content.startswith('<|')}
    needed = ('endoftext', 'startoftranscript', 'notimestamps', 'transcribe', 'translate', 'startoflm', 'startofprev')
    for name in needed:
      if f'<|{name}|>' not in special:
        raise LmsptError(f'{path}: has no token <|{name}|>: not the vocabulary of a Whisper model')
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    suppressed = {encode(' -')[0], encode(" '")[0]}  # between words only: inside they are allowed
    for symbol in [*_NON_SPEECH, *_MUSIC]:
      for ids in (encode(symbol), encode(' ' + symbol)):
        if len(ids) == 1 or symbol in _MUSIC:
          suppressed.add(ids[0])
    for name in ('startoftranscript', 'transcribe', 'translate', 'startoflm', 'startofprev'):
      suppressed.add(special[f'<|{name}|>'])
    # "No speech" has had two names; it is the token before <|notimestamps|>.
    suppressed.add(special['<|notimestamps|>'] - 1)
    end = special['<|endoftext|>']
    return cls(tokenizer, end, special, tuple(sorted(suppressed)), (encode(' ')[0], end))

  def prompt(self, dims: WhisperDims, language: str) -> tuple[int, ...]:
    """Tokens that ask for a transcript without timestamps. Raises LmsptError for an unknown language code."""
    start, task, plain = (self.special[f'<|{name}|>'] for name in ('startoftranscript', 'transcribe', 'notimestamps'))
    if not dims.multilingual:
      if language != 'en':
        raise LmsptError(f'language {language!r}: this Whisper knows English only; use a multilingual one')
      return start, plain
    if f'<|{language}|>' not in self.special:
      raise LmsptError(f"language {language!r}: not one of Whisper's codes; use e.g. 'en'")
    return start, self.special[f'<|{language}|>'], task, plain

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the tokens before the end; special tokens are left out."""
    ids = list(ids)
    ids = ids[: ids.index(self.end)] if self.end in ids else ids
    return self.tokenizer.decode([i for i in ids if i < self.end], skip_special_tokens=True).strip()


def _tokenizer(path: Path) -> tuple[Any, dict[str, int]]:
  """(tokenizers.Tokenizer, added tokens) of a tokenizer.json.

  Built from its words, merges and added tokens alone, which are checked first: what else such files may hold (patterns,
  normalisers) Whisper's have not, and could be made to take any time.
  """
  import tokenizers  # only transcribing needs it

  def need(condition: bool, what: str) -> None:
    if not condition:
      raise LmsptError(f'{path}: {what}: not the vocabulary of a Whisper model, or damaged')

  content = read_json(path, _MAX_VOCABULARY)
  model = content.get('model') if isinstance(content, dict) else None
  need(isinstance(model, dict), 'has no model')
  if model.get('type') != 'BPE':
    raise LmsptError(f"{path}: holds a {shown(model.get('type'))} vocabulary where Whisper's are 'BPE'")
  words, merges, added = model.get('vocab'), model.get('merges'), content.get('added_tokens')
  need(isinstance(words, dict) and isinstance(merges, list) and isinstance(added, list), 'has no words and merges')
  need(all(type(i) is int for i in words.values()) and sorted(words.values()) == [*range(len(words))],
       'the numbers of its words are not 0, 1, 2 and so on')
  need(words.keys() >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet()), 'lacks words for single bytes')
  pairs = [tuple(merge.split(' ')) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
           for merge in merges]
  need(all(len(pair) == 2 and all(isinstance(part, str) for part in pair) and {*pair, ''.join(pair)} <= words.keys()
           for pair in pairs), 'has merges of other words than its own')
  need(all(isinstance(token, dict) and isinstance(token.get('content'), str) and token['content'] for token in added),
       'has added tokens without a text')
  names = [token['content'] for token in added]
  need(len({*names}) == len(names) and all(name.isprintable() for name in (*names, *words)),
       'has an added token twice, or words of characters that are none')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, pairs))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(names)
  found = {name: tokenizer.token_to_id(name) for name in names}
  need(found == {token['content']: token.get('id') for token in added}, 'its added tokens do not follow its words')
  return tokenizer, found


@dataclass(frozen=True)
class Heard:
  """What a Whisper makes of one recording.

  Attributes:
    text: its transcript.
    features_TD: float32, the encoder's output at 50 positions a second, those of padding left out.
  """

  text: str
  features_TD: np.ndarray


class Listener:
  """A Whisper with its parameters on every local device. One program serves recordings of any length."""

  def __init__(self, dims: WhisperDims, params: dict[str, Any], vocabulary: WhisperVocabulary, *, beams: int = 1,
               rows: int = 8, max_tokens: int = 224):
    """
    Args:
      params: 'encoder' and 'decoder'.
      beams: hypotheses that are followed; 1 is greedy.
      rows: 30 s windows of one call.
      max_tokens: of a window's text.

    Raises LmsptError for another model's vocabulary.
    """
    if max(vocabulary.suppressed) >= dims.vocab_size:
      raise LmsptError(f'Whisper vocabulary: has token {max(vocabulary.suppressed)}, the model only {dims.vocab_size} '
                       'tokens; use the tokenizer.json of the model')
    self.dims, self.vocabulary, self.beams, self.rows, self.max_tokens = dims, vocabulary, beams, rows, max_tokens
    self._devices = jax.local_devices()
    self._params = functools.cache(lambda device: jax.device_put(params, device))

  def listen(self, audios: Sequence[np.ndarray], language: str = 'en') -> list[Heard]:
    """float32 recordings at 16 kHz, each [N] of any length, in one language (a code of Whisper's).

    Every 30 s of a recording are a window of its own, and the texts of its windows are joined by a space. Windows go
    through sorted by length, since a call takes as many steps as its longest text.
    """
    prompt = self.vocabulary.prompt(self.dims, language)
    max_tokens = min(self.max_tokens, self.dims.text_context - len(prompt))
    texts, features = [[] for _ in audios], [[] for _ in audios]
    pieces = sorted(_windows(audios, self.dims), key=lambda piece: len(piece[1]))
    calls = [pieces[first:first + self.rows] for first in range(0, len(pieces), self.rows)]
    ahead = len(self._devices)  # calls that are under way at once
    running: collections.deque[tuple[list[Piece], Array, Array]] = collections.deque()
    found = []
    for turn in range(len(calls) + ahead):
      if turn < len(calls):
        started = self._start(calls[turn], prompt, max_tokens, self._devices[turn % ahead])
        running.append((calls[turn], *started))
      if running and turn >= ahead:
        chosen, tokens_BL, encoded_BTD = running.popleft()
        for (place, samples_N), ids_L, encoded_TD in zip(chosen, np.asarray(tokens_BL), np.asarray(encoded_BTD),
                                                         strict=False):
          text = self.vocabulary.decode(ids_L.tolist())
          found.append((place, text, _heard_positions(self.dims, encoded_TD, samples_N)))
    for (item, _), text, encoded_TD in sorted(found, key=lambda part: part[0]):
      texts[item].append(text)
      features[item].append(encoded_TD)
    nothing = np.zeros((0, self.dims.width), np.float32)
    return [Heard(' '.join(filter(None, parts)), np.concatenate([nothing, *encoded]))
            for parts, encoded in zip(texts, features, strict=True)]

  def _start(self, pieces: Sequence[Piece], prompt: tuple[int, ...], max_tokens: int,
             device: jax.Device) -> tuple[Array, Array]:
    """Tokens [B, L] and features [B, T, D] of windows, not waited for."""
    params = self._params(device)
    audio_BN = jax.device_put(_stacked(pieces, self.rows, self.dims), device)
    encoded_BTD = encode_windows(self.dims, params['encoder'], audio_BN)
    used_B = np.arange(self.rows) < len(pieces)
    vocabulary = self.vocabulary
    tokens_BL = beam_search(self.dims, params['decoder'], encoded_BTD, used_B, prompt, vocabulary.end,
                            vocabulary.suppressed, vocabulary.suppressed_first, max_tokens, self.beams)
    return tokens_BL, encoded_BTD


def transcribe(dims: WhisperDims, params: dict[str, Any], vocabulary: WhisperVocabulary, audios: Sequence[np.ndarray],
               language: str = 'en', *, beams: int = 1, batch_size: int = 8, max_tokens: int = 224) -> list[str]:
  """Texts of float32 recordings at 16 kHz, as `Listener` hears them, `batch_size` windows at a time."""
  listener = Listener(dims, params, vocabulary, beams=beams, rows=batch_size, max_tokens=max_tokens)
  return [heard.text for heard in listener.listen(audios, language)]


def encode_recordings(dims: TeacherDims, params: dict[str, Any], audios: Sequence[np.ndarray],
                      rows: int = 8) -> list[np.ndarray]:
  """An encoder's features of recordings as `Heard.features_TD`, with these parameters of it alone."""
  features = [[np.zeros((0, dims.width), np.float32)] for _ in audios]
  pieces = _windows(audios, dims)
  for first in range(0, len(pieces), rows):
    chosen = pieces[first:first + rows]
    encoded_BTD = np.asarray(encode_windows(dims, params, _stacked(chosen, rows, dims)))
    for ((item, _), samples_N), encoded_TD in zip(chosen, encoded_BTD, strict=False):
      features[item].append(_heard_positions(dims, encoded_TD, samples_N))
  return [np.concatenate(parts) for parts in features]


def _heard_positions(dims: TeacherDims, encoded_TD: np.ndarray, samples_N: np.ndarray) -> np.ndarray:
  """Those that stand for the window's samples, not for what pads it."""
  return encoded_TD[:-(-len(samples_N) * dims.positions_per_second // WHISPER_SAMPLE_RATE)]


Piece = tuple[tuple[int, int], np.ndarray]  # ((recording, first sample), samples of one window)


def _windows(audios: Sequence[np.ndarray], dims: TeacherDims) -> list[Piece]:
  """Every window of recordings at 16 kHz, in order."""
  size = 2 * dims.audio_context * WHISPER_HOP
  return [((item, start), np.asarray(audio[start:start + size], np.float32))
          for item, audio in enumerate(audios) for start in range(0, len(audio), size)]


def _stacked(pieces: Sequence[Piece], rows: int, dims: TeacherDims) -> np.ndarray:
  """float32 [rows, 30 s], zeros after each window's end and in rows without one."""
  audio_BN = np.zeros((rows, 2 * dims.audio_context * WHISPER_HOP), np.float32)
  for row, (_, samples_N) in zip(audio_BN, pieces, strict=False):
    row[:len(samples_N)] = samples_N
  return audio_BN


@functools.partial(jax.jit, static_argnums=0)
def encode_windows(dims: TeacherDims, params: dict[str, Any], audio_BN: Array) -> Array:
  """float32 windows [B, 30 s at 16 kHz] -> features [B, T, D] by the encoder with these parameters."""
  encoder = bind(encoder_of(dims), dims, params)
  # On CPU a window at a time keeps attention weights in the cache: a third faster than the batch.
  return jax.lax.platform_dependent(
    log_mel_spectrogram(audio_BN, dims.n_mels),
    cpu=lambda mel_BTF: jax.lax.map(lambda mel_TF: encoder(mel_TF[None])[0], mel_BTF),
    default=encoder,
  )


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8, 9))
def beam_search(
  dims: WhisperDims,
  params: dict[str, Any],
  encoded_BTD: Array,
  used_B: Array,
  prompt: tuple[int, ...],
  end: int,
  suppressed: tuple[int, ...],
  suppressed_first: tuple[int, ...],
  max_tokens: int,
  beams: int = 1,
) -> Array:
  """Features -> int32 tokens [B, max_tokens] of the best hypothesis, padded with `end`; of one beam the greedy one.

  Rows where `used_B` is False are padding and come out as `end`.
  """
  decoder = bind(WhisperDecoder, dims, params)
  batch = encoded_BTD.shape[0]
  always = np.zeros(dims.vocab_size, np.float32)
  always[list(suppressed)] = -np.inf
  at_first = always.copy()
  at_first[list(suppressed_first)] = -np.inf
  row_BK = jnp.arange(batch)[:, None]

  def follow(found: _Hypotheses, hidden_RLD: Array, penalty_V: np.ndarray,
             i: Array | int) -> tuple[_Hypotheses, Array]:
    """Hypotheses with token i, and the beam that each of those goes on from."""
    log_BKV = jax.nn.log_softmax((decoder.logits(hidden_RLD[:, -1]) + penalty_V).reshape(batch, beams, -1))
    # One candidate of a beam may end: enough to go on with are left of one more, and of twice the beams in all.
    score_BKC, token_BKC = jax.lax.top_k(log_BKV, beams + 1)
    score_BC, chosen_BC = jax.lax.top_k((found.score_BK[..., None] + score_BKC).reshape(batch, -1), 2 * beams)
    from_BC, token_BC = chosen_BC // (beams + 1), jnp.take_along_axis(token_BKC.reshape(batch, -1), chosen_BC, axis=1)
    ends_BC = token_BC == end
    tokens_BCL = found.tokens_BKL[row_BK, from_BC].at[:, :, i].set(token_BC)
    # The best that go on, in order; a stable sort keeps it.
    going_BK = jnp.argsort(ends_BC, axis=1, stable=True)[:, :beams]
    # What ends counts if it is better than the last of those, and while there is room.
    last_B1 = going_BK[:, -1:]
    done_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < last_B1) & jnp.isfinite(score_BC)
    slot_BC = found.count_B[:, None] + jnp.cumsum(done_BC, axis=1) - 1
    slot_BC = jnp.where(done_BC, slot_BC, beams)  # out of range: dropped
    mean_BC = score_BC / jnp.maximum(i, 1)  # by the tokens before the end, as the reference does
    following = _Hypotheses(
      tokens_BKL=tokens_BCL[row_BK, going_BK],
      score_BK=score_BC[row_BK, going_BK],
      finished_BKL=found.finished_BKL.at[row_BK, slot_BC].set(tokens_BCL, mode='drop'),
      mean_BK=found.mean_BK.at[row_BK, slot_BC].set(mean_BC, mode='drop'),
      count_B=jnp.minimum(found.count_B + jnp.sum(done_BC, axis=1), beams))
    return following, from_BC[row_BK, going_BK]

  prompt_RL = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (batch * beams, len(prompt)))
  cache = decoder.init_cache(encoded_BTD, len(prompt) + max_tokens, beams)
  hidden_RLD, cache = decoder.decode(prompt_RL, 0, cache)
  # All beams are the same at first: only one of them is followed.
  hypotheses = _Hypotheses(
    tokens_BKL=jnp.full((batch, beams, max_tokens), end, jnp.int32),
    score_BK=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (batch, beams)),
    finished_BKL=jnp.full((batch, beams, max_tokens), end, jnp.int32),
    mean_BK=jnp.full((batch, beams), -jnp.inf),
    count_B=jnp.where(used_B, 0, beams))
  hypotheses, _ = follow(hypotheses, hidden_RLD, at_first, 0)

  def unfinished(carry: tuple) -> Array:
    i, hypotheses, _ = carry
    return (i < max_tokens) & ~jnp.all(hypotheses.count_B == beams)

  def step(carry: tuple) -> tuple:
    i, hypotheses, cache = carry
    token_BK = hypotheses.tokens_BKL[:, :, i - 1]
    hidden_RLD, cache = decoder.decode(token_BK.reshape(-1, 1), len(prompt) + i - 1, cache)
    hypotheses, from_BK = follow(hypotheses, hidden_RLD, always, i)
    if beams > 1:
      source = (row_BK * beams + from_BK).reshape(-1)
      take = lambda arrays: tuple(array[source] for array in arrays)
      cache = cache._replace(self_keys=take(cache.self_keys), self_values=take(cache.self_values))
    return i + 1, hypotheses, cache

  found = jax.lax.while_loop(unfinished, step, (1, hypotheses, cache))[1]
  # What was cut off in the middle stands in where too few have ended, the likeliest first.
  cut_BK = jnp.arange(beams) < (beams - found.count_B)[:, None]
  tokens = jnp.concatenate([found.finished_BKL, found.tokens_BKL], axis=1)
  mean = jnp.concatenate([found.mean_BK, jnp.where(cut_BK, found.score_BK / max_tokens, -jnp.inf)], axis=1)
  best_BL = tokens[jnp.arange(batch), jnp.argmax(mean, axis=1)]
  return jnp.where(used_B[:, None], best_BL, end)


@struct.dataclass
class _Hypotheses:
  """Of a beam search: what goes on, best first, and what has ended."""

  tokens_BKL: Array  # int32, `end` where there is none yet
  score_BK: Array  # sum of log probabilities
  finished_BKL: Array
  mean_BK: Array  # log probability a token; -inf in a free place
  count_B: Array  # that have ended
