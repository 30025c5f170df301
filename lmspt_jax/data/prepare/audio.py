"""One utterance to the records that are stored: decoded, checked, resampled, cut at pauses, encoded as FLAC.

Audio passes through in blocks, so a recording of hours takes no more memory than one of a minute.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from lmspt_jax.data import audio_io, storage
from lmspt_jax.data.audio_io import MAX_FRAMES, SILENCE
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.prepare.pauses import cut_at_pauses
from lmspt_jax.data.records import Record
from lmspt_jax.data.sources import Utterance
from lmspt_jax.data.storage import FileRange

FLAC_CHANNELS = 8  # FLAC holds no more
_FETCHED_WHOLE = 64 << 20  # bytes: smaller files are read in one go
_FLAC_24 = ('PCM_24', 'PCM_32', 'FLOAT', 'DOUBLE')  # stored with 24 bits, everything else with 16


def to_records(utterance: Utterance, *, sample_rate: int | None, max_seconds: float) -> Iterator[Record | AudioError]:
  """The utterance as one record, or as several named ID/0000, ID/0001, ... if it is longer than `max_seconds`.

  FLAC that needs no change is kept byte for byte. Pieces have no text: nothing says which words are in which. A silent
  piece comes as the AudioError it would be if it were a file.

  Args:
    sample_rate: Hz to resample to; None keeps the file's.

  Raises:
    AudioError: missing, undecodable, truncated, empty, non-finite, silent, too large, bad rate; what was yielded before
      is then not to be used either.
  """
  utterance = _fetched(utterance)
  with utterance.open() as file:
    rate, subtype = sample_rate or file.samplerate, file.subtype
    kept = file.format == 'FLAC' and rate == file.samplerate
    blocks = _mixed(audio_io.read_blocks(file, 0, MAX_FRAMES, name=utterance.name))
    blocks = _resampled(blocks, file.samplerate, rate)
    pieces = cut_at_pauses(blocks, rate, max(4, int(max_seconds * rate)))
    first, second = next(pieces), next(pieces, None)
    if second is None:
      if _silent(first):
        raise _silence(utterance.name)
      encoded = utterance.encoded() if kept else _encode(first, rate, subtype, utterance.name)
      yield _record(utterance, encoded, rate, len(first))
      return
    any_sound = False
    for number, piece in enumerate(itertools.chain([first, second], pieces)):
      if _silent(piece):
        yield _silence(f'{utterance.name}/{number:04d}')
        continue
      any_sound = True
      part = dataclasses.replace(utterance, id=f'{utterance.id}/{number:04d}', text='')
      yield _record(part, _encode(piece, rate, subtype, utterance.name), rate, len(piece))
    if not any_sound:
      raise _silence(utterance.name)


def _fetched(utterance: Utterance) -> Utterance:
  """With a small file's bytes in place of where it is: they are decoded and perhaps kept, and fetched once."""
  place = utterance.content
  if not isinstance(place, Path | FileRange):
    return utterance
  size = place.size if isinstance(place, FileRange) else None
  if size is None:
    path = place.path if isinstance(place, FileRange) else str(place)
    size = storage.stat(path, name=utterance.name).size
  if size > _FETCHED_WHOLE:
    return utterance
  return dataclasses.replace(utterance, content=utterance.encoded())


def _mixed(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Channels as they are if FLAC can hold them, else their mean."""
  for block in blocks:
    yield block if block.shape[1] <= FLAC_CHANNELS else block.mean(axis=1, keepdims=True, dtype=np.float32)


def _resampled(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
  """At `to_rate`: ceil(N * to_rate / from_rate) samples in all."""
  if from_rate == to_rate:
    yield from blocks
    return
  stream, taken, given = None, 0, 0
  for block in blocks:
    if stream is None:
      stream = soxr.ResampleStream(from_rate, to_rate, block.shape[1], dtype='float32', quality='HQ')
      empty = block[:0]
    taken += len(block)
    out = stream.resample_chunk(block)
    given += len(out)
    if len(out):
      yield out
  length = audio_io.resampled_length(taken, from_rate, to_rate)
  out = stream.resample_chunk(empty, last=True)  # soxr gives one sample less for some lengths, never more
  yield np.pad(out, ((0, length - given - len(out)), (0, 0)))


def _silent(audio: np.ndarray) -> bool:
  return bool(np.abs(audio).max() < SILENCE)


def _silence(name: str) -> AudioError:
  return AudioError(f'{name}: silent (peak below {SILENCE}); remove it', 'silent')


def _encode(audio: np.ndarray, rate: int, subtype: str, name: str) -> bytes:
  try:
    return audio_io.encode_flac(audio, rate, 'PCM_24' if subtype in _FLAC_24 else 'PCM_16')
  except soundfile.SoundFileError as error:  # the header was checked: only the rate is left
    raise AudioError(f'{name}: FLAC can\'t hold {rate} Hz; give --sample_rate', 'bad rate') from error


def _record(utterance: Utterance, encoded: bytes, rate: int, num_samples: int) -> Record:
  return Record(id=utterance.id, audio=encoded, sample_rate=rate, num_samples=num_samples, text=utterance.text,
                language=utterance.language, speaker=utterance.speaker, license=utterance.license)
