"""MODEL, as commands and `Tokenizer.from_pretrained` take it, to a trained model:

  DIR                        a run's workdir (its newest checkpoint), or a folder written by `lmspt export`
  DIR@best, DIR@STEP         another checkpoint of a run: the best one by train.best_metric, or that of a step
  FILE.safetensors           in the layout of the authors' release
  hf://org/name[@revision]   such a folder, or one such file, from the Hugging Face hub
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from lmspt_jax import checkpoint
from lmspt_jax.config import ExperimentConfig, ModelConfig
from lmspt_jax.convert import hub
from lmspt_jax.convert.release_file import read_release
from lmspt_jax.errors import LmsptError
from lmspt_jax.pretrained import folder, provenance
from lmspt_jax.pretrained.model import TrainedModel
from lmspt_jax.pretrained.provenance import Provenance

# Of a file that says nothing of it.
RELEASE_LICENSE = "not named in the file (the authors' own weights are CC-BY-NC-4.0)"
_ON_THE_HUB = (folder.CONFIG, folder.CARD, folder.SUMS, '*.safetensors')


def load(model: str | os.PathLike, config: ModelConfig | None = None, average: bool = True) -> TrainedModel:
  """Loads a model.

  Args:
    model: as above.
    config: of a .safetensors file that does not tell all of it: an FSQ's levels, a model without subtraction.
    average: of a run, the moving average over steps, where it keeps one; else the last step.

  Raises:
    LmsptError: there is no model there, or not the config's.
  """
  text = str(model)
  path, which = checkpoint.run_and_which(model)
  if text.startswith(hub.SCHEME):
    return _from_hub(text, config)
  if path.suffix == '.safetensors' and not which:
    return _from_file(path, config)
  kinds = ("a run's workdir (the --workdir of lmspt train, with @best or @STEP after it for another checkpoint), a "
           "folder written by lmspt export, a .safetensors file of the release's layout, or hf://org/name")
  if not path.exists():
    raise LmsptError(f'{text}: no such model; give {kinds}')
  if not path.is_dir():
    raise LmsptError(f'{text}: not a model; give {kinds}')
  if which or (path / checkpoint.FOLDER).is_dir():
    return _from_run(text, config, average)
  return _from_folder(path, config)


def _from_run(run: str, config: ModelConfig | None, average: bool) -> TrainedModel:
  _refuse(config, run)
  found = checkpoint.restore_for_inference(run, average)
  weights = 'average' if average and found.config.train.ema_decay else 'last'
  workdir, _ = checkpoint.run_and_which(run)
  trace = lambda: provenance.of_run(found.config.data.train, workdir, found.step)
  return TrainedModel(found.config, found.params, found.codebooks, found.step, found.teacher_id, weights, run,
                      best=found.best, trace=trace)


def _from_file(path: Path, config: ModelConfig | None, license: str = '') -> TrainedModel:
  found = read_release(path, config)
  known = Provenance(found.license or license or RELEASE_LICENSE)
  return TrainedModel(ExperimentConfig(name=path.stem, model=found.config), found.params, found.codebooks,
                      teacher_id='not named in the file', source=str(path), usage=found.usage, trace=lambda: known)


def _from_folder(path: Path, config: ModelConfig | None) -> TrainedModel:
  """An exported folder, or one with a single release file, as the authors' repository is."""
  if folder.is_export(path):
    _refuse(config, path)
    return folder.read_folder(path)
  files = sorted(path.glob('*.safetensors'))
  if len(files) != 1:
    found = f'{len(files)} .safetensors files' if files else f'no {checkpoint.FOLDER}/, and no .safetensors file'
    raise LmsptError(f"{path}: not a model ({found} in it); give a run's workdir, a folder written by lmspt export, or "
                     'one .safetensors file')
  return _from_file(files[0], config, _license_of_card(path / folder.CARD))


def _from_hub(uri: str, config: ModelConfig | None) -> TrainedModel:
  path = hub.fetch(uri, _ON_THE_HUB, 'give a folder or a .safetensors file on this machine')
  try:
    found = _from_folder(path, config)
  except LmsptError as error:
    raise LmsptError(f'{uri}: {error}') from error
  # snapshots/COMMIT is the folder's name in the cache.
  return dataclasses.replace(found, source=f'{uri.partition("@")[0]}@{path.name}')


def _license_of_card(path: Path) -> str:
  """`license:` of the YAML at the head of a hub repository's README; '' where there is none."""
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError):
    return ''
  head = re.match(r'---\s*\n(.*?)\n---', text, re.DOTALL)
  found = re.search(r'^license:\s*["\']?([\w.+-]+)', head[1], re.MULTILINE) if head else None
  return found[1] if found else ''


def _refuse(config: ModelConfig | None, path: str | Path) -> None:
  if config is not None:
    raise LmsptError(f'{path}: has a config of its own; give config with a .safetensors file alone')
