"""Every reader of files that may come from strangers: valid files in small for it, which of them to change, and how.

`make` writes a folder of valid files with the project's own writers (or the tests', of foreign formats); `read` does
with such a folder what the package does, and returns how many recordings in it were left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _hostile_pickles

COUNT = 4  # utterances


@dataclass(frozen=True)
class Reader:
  """One reader."""

  make: Callable[[Path, int], None]  # (folder, variant 0 or 1): writes valid files into a folder that is there
  files: dict[str, str]  # pattern -> kind of `_mutations.KINDS`, '' for what is left alone; the first that fits a path
  read: Callable[[Path], int]
  rewrite: Callable[[Path, random.Random], None] | None = None  # changes a valid folder by way of a writer
  life: int = 2500  # files until a process is replaced, as what the libraries keep adds up


# ---------------------------------------------------------------- weights


def _make_release(folder: Path, variant: int) -> None:
  import safetensors.numpy
  from _codec_fixture import SMALL
  from _random_weights import random_weights

  from lmspt_jax.convert.release_file import ReleaseCheckpoint, write_release
  from lmspt_jax.models.tokenizer import abstract_tokenizer
  config = dataclasses.replace(SMALL, causal=bool(variant), encoder_strides=(4, 5), decoder_rates=(5, 4),
                               sample_rate=24_000, resynthesis_sample_rate=24_000, resynthesis_rates=(5, 4),
                               encoder_channels=4, latent_dim=8, decoder_channels=8, resynthesis_channels=8)
  params, codebooks = random_weights(abstract_tokenizer(config)[1:], variant)
  path = folder / 'a.safetensors'
  write_release(path, ReleaseCheckpoint(config, params, codebooks, {}, 'CC0-1.0'))
  if variant:  # as the authors' own, without a config
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)


def _read_release(folder: Path) -> int:
  from lmspt_jax.convert.release_file import read_release
  read_release(folder / 'a.safetensors')
  return 0


def _make_export(folder: Path, variant: int) -> None:
  from lmspt_jax.config import ExperimentConfig
  from lmspt_jax.convert.release_file import read_release
  from lmspt_jax.pretrained.folder import write_folder
  from lmspt_jax.pretrained.model import TrainedModel
  from lmspt_jax.pretrained.provenance import Provenance
  _make_release(folder, 0)
  found = read_release(folder / 'a.safetensors')
  (folder / 'a.safetensors').unlink()
  data = [{'uri': 'folder:a', 'split': 'train', 'where': '', 'utterances': 3, 'hours': 0.5, 'licenses': ['CC0-1.0']}]
  known = Provenance('CC0-1.0', data * variant, {'held_out/mel': 1.5})
  write_folder(folder, TrainedModel(ExperimentConfig(model=found.config), found.params, found.codebooks,
                                    trace=lambda: known))


def _read_export(folder: Path) -> int:
  from lmspt_jax.pretrained.loading import load
  load(folder)
  return 0


def _make_hugging_face(folder: Path, variant: int) -> None:
  from _whisper_files import named, small_params, write_hugging_face

  from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES
  folder.rmdir()
  write_hugging_face(folder, named(small_params(), HUGGING_FACE_NAMES), 1 + variant, 'model.' * variant)


def _make_ctranslate2(folder: Path, variant: int) -> None:
  import numpy as np
  from _whisper_files import ctranslate2_variables, small_params, write_ctranslate2
  variables = ctranslate2_variables(small_params())
  if variant:
    for name in [name for name, value in variables.items() if np.ndim(value) == 2 and 'position' not in name]:
      scale = 127 / np.abs(variables[name]).max(axis=1)
      variables[name], variables[f'{name}_scale'] = np.round(variables[name] * scale[:, None]).astype(np.int8), scale
  write_ctranslate2(folder / 'model.bin', variables, [('decoder/projection/weight', 'decoder/embeddings/weight')])


def _make_openai(folder: Path, variant: int) -> None:
  import numpy as np
  from _whisper_files import named, small_params, write_openai

  from lmspt_jax.convert.whisper_names import OPENAI_NAMES
  tensors = named(small_params(), OPENAI_NAMES)
  write_openai(folder / 'a.pt', None, tensors={
      name: value.astype(np.float16) if variant else value for name, value in tensors.items()})


def _whisper(uri: str) -> Callable[[Path], int]:
  def read(folder: Path) -> int:
    from lmspt_jax.convert.whisper import load_whisper
    load_whisper(uri.format(folder), ('encoder', 'decoder'))
    return 0
  return read


def _make_run(folder: Path, variant: int) -> None:
  from _random_weights import random_weights

  from lmspt_jax.checkpoint import CheckpointStore
  from lmspt_jax.config import ExperimentConfig, ModelConfig, QuantizerConfig, to_dict
  from lmspt_jax.models.tokenizer import abstract_tokenizer
  config = ExperimentConfig(model=ModelConfig(
      encoder_channels=4, encoder_strides=(4, 5), latent_dim=8, decoder_channels=8, decoder_rates=(5, 4),
      resynthesis_channels=8, resynthesis_sample_rate=24_000, resynthesis_rates=(5, 4), dilations=(1,),
      semantic=QuantizerConfig(codebook_size=16, kind='ema' if variant else 'vq'),
      acoustic=QuantizerConfig(num_codebooks=2, codebook_size=16)))
  params, codebooks = random_weights(abstract_tokenizer(dataclasses.replace(config.model, semantic=QuantizerConfig(
      codebook_size=16)))[1:], variant) if not variant else _arrays(abstract_tokenizer(config.model)[1:])
  with CheckpointStore(folder) as store:
    store.save(3, {'average': {'params': params, 'codebooks': codebooks}},
               {'config': to_dict(config), 'teacher_id': 'teacher-id'})
  (folder / 'config.json').write_text(json.dumps(to_dict(config), indent=2))


def _arrays(abstract: Any) -> Any:
  import jax
  import numpy as np
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)


def _read_run(folder: Path) -> int:
  from lmspt_jax.checkpoint import restore_for_inference
  restore_for_inference(folder)
  return 0


def _make_vocabulary(folder: Path, variant: int) -> None:
  import tokenizers
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('i', 'n')]
  words = [*letters, *(a + b for a, b in merges)]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  names = ('endoftext', 'startoftranscript', 'en', *('cs',) * variant, 'translate', 'transcribe', 'startoflm',
           'startofprev', 'nocaptions', 'notimestamps')
  tokenizer.add_special_tokens([f'<|{name}|>' for name in names])
  tokenizer.save(str(folder / 'tokenizer.json'))


def _read_vocabulary(folder: Path) -> int:
  from lmspt_jax.models.whisper_decoding import WhisperVocabulary
  vocabulary = WhisperVocabulary.from_file(folder / 'tokenizer.json')
  vocabulary.decode([20, 30, 258, 400, vocabulary.end, 3])
  return 0


# ---------------------------------------------------------------- codes


def _make_codes(folder: Path, variant: int) -> None:
  import numpy as np

  from lmspt_jax.inference.codes import Codes, write_codes
  ids = np.random.default_rng(variant).integers(0, 1000, (4, 50 + variant))
  write_codes(folder / 'a.npz', Codes(ids, 50 * 480, 24_000, 50.0, 'deadbeef'), 1024 if not variant else 1 << 20)


def _read_codes(folder: Path) -> int:
  from lmspt_jax.inference.codes import read_codes
  read_codes(folder / 'a.npz')
  return 0


# ---------------------------------------------------------------- token shards


def _make_tokens(folder: Path, variant: int) -> None:
  """The manifest, and a record as it stands in a shard; shards themselves are held against checksums in it."""
  import numpy as np

  from lmspt_jax.slm.manifest import SUFFIXES, Manifest, ShardFiles, write_manifest
  from lmspt_jax.slm.token_rows import TokenRow, pack_row
  from lmspt_jax.slm.vocabulary import Vocabulary
  sizes = (64, 32, 32)[:2 + variant]
  ids = np.stack([np.random.default_rng(k).integers(0, size, 50) for k, size in enumerate(sizes)]).astype(np.uint16)
  (folder / 'a.record').write_bytes(pack_row(TokenRow('a', 'Grüße', 'de', 's', 50 * 480, ids)))
  files = {suffix: {'bytes': 100, 'sha256': 64 * 'a'} for suffix in SUFFIXES}
  write_manifest(folder, Manifest(
      model={'hash': 'deadbeef', 'name': 'a', 'step': 1, 'config': {}, 'license': 'MIT'}, made_with={'backend': 'cpu'},
      frame_rate=50.0, sample_rate=24_000, hop=480, dtype='uint16', codebook_sizes=sizes, vocabulary=Vocabulary(sizes),
      data={'source': 'folder:a', 'split': '', 'utterances': 1, 'fingerprint': 'f', 'licenses': {}}, utterances=1,
      hours=0.1, frames=50, tokens=50 * len(sizes), splits={}, languages={}, speakers=1, faults={}, codebooks=[],
      warnings=[], degenerate=0, files={}, shards=[ShardFiles('train-00000-of-00001', 'train', 1, 50, files)]))


def _read_tokens(folder: Path) -> int:
  from lmspt_jax.files import read_plain
  from lmspt_jax.slm.manifest import read_manifest
  from lmspt_jax.slm.token_rows import unpack_row
  manifest = read_manifest(folder)
  manifest.paths(folder, '.parquet', 'train')
  unpack_row(read_plain(folder / 'a.record', 1 << 20))
  return 0


def _rewrite_tokens(folder: Path, rng: random.Random) -> None:
  """A record with a field of another type, size or shape."""
  import msgpack
  fields = msgpack.unpackb((folder / 'a.record').read_bytes())
  fields[rng.choice(sorted(fields))] = rng.choice((
      None, -1, 0, 2**63, 1.5, 'x', b'x', '', b'', [], {}, 'x' * (2 << 20), [1], [1, 2, 3], [2**62, 2**62], [-1, -1],
      [2, 2**63], [True, 50], 'object', 'O', 'uint16', 'int32', 'float64', 'U9999999', b'\0' * 999, [0, 0], [[], []],
      msgpack.ExtType(5, b'x'), float('nan'), True))
  packed = msgpack.packb(fields)
  (folder / 'a.record').write_bytes(rng.choice((packed, packed, packed[:-3], packed + b'x', b'\x91' * 5000,
                                                b'\xdf\xff\xff\xff\xff', b'\xc6\xff\xff\xff\xff', b'\x81\x80\x80')))


# ---------------------------------------------------------------- data


def _utterances(variant: int) -> list:
  from _corpus_formats import utterances
  found = sorted(utterances(), key=lambda utterance: len(utterance.encoded()))
  return found[variant * COUNT:(variant + 1) * COUNT]


def _make_folder(folder: Path, variant: int) -> None:
  from _corpus_formats import write_folder
  write_folder(_utterances(variant), folder)


def _make_tars(folder: Path, variant: int) -> None:
  from _corpus_formats import write_tars
  folder.rmdir()
  write_tars(_utterances(variant), folder, 1)


def _make_parquet(folder: Path, variant: int) -> None:
  from _corpus_formats import write_parquet
  folder.rmdir()
  write_parquet(_utterances(variant), folder, 1, 2)


def _make_shards(folder: Path, variant: int) -> None:
  from lmspt_jax.data.prepare import prepare
  source = folder.with_name(f'{folder.name}.source')
  source.mkdir()
  _make_folder(source, variant)
  prepare(f'folder:{source}', folder, num_shards=1, num_workers=1, progress=False)


def _source(uri: str) -> Callable[[Path], int]:
  def read(folder: Path) -> int:
    """As a training run does: opens the source, then each recording, and counts those that can't be used."""
    from lmspt_jax.data.audio_io import crop_mono
    from lmspt_jax.data.faults import AudioError
    from lmspt_jax.data.sources import open_source
    source = open_source(uri.format(folder))
    source.index.counts('license')
    counted = len(source.shard_faults)
    for position in range(min(len(source), 2 * COUNT)):
      try:
        utterance = source[position]
        with utterance.open() as file:
          crop_mono(file, 0, 8000, 24_000, name=utterance.name)
      except AudioError:
        counted += 1
    return counted
  return read


