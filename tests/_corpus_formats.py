"""The same utterances in every format that a source reads: same ids, texts, splits, labels, lengths and samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from lmspt_jax.data.sources import Source, Utterance, open_source


def utterances(count: int | None = None) -> list[Utterance]:
  """The bundled speech: 16 kHz, mono, 16-bit FLAC, by (split, id)."""
  source = open_source('package:speech_sample')
  return [source[index] for index in range(len(source))][:count]


def metadata_of(utterance: Utterance) -> dict[str, Any]:
  info = soundfile.info(io.BytesIO(utterance.encoded()))
  labels = {name: getattr(utterance, name) for name in ('id', 'text', 'language', 'speaker', 'split', 'license')}
  return {**labels, 'seconds': info.frames / info.samplerate}


def write_everywhere(found: Sequence[Utterance], root: Path) -> dict[str, str]:
  """Kind -> URI of the utterances as a folder, as tars, as parquet files and as a TensorFlow dataset under `root`."""
  return {
    'folder': f'folder:{write_folder(found, root / "folder")}',
    'webdataset': f'webdataset:{write_tars(found, root / "tars")}',
    'parquet': f'parquet:{write_parquet(found, root / "parquet")}',
    'tfds': f'tfds:{write_tfds(found, root / "tfds")}',
  }


def as_in_a_worker(source: Source) -> Source:
  """The source as a spawned process gets it, with nothing open."""
  return ForkingPickler.loads(bytes(ForkingPickler.dumps(source)))


def _parts(found: Sequence[Utterance], count: int) -> list[Sequence[Utterance]]:
  """Round robin, so that no file holds one split or a range of ids."""
  return [found[part::count] for part in range(count)]


def write_folder(found: Sequence[Utterance], folder: Path) -> Path:
  """FLAC files and a manifest; returns the folder."""
  (folder / 'audio').mkdir(parents=True)
  with open(folder / 'manifest.jsonl', 'w', encoding='utf-8') as manifest:
    for utterance in reversed(found):
      path = f'audio/{utterance.id}.flac'
      (folder / path).write_bytes(utterance.encoded())
      manifest.write(json.dumps({**metadata_of(utterance), 'path': path}) + '\n')
  return folder


def write_tars(found: Sequence[Utterance], folder: Path, count: int = 3) -> str:
  """Tars with ID.flac and ID.json; returns their pattern."""
  folder.mkdir(parents=True)
  for number, part in enumerate(_parts(found, count)):
    with tarfile.open(folder / f'{number:03d}.tar', 'w') as tar:
      for utterance in part:
        for suffix, data in (('flac', utterance.encoded()), ('json', json.dumps(metadata_of(utterance)).encode())):
          member = tarfile.TarInfo(f'{utterance.id}.{suffix}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return f'{folder}/{{000..{count - 1:03d}}}.tar'


def audio_table(found: Sequence[Utterance]) -> pa.Table:
  """Columns of metadata, and `audio` in Hugging Face's layout."""
  table = pa.Table.from_pylist([metadata_of(utterance) for utterance in found])
  audio = [{'bytes': utterance.encoded(), 'path': f'{utterance.id}.flac'} for utterance in found]
  return table.append_column('audio', pa.array(audio, pa.struct({'bytes': pa.binary(), 'path': pa.string()})))


def write_parquet(found: Sequence[Utterance], folder: Path, count: int = 2, row_group_size: int = 10) -> str:
  """Parquet files; returns their pattern."""
  folder.mkdir(parents=True)
  for number, part in enumerate(_parts(found, count)):
    pq.write_table(audio_table(part), folder / f'{number:04d}.parquet', row_group_size=row_group_size)
  return f'{folder}/*.parquet'


# ---------------------------------------------------------------- TensorFlow Datasets, without TensorFlow


def samples_of(utterance: Utterance) -> np.ndarray:
  """int16 [N]."""
  return soundfile.read(io.BytesIO(utterance.encoded()), dtype='int16')[0]


