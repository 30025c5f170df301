"""Training batches whose content is a pure function of (seed, global example index).

Example i of a run is record `order[i]` (every epoch shuffled anew) cut at a place drawn from (seed, i). Batch b
holds examples [b * batch_size, (b + 1) * batch_size), and process p of P holds rows
[p * batch_size / P, (p + 1) * batch_size / P) of it: concatenated in process order, the batch is the same for any
number of processes and of workers. A run resumes on any mesh by asking for `start_batch`; no iterator state exists.

Grain is imported where it is used: it loads jax when jax is installed, and this module must not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmspt_jax.config import DataConfig
from lmspt_jax.data.audio_io import AudioError, crop_mono, resampled_length
from lmspt_jax.data.sources import Source, open_source
from lmspt_jax.errors import LmsptError

MAX_FAULTS = 8  # records tried for one example before the run stops
FAULT_GRACE = 3  # examples that may fail before the rate is looked at
_MAX_EXAMPLES = 1 << 48
_log = logging.getLogger(__name__)


def _draw(*values: Any) -> int:
  """64 bits from `values`, the same on every machine and for every version of NumPy."""
  return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), 'little')


class _CropExample:
  """Makes example i, given the order of records; picklable, as it travels to the workers."""

  def __init__(self, source: Source, order: Any, *, sample_rate: int, crop_samples: int, seed: int):
    self.source, self.order = source, order
    self.sample_rate, self.crop_samples, self.seed = sample_rate, crop_samples, seed

  def __call__(self, index: int, record: int) -> dict[str, np.ndarray]:
    faults = np.full(MAX_FAULTS, -1, np.int64)
    for attempt in range(MAX_FAULTS):
      record = int(record if attempt == 0 else self.order[index + attempt])
      try:
        crop = self._crop(record, index)
      except AudioError as error:
        faults[attempt] = record
        last = error
        continue
      audio = np.zeros(self.crop_samples, np.float32)
      audio[:len(crop)] = crop
      return {'audio': audio, 'num_samples': np.int32(len(crop)), 'index': np.int64(index), 'fault_record': faults}
    raise LmsptError(f'data {self.source.uri!r}: {MAX_FAULTS} records in a row can\'t be used, the last one: {last}')

  def _crop(self, record: int, index: int) -> np.ndarray:
    utterance = self.source[record]
    with utterance.open() as file:
      room = resampled_length(file.frames, file.samplerate, self.sample_rate) - self.crop_samples
      start = _draw('crop', self.seed, index) % (room + 1) if room > 0 else 0
      crop = crop_mono(file, start, self.crop_samples, self.sample_rate, name=utterance.name)
    if not len(crop):
      raise AudioError(f'{utterance.name}: cut short; fetch it again', 'truncated')
    return crop


def _close(holder: list[Any]) -> None:
  holder.pop().close()


class Batches(Iterator[dict[str, np.ndarray]]):
  """Endless iterator over batches. Close it (or use `with`) to shut its worker processes down."""

  def __init__(self, iterator: Any):
    self._holder = [iterator]
    self._closer = weakref.finalize(self, _close, self._holder)  # also at exit, before Grain's modules are torn down

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._closer.alive:
      raise ValueError('the iterator was closed')
    try:
      # Plain arrays: Grain's are views of shared memory, which would fill up while a caller keeps batches.
      return {key: np.array(value) for key, value in next(self._holder[0]).items()}
    except RuntimeError as error:
      if 'Worker process was terminated' not in str(error):
        raise
      raise LmsptError(f'data.num_workers: a worker process died ({error}); if memory ran out, use fewer') from error

  def close(self) -> None:
    """Stops the workers and waits for them; harmless when repeated."""
    self._closer()

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def training_batches(config: DataConfig, *, sample_rate: int, crop_samples: int, seed: int, start_batch: int = 0,
                     process_index: int = 0, process_count: int = 1) -> Batches:
  """Endless random crops of `config.train`, this process's rows of each batch.

  Args:
    config: where the data is; `batch_size` counts rows over all processes.
    sample_rate: Hz of the crops; records are resampled to it.
    crop_samples: length of a crop at `sample_rate`.
    seed: with the position, decides everything.
    start_batch: global number of the first batch, e.g. the step a run resumes at.
    process_index, process_count: this host and how many there are.

  Returns:
    Batches of dictionaries, local = batch_size / process_count:
      audio float32 [local, crop_samples], zeros right of a record shorter than the crop;
      num_samples int32 [local], the samples that are not that padding;
      index int64 [local], global example numbers;
      fault_record int64 [local, MAX_FAULTS], records that could not be used for this row, in the order tried, then
      -1: the row holds a crop of the first usable successor in the same order. Feed it to `FaultCounter`.

  Raises:
    LmsptError: a batch that does not divide, no data; later, MAX_FAULTS unusable records in a row.
  """
  if process_count < 1 or config.batch_size % process_count:
    raise LmsptError(f'config field data.batch_size = {config.batch_size}: must be divisible by the '
                     f'{process_count} processes')
  if not 0 <= process_index < process_count:
    raise LmsptError(f'process_index = {process_index}: must be in [0, {process_count})')
  if crop_samples < 1 or sample_rate < 1 or start_batch < 0:
    raise LmsptError(f'crop_samples = {crop_samples}, sample_rate = {sample_rate}, start_batch = {start_batch}: '
                     'must be positive, positive, and 0 or more')
  source = open_source(config.train, config.train_split)
  import grain
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read flags of its own, which stay at their defaults
  order = grain.MapDataset.range(len(source)).shuffle(seed=_draw('order', seed) % 2**32)
  order = order.repeat(_MAX_EXAMPLES // len(source))
  crop = _CropExample(source, order, sample_rate=sample_rate, crop_samples=crop_samples, seed=seed)
  # Local batch m is examples [m * local, (m + 1) * local), so host p takes m = p, p + P, ...; nothing else is decoded.
  batches = order.map_with_index(crop).batch(config.batch_size // process_count)
  batches = batches[start_batch * process_count + process_index::process_count]
  workers = config.num_workers
  # Elements are whole batches: Grain's default would hold 500 of them.
  read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0) if workers else grain.ReadOptions(1, 2)
  dataset = batches.to_iter_dataset(read)
  if workers:
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                                  worker_init_fn=_start_worker)
  return Batches(iter(dataset))


def _start_worker(worker: int, workers: int) -> None:
  """Runs in each worker: leave Ctrl-C to the parent, and never outlive it (Grain's workers would, after a kill)."""
  import multiprocessing
  import signal
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, name=f'watch-parent-{worker}-of-{workers}', daemon=True).start()