def _read_info(folder: Path) -> int:
  from lmspt_jax.data.dataset_info import load_info
  info = load_info(folder)
  return info.num_faults * 0


def _rewrite_shards(folder: Path, rng: random.Random) -> None:
  """Records of other types, sizes and shapes in a whole shard, or an index of other columns."""
  import msgpack
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
  if rng.random() < 0.4:
    return _rewrite_table(folder / 'index.parquet', rng)
  path = min(folder.glob('*.arrayrecord'))
  reader = ArrayRecordReader(str(path))
  records = list(reader.read_all())
  reader.close()
  number = rng.randrange(len(records))
  key = rng.choice(('id', 'audio', 'sample_rate', 'num_samples', 'text', 'license'))
  fields = msgpack.unpackb(records[number])
  fields[key] = rng.choice((None, -1, 0, 2**63, 1.5, 'x', b'x', '', b'', [], {}, 'x' * (2 << 20), b'\0' * 100,
                            [[]] * 99,
                            msgpack.ExtType(5, b'x'), float('nan'), True, {'a': {'b': {}}}, fields['text'], 2**40))
  packed = msgpack.packb(fields)
  records[number] = rng.choice((packed, packed, packed[:-3], packed + b'x', b'', b'\x91' * 5000,
                                b'\xdf\xff\xff\xff\xff', b'\xc6\xff\xff\xff\xff', b'\xc9\xff\xff\xff\xff\1',
                                b'\xdb\x7f\xff\xff\xff', b'\x81\x80\x80'))
  if rng.random() < 0.2:
    records = rng.choice((records[:-1], records * 2, []))
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()
  info = json.loads((folder / 'dataset.json').read_text())
  info['shards'][0].update(bytes=path.stat().st_size, records=len(records))
  (folder / 'dataset.json').write_text(json.dumps(info))


