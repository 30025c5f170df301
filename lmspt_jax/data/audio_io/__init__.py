"""Audio in and out: whatever libsndfile reads (wav, flac, ogg, mp3, ...) to float32, and 16-bit wav back.

A fault of the audio itself is an `AudioError`; other faults of a caller are an `LmsptError`.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from lmspt_jax.data.audio_io import containers
from lmspt_jax.data.audio_io.audio_file import AudioFile, Pcm, PcmFile, Stored
from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError

AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aiff', '.aif')
MAX_FRAMES = 1 << 30  # per channel: 6 hours at 48 kHz
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
SILENCE = 1e-4  # a peak below -80 dBFS
_MARGIN = 128  # source samples either side of a resampled crop, per unit of the down-sampling ratio; 96 would do
_BLOCK = 1 << 22  # samples decoded at a time
_UNKNOWN = 1 << 62  # libsndfile's number of frames where a FLAC's header gives none


def open_audio(source: str | os.PathLike | bytes | BinaryIO | Pcm | Stored, *, name: str) -> AudioFile | PcmFile:
  """Opens a path, encoded bytes, a binary file or what a store keeps, and checks the header.

  A file that states its length and is shorter is 'truncated', mp3 and FLAC only when the part that is not there is
  read. Formats that don't state it (ogg, mp3 without a tag, WAV and FLAC written to a pipe) are as long as they are.

  Args:
    name: what errors call it.

  Raises AudioError: missing, undecodable, truncated, empty, too large, bad rate, and what the store raises. Close the
  result (it is a context manager).
  """
  if isinstance(source, Pcm):
    return _checked(PcmFile(source), name)
  place, owned = _place(source, name)
  opened = None
  try:
    opened = _checked(_open_file(place, owned, name), name)
    return opened
  except (soundfile.SoundFileError, OSError) as error:
    raise getattr(place, 'fault', None) or AudioError(
      f'{name}: not audio that can be read ({_cause(error)}); use wav, flac, ogg or mp3') from error
  finally:
    if owned and opened is None:
      place.close()


def _place(source: str | os.PathLike | bytes | BinaryIO | Stored, name: str) -> tuple[str | BinaryIO, bool]:
  """A path or a file, and whether we opened it."""
  if isinstance(source, bytes):
    if not source:
      raise AudioError(f'{name}: the file is empty; give it audio or remove it', 'empty')
    return io.BytesIO(source), True
  if isinstance(source, str | os.PathLike):
    path = Path(source)
    try:
      status = path.stat()
    except OSError as error:
      if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise AudioError(f'{name}: no such file; check the path', 'missing') from error
      raise AudioError(f'{name}: can\'t be read ({error.strerror}); check its permissions') from error
    if stat.S_ISDIR(status.st_mode):
      raise AudioError(f'{name}: is a directory, not an audio file; give the files in it')
    if not stat.S_ISREG(status.st_mode):
      raise AudioError(f'{name}: not a regular file; give a wav, flac, ogg or mp3 file')
    if not status.st_size:
      raise AudioError(f'{name}: the file is empty; give it audio or remove it', 'empty')
    return str(path), False
  if isinstance(source, Stored):
    return source.open(name=name), True
  return source, False


def _open_file(place: str | BinaryIO, owned: bool, name: str) -> AudioFile:
  if isinstance(place, str):
    with open(place, 'rb') as file:
      container = containers.inspect(file)
    if place.lower().endswith('.raw'):  # soundfile takes these as headerless and asks for a rate
      place, owned = io.BytesIO(Path(place).read_bytes()), True
  else:
    container = containers.inspect(place)
  if container.missing:
    raise AudioError(f'{name}: cut short, its last {container.missing} bytes are not there; fetch it again',
                     'truncated')
  if container.broken:
    raise AudioError(f'{name}: damaged audio (its mp3 frames do not follow on one another); replace the file')
  if container.content is not None:
    if owned:
      place.close()
    place, owned = io.BytesIO(container.content), True
  file = AudioFile(place, close_source=owned)
  if file.frames > _UNKNOWN:
    file.count(MAX_FRAMES)
  return file


def _checked(file: AudioFile | PcmFile, name: str) -> AudioFile | PcmFile:
  error = file.source_fault()
  if error:
    pass
  elif not MIN_RATE <= file.samplerate <= MAX_RATE:
    error = AudioError(f'{name}: sample rate {file.samplerate} Hz; must be {MIN_RATE} to {MAX_RATE} Hz', 'bad rate')
  elif file.frames > MAX_FRAMES or file.channels > MAX_CHANNELS:
    error = AudioError(f'{name}: {file.frames} samples in {file.channels} channels; at most {MAX_FRAMES} in '
                       f'{MAX_CHANNELS} are read, so cut it up', 'too large')
  elif file.frames == 0 or file.channels == 0:
    error = AudioError(f'{name}: holds no samples; remove it', 'empty')
  if error:
    file.close()
    raise error
  return file


def _cause(error: Exception) -> str:
  text = getattr(error, 'error_string', None) or str(error)
  return ' '.join(text.split()).rstrip('.')


def read_blocks(file: AudioFile | PcmFile, start: int, stop: int, *, name: str) -> Iterator[np.ndarray]:
  """Samples [start, min(stop, frames)) of every channel, float32 [n, channels] at a time.

  Raises AudioError: undecodable, truncated (fewer samples than the header promises), empty, non-finite.
  """
  stop = min(stop, file.frames)
  if stop <= start:
    raise AudioError(f'{name}: holds no samples; remove it', 'empty')
  try:
    file.seek(start)
    while start < stop:
      block = file.read(min(stop - start, max(1, _BLOCK // file.channels)), dtype='float32', always_2d=True)
      if not len(block):
        raise _damage(file, f'cut short, {start} of {file.frames} samples; fetch it again', 'truncated', name)
      if not np.isfinite(block).all():
        raise AudioError(f'{name}: holds NaN or infinite samples; replace the file', 'non-finite')
      start += len(block)
      yield block
  except (soundfile.SoundFileError, OSError) as error:
    if file.has_end():
      raise _damage(file, f'damaged audio ({_cause(error)}); replace the file', 'undecodable', name) from error
    raise _damage(file, f'cut short, it ends before the {file.frames} samples it promises; fetch it again',
                  'truncated', name) from error


def _damage(file: AudioFile, message: str, reason: str, name: str) -> AudioError:
  """What the store said, if reading ended because of that."""
  return file.source_fault() or AudioError(f'{name}: {message}', reason)


def read_range(file: AudioFile | PcmFile, start: int, stop: int, *, name: str) -> np.ndarray:
  """All that `read_blocks` gives and raises, float32 [N, channels]."""
  blocks = list(read_blocks(file, start, stop, name=name))
  return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def check_sound(crop: np.ndarray, total: int, *, name: str) -> None:
  """Raises AudioError 'silent' if the crop is silent and is all there is; a pause in a longer recording is no fault.

  Args:
    crop: mono.
    total: samples of the whole recording at the crop's rate.
  """
  if len(crop) >= total and np.abs(crop).max() < SILENCE:
    raise AudioError(f'{name}: silent (peak below {SILENCE}); remove it', 'silent')


def read_audio(source: str | os.PathLike | bytes | BinaryIO | Pcm | Stored, *, name: str) -> tuple[np.ndarray, int]:
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
  audio = _mono(audio)
  if from_rate == to_rate:
    return np.ascontiguousarray(audio)
  length = resampled_length(len(audio), from_rate, to_rate)
  out = soxr.resample(np.ascontiguousarray(audio), from_rate, to_rate, 'HQ')[:length]
  return np.pad(out, (0, length - len(out))) if len(out) < length else np.ascontiguousarray(out)


def mono_blocks(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
  """`to_mono_at` of blocks end to end, bit for bit, in constant memory; blocks may be of any lengths."""
  slices = (_mono(block[start:start + _BLOCK]) for block in blocks for start in range(0, len(block), _BLOCK))
  if from_rate == to_rate:
    yield from slices
    return
  stream = soxr.ResampleStream(from_rate, to_rate, 1, 'float32', 'HQ')
  given = found = 0
  for block in slices:
    given += len(block)
    out = stream.resample_chunk(np.ascontiguousarray(block))
    found += len(out)
    yield out
  missing = resampled_length(given, from_rate, to_rate) - found
  out = stream.resample_chunk(np.zeros(0, np.float32), last=True)
  yield np.pad(out, (0, max(0, missing - len(out))))[:missing]


def _mono(audio: np.ndarray) -> np.ndarray:
  """float32 [N], the mean of the channels of [N] or [N, channels]."""
  audio = np.asarray(audio, np.float32)
  if audio.ndim == 1:
    return audio
  if audio.ndim != 2:
    raise LmsptError(f'audio of shape {audio.shape}: must be [samples] or [samples, channels]')
  # Channel by channel: the order in which numpy sums many channels depends on how they lie in memory.
  total = audio[:, 0]
  for channel in audio.T[1:]:
    total = total + channel
  return total / np.float32(audio.shape[1]) if audio.shape[1] > 1 else total


def crop_mono(file: AudioFile | PcmFile, start: int, num_samples: int, sample_rate: int, *, name: str) -> np.ndarray:
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


def to_pcm(audio: np.ndarray) -> np.ndarray:
  """int16, clipped to [-1, 1). 16-bit audio that was read as float32 comes back bit for bit."""
  return np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)


def write_wav(path: str | os.PathLike, audio: np.ndarray, rate: int) -> None:
  """`write_wav_blocks` of one array, float [N] or [N, channels]."""
  write_wav_blocks(path, [audio], rate)


def write_wav_blocks(path: str | os.PathLike, blocks: Iterable[np.ndarray], rate: int) -> int:
  """Writes 16-bit PCM, clipped to [-1, 1), by way of a temporary file: `path` is never half written.

  Args:
    blocks: of audio, at least one, float [n] or [n, channels]. 16-bit audio that was read as float comes back bit for
      bit.

  Returns:
    Samples per channel.

  Raises:
    LmsptError: NaN or infinite samples, or a folder that can't be written; and what `blocks` raises.
  """
  path = Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  written, file = 0, None
  try:
    for block in blocks:
      block = np.asarray(block, np.float32)
      if not np.isfinite(block).all():
        raise LmsptError(f'{path}: the audio holds NaN or infinite samples, so it was not written')
      if file is None:
        channels = 1 if block.ndim == 1 else block.shape[1]
        file = soundfile.SoundFile(temporary, 'w', samplerate=rate, channels=channels, subtype='PCM_16', format='WAV')
      file.write(to_pcm(block))
      written += len(block)
    file.close()
    os.replace(temporary, path)
  except (soundfile.SoundFileError, OSError) as error:
    raise LmsptError(f'{path}: can\'t be written ({_cause(error)}); check that the folder exists') from error
  finally:
    if file is not None:
      file.close()
    temporary.unlink(missing_ok=True)
  return written