def write_tfds(found: Sequence[Utterance], data_dir: Path, num_shards: int = 2) -> Path:
  """The project's own builder: int16 samples with every label; returns the version's folder."""
  import tensorflow_datasets as tfds
  names = ('id', 'text', 'language', 'speaker', 'license')
  features = dict.fromkeys(names, tfds.features.Text())
  features['speech'] = tfds.features.Tensor(shape=(None,), dtype=np.int16)

  def example(utterance: Utterance) -> dict[str, Any]:
    return {'speech': samples_of(utterance), **{name: getattr(utterance, name) for name in names}}

  return build_tfds('speech_corpus', features, example, found, data_dir, num_shards=num_shards,
                    metadata={'sample_rate': 16_000})


def write_tfds_librispeech(found: Sequence[Utterance], data_dir: Path, *, lazy_decode: bool = False) -> Path:
  """A `librispeech` as TFDS's own builder prepares it, with the splits dev_clean and train_clean100."""
  import tensorflow_datasets as tfds
  stored = np.str_ if lazy_decode else tfds.features.Tensor(shape=(None,), dtype=np.int16)
  features = {'speech': stored, 'text': tfds.features.Text(), 'speaker_id': np.int64, 'chapter_id': np.int64,
              'id': np.str_}

  def example(utterance: Utterance) -> dict[str, Any]:
    number = found.index(utterance)
    return {'speech': utterance.encoded() if lazy_decode else samples_of(utterance), 'text': utterance.text.upper(),
            'speaker_id': 100 + number % 3, 'chapter_id': 7, 'id': f'{100 + number % 3}-7-{number:04d}'}

  config, version = ('lazy_decode', '2.1.2') if lazy_decode else ('default', '2.1.1')
  folder = build_tfds('librispeech', features, example, found, data_dir, config=config, version=version,
                      split=lambda utterance: {'valid': 'dev_clean'}.get(utterance.split, 'train_clean100'))
  say_audio(folder, 'speech', dtype='int16', file_format='flac', sample_rate=16_000, encoding='NONE',
            lazy_decode=lazy_decode)
  return folder


def say_audio(folder: Path, name: str, channels: Sequence[int] = (), **settings: Any) -> None:
  """Makes features.json call a feature Audio.

  TFDS can't make that feature without TensorFlow, so a builder here writes the tensor that Audio is stored as.
  """
  from google.protobuf import json_format
  from tensorflow_datasets.core.proto import feature_pb2
  path = folder / 'features.json'
  content = json_format.Parse(path.read_text(), feature_pb2.Feature())
  content.features_dict.features[name].CopyFrom(feature_pb2.Feature(
    python_class_name='tensorflow_datasets.core.features.audio_feature.Audio',
    audio=feature_pb2.AudioFeature(shape={'dimensions': [-1, *channels]}, **settings)))
  path.write_text(json_format.MessageToJson(content))


def build_tfds(name: str, features: dict[str, Any], example: Callable[[Utterance], dict[str, Any]],
               found: Iterable[Utterance], data_dir: Path, *, version: str = '1.0.0', config: str = '',
               split: Callable[[Utterance], str] = lambda utterance: utterance.split, num_shards: int = 1,
               metadata: dict[str, Any] | None = None) -> Path:
  """A dataset by TFDS's own GeneratorBasedBuilder; returns the version's folder."""
  import tensorflow_datasets as tfds
  tfds.disable_progress_bar()
  dataset = name

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = dataset
    VERSION = tfds.core.Version(version)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version=version)] if config else []

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                   metadata=tfds.core.MetadataDict(metadata) if metadata else None)

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(name) for name in sorted({split(utterance) for utterance in found})}

    def _generate_examples(self, wanted):
      return ((utterance.id, example(utterance)) for utterance in found if split(utterance) == wanted)

  builder = Builder(data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
  return Path(builder.data_dir)
