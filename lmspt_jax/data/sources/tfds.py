"""tfds:NAME[/CONFIG][:VERSION] and tfds:DIR, datasets that TensorFlow Datasets has prepared, read without TensorFlow.

NAME is looked for in $TFDS_DATA_DIR, else in TFDS's own default folder; DIR is one version's folder, with features.json
in it. The files must be array_record, the one format of TFDS with random access to examples.

The audio is the dataset's Audio feature, or else its only tensor of samples; every other scalar feature goes through
`metadata.row_from`. TFDS's splits are the splits. An example without an id is SPLIT:NUMBER.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmspt_jax.data import audio_io, storage
from lmspt_jax.data.audio_io import Pcm
from lmspt_jax.data.faults import AudioError
from lmspt_jax.data.index import Index, assemble, cached_index, table_from_rows
from lmspt_jax.data.metadata import row_from
from lmspt_jax.data.sources.base import ShardFault, Source
from lmspt_jax.errors import LmsptError

MAX_OPEN = 64  # shards with an open reader; each holds a file descriptor
_FEATURES = 'features.json'
_NAME = re.compile(r'(\w+)(?:/([\w.+-]+))?(?::([\d*]+\.[\d*]+\.[\d*]+))?')
_RATES = ('sample_rate', 'sampling_rate')
_PREFERRED = ('audio', 'speech')  # where a dataset has several tensors of samples
_FEATURE_CLASSES = 'tensorflow_datasets.core.features'
_CLASSES = {  # kinds of features that are read; those that features.json names are not imported
  'tensor': f'{_FEATURE_CLASSES}.tensor_feature.Tensor',
  'text': f'{_FEATURE_CLASSES}.text_feature.Text',
  'class_label': f'{_FEATURE_CLASSES}.class_label_feature.ClassLabel',
}
_KNOWN = {  # what these corpora are, which TFDS does not say
  'librispeech': {'language': 'en', 'license': 'CC-BY-4.0'},
  'libritts': {'language': 'en', 'license': 'CC-BY-4.0'},
  'vctk': {'language': 'en', 'license': 'CC-BY-4.0'},
}


@dataclass(frozen=True)
class _Shard:
  split: str
  number: int  # among the split's shards
  length: int  # examples
  first: int  # the number of its first example in the split


class TfdsSource(Source):
  """Examples of a prepared dataset. Every one is read once, for the index, which is cached by shard."""

  def __init__(self, uri: str, name: str):
    self.uri, self.root = uri, str(_version_folder(uri, name))
    self._reader = _Reader(self.root)
    tables, faults = self._read_index()
    if faults and not tables:
      raise LmsptError(faults[0].message)
    self.shard_faults = tuple(faults)
    self.index = assemble(tables, name=f'data {uri!r}')

  def _name(self, row: int) -> str:
    return f'{self.index.value(row, "path")}:{self.index.value(row, "position")}'

  def _read(self, row: int, name: str) -> bytes | Pcm:
    example = self._reader.example(self.index.value(row, 'path'), self.index.value(row, 'position'), name)
    return self._reader.dataset.content(example, name)

  def _read_index(self) -> tuple[list[pa.Table], list[ShardFault]]:
    from tqdm import tqdm
    tables, faults = [], []
    for shard in tqdm(self._reader.dataset.shards, desc=f'index of {self.uri}', unit='shard', delay=5):
      path = storage.join(self.root, shard)
      try:
        version = storage.stat(path, name=path).version
        key = f'tfds:{os.path.abspath(path)}:{version}'
        tables.append(cached_index(key, lambda shard=shard: Index(self._shard_table(shard))).table)
      except AudioError as error:
        faults.append(ShardFault(shard, error.reason, f'{error}'))
    return tables, faults

  def _shard_table(self, shard: str) -> pa.Table:
    """A row for every example. Raises AudioError if none can be read."""
    dataset = self._reader.dataset
    info = dataset.shards[shard]
    rows, fault = [], None
    for position in range(info.length):
      key = f'{info.split}:{info.first + position}'
      row: dict[str, Any] = {'id': key, 'split': info.split, 'path': shard, 'position': position}
      name = f'{shard}:{position}'
      try:
        example = self._reader.example(shard, position, name)
      except AudioError as error:  # the row stays, so that whoever meets it is told
        fault = error
        rows.append(row)
        continue
      values = row_from(dataset.labels(example, name), name)
      rows.append({**values, **row, 'id': values['id'] or key, 'seconds': dataset.seconds(example, name)})
    if fault and len(rows) == sum('text' not in row for row in rows):
      raise AudioError(f'{self.root}/{shard}: none of its {info.length} examples can be read; prepare it again',
                       fault.reason)
    return table_from_rows(rows)


class _Reader:
  """Examples by (shard, position), with a bounded number of open shards. Thread-safe; pickles as its folder."""

  def __init__(self, root: str):
    self._root, self._lock = root, threading.Lock()
    self._open: OrderedDict[str, Any] = OrderedDict()
    self._dataset: _Dataset | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {'root': self._root}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(state['root'])

  @property
  def dataset(self) -> _Dataset:
    with self._lock:
      if self._dataset is None:
        self._dataset = _Dataset(self._root)
      return self._dataset

  def example(self, shard: str, position: int, name: str) -> dict[str, Any]:
    """Raises AudioError: missing, corrupt record."""
    from google.protobuf.message import DecodeError
    try:
      return self._source(shard)[position]
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, DecodeError, zlib.error) as error:
      storage.stat(storage.join(self._root, shard), name=name)  # which says so if the file is gone
      cause = ' '.join(str(error).split())[:120]
      raise AudioError(f'{name}: damaged example ({cause}); prepare it again', 'corrupt record') from error

  def _source(self, shard: str) -> Any:
    dataset = self.dataset
    with self._lock:
      if shard not in self._open:
        self._open[shard] = dataset.open(shard)
        if len(self._open) > MAX_OPEN:
          self._open.popitem(last=False)  # closes when its last user lets go of it
      self._open.move_to_end(shard)
      return self._open[shard]


class _Dataset:
  """A version's folder: its shards, and what its features mean."""

  def __init__(self, root: str):
    from google.protobuf import json_format
    from tensorflow_datasets.core import dataset_info, read_only_builder
    from tensorflow_datasets.core.proto import feature_pb2
    self._root = root
    try:
      proto = dataset_info.read_proto_from_builder_dir(root)
      content = json.loads((Path(root) / _FEATURES).read_text(encoding='utf-8'))
      features = json_format.ParseDict(content, feature_pb2.Feature())
    except (OSError, ValueError, json_format.ParseError, dataset_info.DatasetInfoFileError) as error:
      cause = ' '.join(str(error).split())[:120]
      raise LmsptError(f'{root}: its dataset_info.json or {_FEATURES} can\'t be read ({cause}); prepare the dataset '
                       'again') from error
    formats = {proto.file_format or 'tfrecord', *proto.alternative_file_formats}
    if 'array_record' not in formats:
      raise LmsptError(f'{root}: prepared as {min(formats)}, which has no random access; run "tfds convert_format '
                       f'--dataset_version_dir={root} --out_file_format=array_record --out_dir=DIR" and give tfds:DIR')
    self._choose_features(features)
    proto.features.CopyFrom(features)
    self._builder = read_only_builder.ReadOnlyBuilder(builder_dir=root, info_proto=proto)
    info = self._builder.info
    if proto.file_format != 'array_record':
      info.set_file_format('array_record', override=True, override_if_initialized=True)
    self._rate = self._rate or info.metadata.get('sample_rate')
    if not self._encoded and not self._rate and not any(name in info.features for name in _RATES):
      raise LmsptError(f'{root}: feature {self._audio!r} has no sample rate; add sample_rate to its metadata.json')
    self._defaults = _KNOWN.get(proto.name, {'license': ' '.join(proto.redistribution_info.license.split())})
    self.shards: dict[str, _Shard] = {}
    for split, found in info.splits.items():
      first = 0
      for number, (path, length) in enumerate(zip(found.filepaths, found.shard_lengths, strict=True)):
        if length:
          self.shards[path.name] = _Shard(split, number, length, first)
        first += length

  def _choose_features(self, top: Any) -> None:
    """Leaves the audio and the scalars in `top`; the audio as a plain tensor, since TFDS's Audio needs TensorFlow."""
    features = top.features_dict.features
    audio = {name for name, feature in features.items() if feature.HasField('audio')}
    audio = audio or {name for name, feature in features.items() if _holds_samples(feature)}
    chosen = [name for name in _PREFERRED if name in audio] if len(audio) > 1 else sorted(audio)
    if not chosen:
      what = f'several features of audio, {", ".join(sorted(audio))}' if audio else 'no feature of audio'
      raise LmsptError(f'{self._root}: has {what}; it must have one, or one that is called "audio"')
    self._audio, found = chosen[0], features[chosen[0]]
    self._encoded, self._rate = found.audio.lazy_decode, found.audio.sample_rate
    if found.HasField('audio'):
      settings = copy.deepcopy(found.audio)  # setting `tensor` unsets it
      found.tensor.encoding = settings.encoding.lower()
      if self._encoded:
        found.tensor.dtype = 'string'
      else:
        found.tensor.dtype = settings.dtype
        found.tensor.shape.CopyFrom(settings.shape)
    for name in [name for name in features if name != self._audio]:
      kind = features[name].WhichOneof('content')
      if kind not in _CLASSES or (kind == 'tensor' and features[name].tensor.shape.dimensions):
        del features[name]
    top.python_class_name = f'{_FEATURE_CLASSES}.features_dict.FeaturesDict'
    for feature in features.values():
      feature.python_class_name = _CLASSES[feature.WhichOneof('content')]

  def open(self, shard: str) -> Any:
    """The examples of one shard, a sequence of dictionaries."""
    place = self.shards[shard]
    return self._builder.as_data_source(f'{place.split}[{place.number}shard]')

  def labels(self, example: dict[str, Any], name: str) -> dict[str, Any]:
    """What is not audio. Raises LmsptError for text that is not UTF-8."""
    values = dict(self._defaults)
    for key, value in example.items():
      if key == self._audio:
        continue
      feature = self._builder.info.features[key]
      if isinstance(value, bytes):
        try:
          value = value.decode()
        except UnicodeDecodeError as error:
          raise LmsptError(f'{name}: feature {key} is not UTF-8 text; prepare the dataset again') from error
      elif hasattr(feature, 'int2str') and feature.names:
        value = feature.int2str(value) if value >= 0 else ''  # -1: unknown
      values[key] = value
    return values

  def content(self, example: dict[str, Any], name: str) -> bytes | Pcm:
    """The audio of an example. Raises AudioError: corrupt record, bad rate, undecodable."""
    samples = example.get(self._audio)
    if isinstance(samples, bytes):
      return samples
    rate = self._rate or next((example[key] for key in _RATES if key in example), 0)
    if not isinstance(samples, np.ndarray):
      raise AudioError(f'{name}: has no {self._audio}; prepare it again', 'corrupt record')
    if not samples.size:
      raise AudioError(f'{name}: holds no samples; remove it', 'empty')
    if not audio_io.MIN_RATE <= rate <= audio_io.MAX_RATE:
      raise AudioError(f'{name}: sample rate {rate} Hz; must be {audio_io.MIN_RATE} to {audio_io.MAX_RATE} Hz',
                       'bad rate')
    if np.issubdtype(samples.dtype, np.integer) and samples.dtype != np.int16:
      # TFDS keeps 16-bit audio as int64 unless it is told otherwise.
      if samples.min() < -32768 or samples.max() > 32767:
        raise AudioError(f'{name}: samples beyond 16 bits, of unknown full scale; prepare it with lazy_decode')
      samples = samples.astype(np.int16)
    return Pcm(samples if samples.dtype == np.int16 else samples.astype(np.float32), int(rate))

  def seconds(self, example: dict[str, Any], name: str) -> float:
    """Length of the audio (by its header, if encoded), NaN if it can't be used."""
    try:
      content = self.content(example, name)
      if isinstance(content, Pcm):
        return len(content.samples) / content.sample_rate
      with audio_io.open_audio(content, name=name) as file:
        return file.frames / file.samplerate
    except AudioError:
      return math.nan