def _rewrite_parquet(folder: Path, rng: random.Random) -> None:
  _rewrite_table(min(folder.glob('*.parquet')), rng)


def _rewrite_table(path: Path, rng: random.Random) -> None:
  """A whole parquet file with a column of another type, of texts that are no UTF-8, of nulls, or without it."""
  import numpy as np
  import pyarrow as pa
  import pyarrow.parquet as pq
  table = pq.read_table(path)
  place = rng.randrange(table.num_columns)
  name, rows = table.column_names[place], table.num_rows
  raw = b'\xff\xfe\xed\xa0\x80ab'[:rows].ljust(rows, b'\xff')
  text = pa.Array.from_buffers(pa.string(), rows, [None, pa.py_buffer(np.arange(rows + 1, dtype=np.int32)),
                                                   pa.py_buffer(raw)])
  strange = rng.choice(('\n', '../../x', '\0', 'a\x1b[31m', 'x' * (2 << 20), '', '/etc/passwd', 'NaN'))
  column = rng.choice((
      text, pa.nulls(rows), pa.nulls(rows, table.schema.field(place).type),
      pa.array([rng.choice((-1, 2**62, 99))] * rows),
      pa.array([strange] * rows), pa.array([[{'a': 1}]] * rows), pa.array([b'\xff'] * rows), pa.array([1e300] * rows),
      pa.array([{'bytes': None, 'path': strange}] * rows), pa.array([{'bytes': strange.encode(), 'path': ''}] * rows),
      pa.array([2**63 + 5] * rows, pa.uint64()), pa.array([float('nan')] * rows), pa.array([True] * rows),
      pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([strange]))))
  if rng.random() < 0.15:
    table = table.remove_column(place)
  else:
    table = table.set_column(place, rng.choice((name, name, name, strange[:70_000], 'audio', 'id')), column)
  if rng.random() < 0.2:
    table = table.append_column(rng.choice((name, 'id', 'x')), column)
  if rng.random() < 0.3:
    features = rng.choice(({'split': {'_type': 'ClassLabel', 'names': [1, None, '\n']}}, [], {'a': 3},
                           {name: {'_type': 'ClassLabel', 'names': ['a']}}))
    table = table.replace_schema_metadata({'huggingface': rng.choice((
        json.dumps({'info': {'features': features}}), '[' * 100_000, '{', '\x00'))})
  if rng.random() < 0.1:  # a type whose Python class was once unpickled from the file
    extended = pa.field(name, pa.binary(), metadata={
        'ARROW:extension:name': 'arrow.py_extension_type',
        'ARROW:extension:metadata': rng.choice(_hostile_pickles.CALLS)})
    table = table.set_column(0, extended, pa.array([b'x'] * rows))
  pq.write_table(table, path, row_group_size=rng.choice((1, 2, 1000)), store_schema=rng.random() < 0.8,
                 compression=rng.choice(('snappy', 'zstd', 'gzip', 'none')))


