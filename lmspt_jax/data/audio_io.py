"""Audio in and out: whatever libsndfile reads (wav, flac, ogg, mp3, ...) to float32, and 16-bit wav back.

Two kinds of fault. `AudioError` is a fault of the audio itself, with a `reason` from a short list, so that the
data pipeline can skip and count it; it is an `LmsptError`, so that a single file given by a user ends in one line.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from lmspt_jax.errors import LmsptError

AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aiff', '.aif')
SEEKABLE_FORMATS = ('FLAC', 'WAV', 'WAVEX', 'RF64', 'W64', 'AIFF')  # exact seeks; the others are decoded from the start
MAX_FRAMES = 1 << 30  # per channel: 6 hours at 48 kHz
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
SILENCE = 1e-4  # a peak below -80 dBFS
_MARGIN = 1024  # source samples either side of a resampled crop, per unit of the down-sampling ratio


class AudioError(LmsptError):
  """Audio that can't be used. `reason` is one of: missing, undecodable, truncated, empty, non-finite, silent,
  too large, bad rate, corrupt record."""

  def __init__(self, message: str, reason: str = 'undecodable'):
    super().__init__(message)
    self.reason = reason


def open_audio(source: str | os.PathLike | bytes | BinaryIO, *, name: str) -> soundfile.SoundFile:
  """Opens a path, encoded bytes or a binary file and checks the header. `name` is what errors call it.

  Raises AudioError: missing, undecodable, empty, too large, bad rate. Close the result (it is a context manager).
  """
  if isinstance(source, bytes):
    if not source:
      raise AudioError(f'{name}: the file is empty; give it audio or remove it', 'empty')
    source = io.BytesIO(source)
  elif isinstance(source, str | os.PathLike):
    path = Path(source)
    if path.is_dir():
      raise AudioError(f'{name}: is a directory, not an audio file; give the files in it')
    if not path.exists():
      raise AudioError(f'{name}: no such file; check the path', 'missing')
    if not path.is_file():
      raise AudioError(f'{name}: not a regular file; give a wav, flac, ogg or mp3 file')
    try:
      if path.stat().st_size == 0:
        raise AudioError(f'{name}: the file is empty; give it audio or remove it', 'empty')
      if path.suffix.lower() == '.raw':  # soundfile reads these as headerless and asks for a rate
        source = io.BytesIO(path.read_bytes())
      else:
        source = str(path)
    except OSError as error:
      raise AudioError(f'{name}: can\'t be read ({error.strerror}); check its permissions') from error
  try:
    file = soundfile.SoundFile(source)
  except (soundfile.SoundFileError, OSError) as error:
    raise AudioError(f'{name}: not audio that can be read ({_cause(error)}); use wav, flac, ogg or mp3') from error
  try:
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
      raise AudioError(f'{name}: sample rate {file.samplerate} Hz; must be {MIN_RATE} to {MAX_RATE} Hz', 'bad rate')
    if file.frames > MAX_FRAMES or file.channels > MAX_CHANNELS:
      raise AudioError(f'{name}: {file.frames} samples in {file.channels} channels; at most {MAX_FRAMES} in '
                       f'{MAX_CHANNELS} are read, so cut it up', 'too large')
    if file.frames == 0:
      raise AudioError(f'{name}: holds no samples; remove it', 'empty')
  except AudioError:
    file.close()
    raise
  return file


def _cause(error: Exception) -> str:
  text = getattr(error, 'error_string', None) or str(error)
  return ' '.join(text.split()).rstrip('.')


def read_range(file: soundfile.SoundFile, start: int, stop: int, *, name: str) -> np.ndarray:
  """Samples [start, stop) of every channel, float32 [N, channels]; the whole file when the format can't seek.

  Raises AudioError: undecodable, truncated (fewer samples than the header promises), empty, non-finite.
  """
  try:
    if file.format in SEEKABLE_FORMATS:
      stop = min(stop, file.frames)
      file.seek(start)
      audio = file.read(stop - start, dtype='float32', always_2d=True)
      if len(audio) < stop - start:
        raise AudioError(f'{name}: cut short, {start + len(audio)} of {file.frames} samples; fetch it again',
                         'truncated')
    else:
      audio = file.read(MAX_FRAMES, dtype='float32', always_2d=True)[start:stop]
  except (soundfile.SoundFileError, OSError) as error:
    raise AudioError(f'{name}: damaged audio ({_cause(error)}); replace the file') from error
  if not len(audio):
    raise AudioError(f'{name}: holds no samples; remove it', 'empty')
  if not np.isfinite(audio).all():
    raise AudioError(f'{name}: holds NaN or infinite samples; replace the file', 'non-finite')
  return audio


def read_audio(source: str | os.PathLike | bytes | BinaryIO, *, name: str) -> tuple[np.ndarray, int]:
  """Decodes everything: (float32 [N, channels], sample rate in Hz). Raises AudioError, see `open_audio`."""
  with open_audio(source, name=name) as file:
    return read_range(file, 0, MAX_FRAMES, name=name), file.samplerate


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
  """Samples after resampling: ceil(num_samples * to_rate / from_rate), exact."""
  return -(-num_samples * to_rate // from_rate)


def to_mono_at(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
  """Mean of the channels, resampled by soxr (HQ).

  Args:
    audio: float [N] or [N, channels].
    from_rate, to_rate: Hz.

  Returns:
    float32 [ceil(N * to_rate / from_rate)].
  """
  if min(from_rate, to_rate) < 1:
    raise LmsptError(f'sample rate {min(from_rate, to_rate)} Hz: must be positive')
  audio = np.asarray(audio, np.float32)
  if audio.ndim == 2:
    audio = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1, dtype=np.float32)
  if audio.ndim != 1:
    raise LmsptError(f'audio of shape {audio.shape}: must be [samples] or [samples, channels]')
  if from_rate == to_rate:
    return np.ascontiguousarray(audio)
  length = resampled_length(len(audio), from_rate, to_rate)
  out = soxr.resample(np.ascontiguousarray(audio), from_rate, to_rate, 'HQ')[:length]
  return np.pad(out, (0, length - len(out))) if len(out) < length else np.ascontiguousarray(out)


def crop_mono(file: soundfile.SoundFile, start: int, num_samples: int, sample_rate: int, *, name: str) -> np.ndarray:
  """Samples [start, start + num_samples) of the file as mono at `sample_rate`, decoding little more than them.

  Equal to the same range of the whole file through `to_mono_at`, to 1e-6: the source range begins on a sample
  where both rates' grids meet and has a margin wider than the resampler's filter.

  Args:
    start, num_samples: at `sample_rate`.

  Returns:
    float32 [<= num_samples], shorter only at the end of the file.
  """
  rate = file.samplerate
  if rate == sample_rate:
    return to_mono_at(read_range(file, start, start + num_samples, name=name), rate, rate)
  common = math.gcd(rate, sample_rate)
  source_step, target_step = rate // common, sample_rate // common
  margin = _MARGIN * max(1, -(-rate // sample_rate))
  block = max(0, (start * rate // sample_rate - margin) // source_step)
  stop = -(-(start + num_samples) * rate // sample_rate) + margin
  audio = to_mono_at(read_range(file, block * source_step, stop, name=name), rate, sample_rate)
  offset = start - block * target_step
  return audio[offset:offset + num_samples]


def load_mono(path: str | os.PathLike, sample_rate: int) -> np.ndarray:
  """One audio file as mono float32 [N] at `sample_rate`.

  Raises AudioError in one line: missing, a directory, not audio, empty, NaN or infinite samples.
  """
  audio, rate = read_audio(path, name=str(path))
  return to_mono_at(audio, rate, sample_rate)


def encode_flac(audio: np.ndarray, sample_rate: int, subtype: str = 'PCM_16') -> bytes:
  """FLAC bytes of float32 [N, channels <= 8]; clipped at full scale. The same input gives the same bytes."""
  buffer = io.BytesIO()
  with soundfile.SoundFile(buffer, 'w', samplerate=sample_rate, channels=audio.shape[1], subtype=subtype,
                           format='FLAC') as file:
    file.write(audio)
  return buffer.getvalue()


def write_wav(path: str | os.PathLike, audio: np.ndarray, rate: int) -> None:
  """Writes 16-bit PCM, clipped to [-1, 1), by way of a temporary file: `path` is never half written.

  Args:
    audio: float [N] or [N, channels]. 16-bit audio that was read as float comes back bit for bit.

  Raises:
    LmsptError: NaN or infinite samples, or a folder that can't be written.
  """
  path = Path(path)
  audio = np.asarray(audio, np.float32)
  if not np.isfinite(audio).all():
    raise LmsptError(f'{path}: the audio holds NaN or infinite samples, so it was not written')
  pcm = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    soundfile.write(temporary, pcm, rate, subtype='PCM_16', format='WAV')
    os.replace(temporary, path)
  except (soundfile.SoundFileError, OSError) as error:
    temporary.unlink(missing_ok=True)
    raise LmsptError(f'{path}: can\'t be written ({_cause(error)}); check that the folder exists') from error
