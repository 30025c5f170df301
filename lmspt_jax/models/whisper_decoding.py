"""Greedy transcription with Whisper, batched and jitted: what scores reconstructions by word error rate.

The rules are openai-whisper's for temperature 0 without timestamps: one 30 s window at a time, no text carried over,
non-speech symbols and special tokens suppressed, no blank or end as the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmspt_jax.audio.mel import WHISPER_HOP, log_mel_spectrogram
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import read_json
from lmspt_jax.models.whisper import Whisper, WhisperDims, bind

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


def transcribe(
  dims: WhisperDims,
  params: dict[str, Any],
  vocabulary: WhisperVocabulary,
  audios: Sequence[np.ndarray],
  language: str = 'en',
  batch_size: int = 8,
  max_tokens: int = 224,
) -> list[str]:
  """Texts of float32 recordings at 16 kHz, each [N] of any length.

  `params` holds 'encoder' and 'decoder'. Every 30 s of a recording are a window of its own, and the texts of its
  windows are joined by a space. Windows go through in batches of `batch_size`, so that one compiled program serves
  any number of them; sorted by length, since a batch takes as many steps as its longest text.
  """
  window = 2 * dims.audio_context * WHISPER_HOP
  prompt = vocabulary.prompt(dims, language)
  if max(vocabulary.suppressed) >= dims.vocab_size:
    raise LmsptError(f'Whisper vocabulary: has token {max(vocabulary.suppressed)}, the model only {dims.vocab_size} '
                     'tokens; use the tokenizer.json of the model')
  params = jax.tree.map(jnp.asarray, params)  # to the device once, not with every batch
  max_tokens = min(max_tokens, dims.text_context - len(prompt))
  pieces = [(i, start) for i, audio in enumerate(audios) for start in range(0, len(audio), window)]
  order = sorted(range(len(pieces)), key=lambda p: len(audios[pieces[p][0]]) - pieces[p][1])
  texts = [''] * len(pieces)
  for first in range(0, len(order), batch_size):
    chosen = order[first : first + batch_size]
    audio_BN = np.zeros((batch_size, window), np.float32)
    for row, p in enumerate(chosen):
      i, start = pieces[p]
      samples = np.asarray(audios[i][start : start + window], np.float32)
      audio_BN[row, : len(samples)] = samples
    used_B = np.arange(batch_size) < len(chosen)
    tokens_BL = greedy_decode(
      dims,
      params,
      audio_BN,
      used_B,
      prompt,
      vocabulary.end,
      vocabulary.suppressed,
      vocabulary.suppressed_first,
      max_tokens,
    )
    for p, ids in zip(chosen, np.asarray(tokens_BL), strict=False):
      texts[p] = vocabulary.decode(ids.tolist())
  out = [[] for _ in audios]
  for (i, _), text in zip(pieces, texts, strict=True):
    out[i].append(text)
  return [' '.join(filter(None, parts)) for parts in out]


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def greedy_decode(
  dims: WhisperDims,
  params: dict[str, Any],
  audio_BN: Array,
  used_B: Array,
  prompt: tuple[int, ...],
  end: int,
  suppressed: tuple[int, ...],
  suppressed_first: tuple[int, ...],
  max_tokens: int,
) -> Array:
  """float32 audio windows [B, 30 s at 16 kHz] -> int32 tokens [B, max_tokens], padded with `end`.

  Rows where `used_B` is False are padding and come out as `end`.
  """
  model = bind(Whisper, dims, params)
  # On CPU a window at a time keeps attention weights in the cache: a third faster than the batch.
  encoded_BTD = jax.lax.platform_dependent(
    log_mel_spectrogram(audio_BN, dims.n_mels),
    cpu=lambda mel_BTF: jax.lax.map(lambda mel_TF: model.encoder(mel_TF[None])[0], mel_BTF),
    default=model.encoder,
  )
  batch = audio_BN.shape[0]
  always = np.zeros(dims.vocab_size, np.float32)
  always[list(suppressed)] = -np.inf
  at_first = always.copy()
  at_first[list(suppressed_first)] = -np.inf

  def pick(hidden_BLD: Array, penalty_V: np.ndarray, done_B: Array) -> tuple[Array, Array]:
    token_B = jnp.argmax(model.decoder.logits(hidden_BLD[:, -1]) + penalty_V, axis=-1).astype(jnp.int32)
    token_B = jnp.where(done_B, end, token_B)
    return token_B, done_B | (token_B == end)

  prompt_BL = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (batch, len(prompt)))
  cache = model.decoder.init_cache(encoded_BTD, len(prompt) + max_tokens)
  hidden_BLD, cache = model.decoder.decode(prompt_BL, 0, cache)
  token_B, done_B = pick(hidden_BLD, at_first, ~used_B)
  tokens_BL = jnp.full((batch, max_tokens), end, jnp.int32).at[:, 0].set(token_B)

  def unfinished(carry: tuple) -> Array:
    i, _, _, done_B, _ = carry
    return (i < max_tokens) & ~jnp.all(done_B)

  def step(carry: tuple) -> tuple:
    i, tokens_BL, token_B, done_B, cache = carry
    hidden_BLD, cache = model.decoder.decode(token_B[:, None], len(prompt) + i - 1, cache)
    token_B, done_B = pick(hidden_BLD, always, done_B)
    return i + 1, tokens_BL.at[:, i].set(token_B), token_B, done_B, cache

  return jax.lax.while_loop(unfinished, step, (1, tokens_BL, token_B, done_B, cache))[1]
