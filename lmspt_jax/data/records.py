"""The record format inside ArrayRecord shards: one msgpack map an utterance.

Keys: id, audio (encoded bytes, FLAC when written by `prepare`; wav, ogg and mp3 are read as well), sample_rate (Hz),
num_samples (per channel, at sample_rate), text, language, speaker, license. Sizes are checked on reading: shards
come from strangers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import msgpack

from lmspt_jax.data.audio_io import MAX_FRAMES, MAX_RATE, MIN_RATE
from lmspt_jax.data.faults import AudioError

MAX_AUDIO_BYTES = 512 << 20
MAX_TEXT_BYTES = 1 << 20


class RecordError(AudioError):
  """A record that does not follow the format."""

  def __init__(self, message: str, reason: str = 'corrupt record'):
    super().__init__(message, reason)


@dataclass(frozen=True)
class Record:
  """One utterance as stored; the fields are the msgpack keys."""

  id: str
  audio: bytes
  sample_rate: int  # Hz
  num_samples: int  # per channel
  text: str = ''
  language: str = ''
  speaker: str = ''
  license: str = ''


_TYPES = {f.name: {'str': str, 'bytes': bytes, 'int': int}[f.type] for f in dataclasses.fields(Record)}


def pack(record: Record) -> bytes:
  """Deterministic bytes: keys in the order of the fields."""
  _check(record, record.id)
  return msgpack.packb({key: getattr(record, key) for key in _TYPES}, use_bin_type=True)


def unpack(data: bytes, *, name: str) -> Record:
  """Raises RecordError naming `name` for anything `pack` would not write; unknown keys are ignored."""
  try:
    fields = msgpack.unpackb(data, raw=False, max_bin_len=MAX_AUDIO_BYTES, max_str_len=MAX_TEXT_BYTES, max_map_len=64,
                             max_array_len=0, max_ext_len=0)
  except (msgpack.UnpackException, ValueError, TypeError) as error:
    raise RecordError(f'{name}: not a record ({type(error).__name__}); prepare the shard again') from error
  if not isinstance(fields, dict):
    raise RecordError(f'{name}: not a record but {type(fields).__name__}; prepare the shard again')
  for key, kind in _TYPES.items():
    if type(fields.get(key)) is not kind:
      raise RecordError(f'{name}: field {key} is {type(fields.get(key)).__name__}, must be {kind.__name__}; '
                        'prepare the shard again')
  record = Record(**{key: fields[key] for key in _TYPES})
  _check(record, name)
  return record


def _check(record: Record, name: str) -> None:
  if not record.id:
    raise RecordError(f'{name}: field id is empty; every record needs one')
  if not MIN_RATE <= record.sample_rate <= MAX_RATE:
    raise RecordError(f'{name}: field sample_rate = {record.sample_rate}; must be {MIN_RATE} to {MAX_RATE} Hz')
  if not 1 <= record.num_samples <= MAX_FRAMES:
    raise RecordError(f'{name}: field num_samples = {record.num_samples}; must be 1 to {MAX_FRAMES}')
  if not 1 <= len(record.audio) <= MAX_AUDIO_BYTES:
    raise RecordError(f'{name}: field audio has {len(record.audio)} bytes; must be 1 to {MAX_AUDIO_BYTES}', 'too large')
  for key in ('id', 'text', 'language', 'speaker', 'license'):
    if len(getattr(record, key).encode()) > MAX_TEXT_BYTES:
      raise RecordError(f'{name}: field {key} is longer than {MAX_TEXT_BYTES} bytes', 'too large')
