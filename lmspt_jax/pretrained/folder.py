"""A model as a folder to pass on, on the Hugging Face hub for one:

  model.safetensors   weights in the layout of the authors' release (a graph export has its graphs instead)
  config.json         the model's config, its hash, and where it comes from
  README.md           the card: data, licence, figures, how to use it
  SHA256SUMS          of the other files but the card, for `sha256sum -c`; checked when the folder is loaded
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmspt_jax.config import ExperimentConfig, ModelConfig, QuirksConfig, from_dict, to_dict
from lmspt_jax.convert.release_file import checked_config, read_release, write_release
from lmspt_jax.convert.safetensors_file import SafetensorsFile
from lmspt_jax.errors import LmsptError, shown
from lmspt_jax.files import open_plain, read_json, read_plain, sha256, size_of
from lmspt_jax.models.tokenizer import abstract_tokenizer
from lmspt_jax.pretrained.card import model_card
from lmspt_jax.pretrained.model import TrainedModel
from lmspt_jax.pretrained.provenance import Provenance
from lmspt_jax.version import __version__

CONFIG, CARD, SUMS, WEIGHTS = 'config.json', 'README.md', 'SHA256SUMS', 'model.safetensors'
FORMAT, VERSION = 'lmspt-model', 1
MAX_CONFIG = 1 << 20  # bytes; a file that is larger is none of these
_MAX_REST = 64 << 20  # bytes of a weight file beside its arrays


def write_folder(out: str | Path, model: TrainedModel) -> None:
  """Exports a model as safetensors. The folder appears whole or not at all.

  Raises:
    LmsptError: `out` exists and is not empty, or can't be written.
  """
  write_export(out, model, 'safetensors', lambda folder: write_release(folder / WEIGHTS, model.released()))


def write_export(out: str | Path, model: TrainedModel, kind: str, write: Callable[[Path], object],
                 graphs: dict[str, Any] | None = None) -> None:
  """A folder with what `write(folder)` leaves there, its config, card and checksums. Raises as `write_folder` does.

  `graphs` says in config.json what programs that run a graph depend on.
  """
  out = Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise LmsptError(f'--out={out}: exists and is not an empty folder; give another, or remove it')
  beside = out.with_name(f'.{out.name}.{secrets.token_hex(4)}.tmp')
  try:
    beside.mkdir(parents=True)
    write(beside)
    fields = _fields(model, kind) | ({'graphs': graphs} if graphs else {})
    (beside / CONFIG).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    files = sorted(path.name for path in beside.iterdir())
    (beside / CARD).write_text(model_card(fields, files), encoding='utf-8')
    sums = ''.join(f'{sha256(beside / name)}  {name}\n' for name in files)
    (beside / SUMS).write_text(sums, encoding='utf-8')
    os.replace(beside, out)
  except OSError as error:
    raise LmsptError(f"--out={out}: can't be written ({error.strerror or error}); give a folder that you own, with "
                     'room') from error
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def is_export(folder: Path) -> bool:
  """Whether a folder was written by `write_export`, as far as its config.json says."""
  path = folder / CONFIG
  return os.path.lexists(path) and _read(path).get('format') == FORMAT


def read_folder(folder: Path) -> TrainedModel:
  """A model that was exported as safetensors.

  Raises:
    LmsptError: a file is missing, damaged, or of another version or kind of export.
  """
  path = folder / CONFIG
  values = _read(path)
  get = functools.partial(_get, path, values)
  if get('version', int) != VERSION:
    raise LmsptError(f'{path}: version = {values["version"]}: this lmspt_jax reads {VERSION}; use the one that '
                     'wrote it')
  if get('export', str) != 'safetensors':
    raise LmsptError(f'{folder}: an export to {values["export"]}, which other programs run (see its {CARD}); give a '
                     'MODEL exported with --format=safetensors')
  try:
    model = from_dict(ModelConfig, get('model', dict))
    quirks = from_dict(QuirksConfig, get('quirks', dict))
  except LmsptError as error:
    raise LmsptError(f'{path}: {error}') from error
  checked_config(model, len(SafetensorsFile(folder / WEIGHTS).shapes), str(path))
  license, step = get('license', str), get('step', int)
  provenance = Provenance(license, get('data', list), get('metrics', dict))
  if (fault := provenance.fault()) is not None:
    raise LmsptError(f'{path}: {fault}; copy the folder again')
  _check_sum(folder, WEIGHTS, model)
  found = read_release(folder / WEIGHTS, model)
  config = ExperimentConfig(name=get('name', str), model=found.config, quirks=quirks)
  return TrainedModel(config, found.params, found.codebooks, step, get('teacher_id', str), get('weights', str),
                      str(folder), found.usage, lambda: provenance)


def _fields(model: TrainedModel, kind: str) -> dict[str, Any]:
  config, provenance = model.config.model, model.provenance
  return {
      'format': FORMAT, 'version': VERSION, 'lmspt_jax': __version__, 'export': kind,
      'name': model.config.name, 'hash': model.hash, 'step': model.step, 'weights': model.weights,
      'teacher_id': model.teacher_id, 'license': provenance.license,
      # What programs that run a graph have to know; it follows from 'model'.
      'sample_rate': config.sample_rate, 'hop': config.hop, 'frame_rate': config.frame_rate,
      'resynthesis_sample_rate': config.resynthesis_sample_rate, 'codebook_sizes': list(config.codebook_sizes),
      'model': to_dict(config), 'quirks': to_dict(model.config.quirks),
      'data': provenance.data, 'metrics': provenance.metrics}


def _read(path: Path) -> dict[str, Any]:
  values = read_json(path, MAX_CONFIG)
  return values if isinstance(values, dict) else {}


def _get(path: Path, values: dict[str, Any], name: str, kind: type) -> Any:
  value = values.get(name)
  if not isinstance(value, kind) or isinstance(value, bool):
    raise LmsptError(f'{path}: {name} = {shown(value)}: a model\'s config has {kind.__name__} there; copy the '
                     'folder again')
  return value


def _check_sum(folder: Path, name: str, model: ModelConfig) -> None:
  arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_tokenizer(model)[1:]))
  with open_plain(folder / name) as file:
    if size_of(file) > 2 * arrays + _MAX_REST:  # or hashing it could take hours
      raise LmsptError(f'{folder / name}: {size_of(file)} bytes, where this model has {arrays}; copy the folder again')
  lines = read_plain(folder / SUMS, MAX_CONFIG).decode(errors='replace').splitlines()
  wanted = next((line.split()[0] for line in lines if line.split()[1:] == [name]), None)
  found = sha256(folder / name)
  if found != wanted:
    raise LmsptError(f'{folder / name}: sha256 is {found}, {SUMS} says {wanted}; copy the folder again, or export the '
                     'changed model anew')