READERS: dict[str, Reader] = {
    'release': Reader(_make_release, {'*.safetensors': 'safetensors'}, _read_release),
    'export': Reader(_make_export, {'*.md': '', 'SHA256SUMS': 'bytes', '*.json': 'json',
                                    '*.safetensors': 'safetensors'}, _read_export),
    'hugging-face': Reader(_make_hugging_face, {'*.json': 'json', '*.safetensors': 'safetensors'}, _whisper('hf:{}')),
    'ctranslate2': Reader(_make_ctranslate2, {'*.bin': 'ctranslate2'}, _whisper('ctranslate2:{}')),
    'openai': Reader(_make_openai, {'*.pt': 'zip'}, _whisper('openai:{}/a.pt')),
    'vocabulary': Reader(_make_vocabulary, {'*.json': 'json'}, _read_vocabulary),
    'codes': Reader(_make_codes, {'*.npz': 'zip'}, _read_codes),
    'tokens': Reader(_make_tokens, {'manifest.json': 'json', 'a.record': 'bytes'}, _read_tokens, _rewrite_tokens),
    'run': Reader(_make_run, {'*commit_success.txt': '', 'checkpoints/*/d/*': 'ocdbt',
                              'checkpoints/*manifest.ocdbt': 'ocdbt', 'checkpoints/*': 'json'}, _read_run, life=250),
    'dataset.json': Reader(_make_shards, {'dataset.json': 'json'}, _read_info),
    'manifest.jsonl': Reader(_make_folder, {'manifest.jsonl': 'jsonl'}, _source('folder:{}')),
    'arrayrecord': Reader(_make_shards, {'*.arrayrecord': 'bytes', 'index.parquet': 'parquet', 'dataset.json': 'json'},
                          _source('arrayrecord:{}'), _rewrite_shards),
    'webdataset': Reader(_make_tars, {'*.tar': 'tar'}, _source('webdataset:{}/*.tar')),
    'parquet': Reader(_make_parquet, {'*.parquet': 'parquet'}, _source('parquet:{}/*.parquet'), _rewrite_parquet),
}
