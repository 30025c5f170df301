"""Training batches whose content is a pure function of (seed, global example index).

Example i of a run is record `order[i]` of the mixture (every epoch of every group shuffled anew, the groups interleaved
by their weights), cut at a place and augmented by draws from (seed, i). Batch b holds examples
[b * batch_size, (b + 1) * batch_size), and a host makes the rows of it that its devices hold: the batch is the same for
any number of hosts and of workers. A run resumes on any mesh by asking for `start_batch`; no iterator state exists.

Grain is imported where it is used: it loads jax when jax is installed, and this module must not.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmspt_jax.config import DataConfig
from lmspt_jax.data import storage
from lmspt_jax.data.audio_io import check_sound, crop_mono, resampled_length
from lmspt_jax.data.draws import Draws, draw
from lmspt_jax.data.faults import REASONS, AudioError
from lmspt_jax.data.mixture import Group, Mixture
from lmspt_jax.data.sources import open_source
from lmspt_jax.data.transforms import Transform, from_config
from lmspt_jax.data.workers import start_worker
from lmspt_jax.errors import LmsptError

MAX_FAULTS = 32  # records tried for one example before the run stops
REMOTE_THREADS = 8  # batches that a process makes at a time of data in a store, so that as many requests are under way
PATIENCE = (1.0, 5.0, 25.0, 60.0)  # seconds between attempts to reach a store, each of which tries several times
_MAX_EXAMPLES = 1 << 48
_log = logging.getLogger(__name__)


class _CropExample:
  """Makes example i, given the order of records; picklable, as it travels to the workers."""

  def __init__(self, mixture: Mixture, order: Any, augment: Transform | None, *, sample_rate: int, crop_samples: int,
               seed: int):
    self.mixture, self.order, self.augment = mixture, order, augment
    self.sample_rate, self.crop_samples, self.seed = sample_rate, crop_samples, seed

  def __call__(self, index: int, record: int) -> dict[str, np.ndarray]:
    faults, reasons = np.full(MAX_FAULTS, -1, np.int64), np.full(MAX_FAULTS, -1, np.int8)
    for attempt in range(MAX_FAULTS):
      record = int(record if attempt == 0 else self.order[index + attempt])
      try:
        crop = self._patiently(record, index)
      except AudioError as error:
        faults[attempt], reasons[attempt] = record, REASONS.index(error.reason)
        last = error
        continue
      audio = np.zeros(self.crop_samples, np.float32)
      audio[:len(crop)] = crop
      return {'audio': audio, 'num_samples': np.int32(len(crop)), 'index': np.int64(index),
              'record': np.int64(record), 'fault_record': faults, 'fault_reason': reasons}
    uri = self.mixture.locate(record)[0].uri
    raise LmsptError(f'data {uri!r}: {MAX_FAULTS} records in a row can\'t be used, the last one: {last}')

  def _patiently(self, record: int, index: int) -> np.ndarray:
    """`_crop`, but waits for a store that can't be reached: what is in a batch must not depend on the network."""
    for wait in (*PATIENCE, None):
      try:
        return self._crop(record, index)
      except AudioError as error:
        if error.reason != 'unreachable':
          raise
        if wait is None:
          raise LmsptError(f'{error}; the same command goes on from the last checkpoint') from error
        _log.warning('data: waiting %g s: %s', wait, error)
        time.sleep(wait)

  def _crop(self, record: int, index: int) -> np.ndarray:
    utterance = self.mixture[record]
    with utterance.open() as file:
      room = resampled_length(file.frames, file.samplerate, self.sample_rate) - self.crop_samples
      start = draw('crop', self.seed, index) % (room + 1) if room > 0 else 0
      crop = crop_mono(file, start, self.crop_samples, self.sample_rate, name=utterance.name)
      check_sound(crop, room + self.crop_samples, name=utterance.name)
    return self.augment(crop, self.sample_rate, Draws(self.seed, index)) if self.augment else crop