class FaultCounter:
  """Counts the records that a run had to replace, and stops it when they are too many.

  The rate is examples whose own record failed over examples seen. It stops the run once it is past `max_rate` and
  more than FAULT_GRACE examples failed, so that one bad record among the first ten is no verdict; with `max_rate`
  0 the first fault stops it. It sees this process's rows only: where several hosts train, all must stop together.
  """

  def __init__(self, max_rate: float, source: Source):
    self._max_rate, self._source = max_rate, source
    self._seen = self._failed = 0
    self._records: dict[int, int] = {}  # record -> times met

  def update(self, batch: dict[str, np.ndarray]) -> None:
    """Takes `fault_record` of a batch. Raises LmsptError naming records when the rate is passed."""
    faults = batch['fault_record']
    self._seen += len(faults)
    self._failed += int((faults[:, 0] >= 0).sum())
    for record in faults[faults >= 0].tolist():
      if record not in self._records:
        _log.warning('data: %s can\'t be used, took its successor', self._source.name(record))
      self._records[record] = self._records.get(record, 0) + 1
    if self._failed > (FAULT_GRACE if self._max_rate > 0 else 0) and self._failed > self._max_rate * self._seen:
      named = '; '.join(f'{entry["name"]} ({entry["reason"]})' for entry in self.report(limit=4))
      more = f' and {len(self._records) - 4} more' if len(self._records) > 4 else ''
      raise LmsptError(f'data {self._source.uri!r}: {self._failed} of {self._seen} examples could not be used, more '
                       f'than data.max_fault_rate = {self._max_rate}: {named}{more}; mend them or raise the rate')

  def report(self, limit: int | None = None) -> list[dict[str, Any]]:
    """[{'record': int, 'name': str, 'reason': str, 'times': int}], in order of record; decodes each again to tell
    the reason ('' when it reads well now)."""
    return [{'record': record, 'name': self._source.name(record), 'reason': self._reason(record),
             'times': self._records[record]} for record in sorted(self._records)[:limit]]

  def _reason(self, record: int) -> str:
    try:
      self._source[record].decode()
    except AudioError as error:
      return error.reason
    return ''


def held_out_utterances(config: DataConfig, sample_rate: int, num_samples: int, limit: int) -> dict[str, Any]:
  """The first `limit` usable utterances of `config.held_out` in the source's order (split, then id).

  Returns:
    audio float32 [n, num_samples], the utterance's beginning, zeros to its right; num_samples int32 [n], the
    samples that are not padding; ids and texts, lists of n strings. n <= limit.

  Raises:
    LmsptError: no data, or none of it can be used.
  """
  source = open_source(config.held_out, config.held_out_split)
  audio, ids, texts = [], [], []
  for index in range(len(source)):
    if len(audio) == limit:
      break
    try:
      utterance = source[index]
      with utterance.open() as file:
        audio.append(crop_mono(file, 0, num_samples, sample_rate, name=utterance.name))
    except AudioError as error:
      _log.warning('held-out data: skipped, %s', error)
      continue
    ids.append(utterance.id)
    texts.append(utterance.text)
  if not audio:
    raise LmsptError(f'data {config.held_out!r}: none of its {len(source)} utterances can be used')
  padded = np.zeros((len(audio), num_samples), np.float32)
  for row, samples in zip(padded, audio, strict=True):
    row[:len(samples)] = samples
  return {'audio': padded, 'num_samples': np.array([len(a) for a in audio], np.int32), 'ids': ids, 'texts': texts}