def _holds_samples(feature: Any) -> bool:
  """Whether a feature is a tensor of unknown length in a type that samples have."""
  dimensions = feature.tensor.shape.dimensions
  return (feature.HasField('tensor') and feature.tensor.dtype in ('int16', 'int32', 'int64', 'float32')
          and len(dimensions) in (1, 2) and dimensions[0] == -1)


def _version_folder(uri: str, name: str) -> Path:
  """The folder of the version that is asked for, else of the newest. Raises LmsptError saying how to prepare it."""
  folder = Path(name).expanduser()
  if (folder / _FEATURES).is_file():
    return folder
  matched = _NAME.fullmatch(name)
  if not matched:
    raise LmsptError(f'data {uri!r}: no folder with {_FEATURES}, and no tfds:NAME[/CONFIG][:1.0.0]; check the path')
  from tensorflow_datasets.core import dataset_builder
  from tensorflow_datasets.core.utils import file_utils, version
  dataset, config, wanted = matched[1], matched[2], matched[3] or '*.*.*'
  places = [os.environ['TFDS_DATA_DIR']] if os.environ.get('TFDS_DATA_DIR') else file_utils.list_data_dirs()
  for place in map(str, places):
    if storage.is_url(place):
      raise LmsptError(f'TFDS_DATA_DIR = {place}: examples can\'t be read from a store; copy the folder to a disk')
    parent = Path(place).expanduser() / dataset
    parent /= config or dataset_builder.load_default_config_name(parent) or ''
    found = [found for found in version.list_all_versions(parent) if found.match(wanted)]
    if found and (parent / str(found[-1]) / _FEATURES).is_file():
      return parent / str(found[-1])
  raise LmsptError(f'data {uri!r}: not prepared in {", ".join(map(str, places))}; run "tfds build '
                   f'{dataset}{f"/{config}" if config else ""} --file_format=array_record" (which needs TensorFlow) or '
                   'set TFDS_DATA_DIR')