class _HostExample:
  """Example k of those that this host makes: row k % local of batch k // local. No other host's are decoded."""

  def __init__(self, crop: _CropExample, rows: np.ndarray, batch_size: int):
    self.crop, self.rows, self.batch_size = crop, rows, batch_size

  def __call__(self, k: int) -> dict[str, np.ndarray]:
    index = int(k // len(self.rows) * self.batch_size + self.rows[k % len(self.rows)])
    return self.crop(index, self.crop.order[index])


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
                     rows: Sequence[int] | None = None, mixture: Mixture | None = None) -> Batches:
  """Endless random crops of `config.train`, this host's rows of each batch.

  Args:
    config: where the data is; `batch_size` counts rows over all hosts.
    sample_rate: Hz of the crops; records are resampled to it.
    crop_samples: length of a crop at `sample_rate`.
    seed: with the position, decides everything.
    start_batch: global number of the first batch, e.g. the step a run resumes at.
    rows: which of each batch to make (`sharding.local_rows`), in this order; None makes all.
    mixture: that of `config`, if it is open already.

  Returns:
    Batches of dictionaries, local = len(rows):
      audio float32 [local, crop_samples], zeros right of a record shorter than the crop;
      num_samples int32 [local], the samples that are not that padding;
      index int64 [local], global example numbers;
      record int64 [local], numbers in the mixture;
      fault_record int64 and fault_reason int8 [local, MAX_FAULTS], records that could not be used for this row, in
      the order tried, and why (place in faults.REASONS), then -1: the row holds a crop of the first usable successor
      in the same order. Feed them to `FaultLog`.

  Raises:
    LmsptError: rows outside of the batch, no data; later, MAX_FAULTS unusable records in a row, or a store that could
      not be reached for a while.
  """
  rows = np.arange(config.batch_size) if rows is None else np.asarray(rows, np.int64)
  if not len(rows) or rows.min() < 0 or rows.max() >= config.batch_size:
    raise LmsptError(f'rows = {rows.tolist()}: must be in [0, {config.batch_size}), and at least one')
  if crop_samples < 1 or sample_rate < 1 or start_batch < 0:
    raise LmsptError(f'crop_samples = {crop_samples}, sample_rate = {sample_rate}, start_batch = {start_batch}: '
                     'must be positive, positive, and 0 or more')
  mixture = mixture or Mixture(config)
  mixture.share()
  import grain
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read flags of its own, which stay at their defaults
  order = _order(mixture, seed)
  crop = _CropExample(mixture, order, from_config(config.augment), sample_rate=sample_rate, crop_samples=crop_samples,
                      seed=seed)
  examples = grain.MapDataset.range(_MAX_EXAMPLES).map(_HostExample(crop, rows, config.batch_size))
  batches = examples.batch(len(rows))[start_batch:]
  workers = config.num_workers
  # Elements are whole batches: Grain's default would hold 500 of them. Threads wait for stores, not for decoding.
  remote = any(storage.is_url(source.root) for source in mixture.sources)
  threads = REMOTE_THREADS if remote else 0 if workers else 1
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else max(2, threads))
  dataset = batches.to_iter_dataset(read)
  if workers:
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                                  worker_init_fn=start_worker)
  return Batches(iter(dataset))


def example_records(mixture: Mixture, seed: int, examples: Sequence[int]) -> list[int]:
  """The record that each example of a run is drawn for; one that can't be used is replaced by a successor."""
  order = _order(mixture, seed)
  return [int(order[example]) for example in examples]


def _order(mixture: Mixture, seed: int) -> Any:
  """The record of every example, without end."""
  import grain
  orders = [_shuffled(group, draw('order', seed) + number) for number, group in enumerate(mixture.groups)]
  return grain.MapDataset.mix(orders, [group.weight for group in mixture.groups]) if len(orders) > 1 else orders[0]


def _shuffled(group: Group, seed: int) -> Any:
  """The records of a group, each once an epoch, without end."""
  import grain
  order = grain.MapDataset.range(len(group)).shuffle(seed=seed % 2**32)
  return order.repeat(_MAX_EXAMPLES // len(group)).map(group.record)


def held_out_utterances(config: DataConfig, sample_rate: int, num_samples: int, limit: int) -> dict[str, Any]:
  """The first `limit` usable utterances of `config.held_out` in the source's order (split, then id).

  Returns:
    audio float32 [n, num_samples], the utterance's beginning, zeros to its right; num_samples int32 [n], the
    samples that are not padding; ids, texts and languages, lists of n strings; whole, list of n bool, whether nothing
    was cut off. n <= limit.

  Raises:
    LmsptError: no data, or none of it can be used.
  """
  source = open_source(config.held_out, config.held_out_split)
  audio, ids, texts, languages, whole = [], [], [], [], []
  for index in range(len(source)):
    if len(audio) == limit:
      break
    try:
      utterance = source[index]
      with utterance.open() as file:
        audio.append(crop_mono(file, 0, num_samples, sample_rate, name=utterance.name))
        whole.append(resampled_length(file.frames, file.samplerate, sample_rate) <= num_samples)
    except AudioError as error:
      _log.warning('held-out data: skipped, %s', error)
      continue
    ids.append(utterance.id)
    texts.append(utterance.text)
    languages.append(utterance.language)
  if not audio:
    raise LmsptError(f'data {config.held_out!r}: none of its {len(source)} utterances can be used')
  padded = np.zeros((len(audio), num_samples), np.float32)
  for row, samples in zip(padded, audio, strict=True):
    row[:len(samples)] = samples
  return {'audio': padded, 'num_samples': np.array([len(a) for a in audio], np.int32), 'ids': ids, 'texts': texts,
          'languages': languages, 'whole': whole}
