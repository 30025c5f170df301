"""A run's folder: what is written before step 0, and whether a run may go on in it."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from lmspt_jax.checkpoint import has_checkpoint
from lmspt_jax.config import ExperimentConfig, to_dict
from lmspt_jax.errors import LmsptError

CONFIG = 'config.json'
# What may change when a run goes on: nothing that the parameters depend on. Data may move (the checkpoint knows which
# utterances it held).
FREE_FIELDS = re.compile('|'.join((
    r'data\.num_workers', r'data\.max_fault_rate', r'data\.train\.\d+\.uri', r'mesh\.\w+',
    r'compute\.(accumulation|remat_\w+)', r'train\.(log_every|eval_every|eval_utterances|eval_audio|eval_seconds)',
    r'train\.(checkpoint_every|keep_checkpoints|max_skipped_steps)')))
_PACKAGES = ('lmspt_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def open_workdir(config: ExperimentConfig, workdir: Path) -> None:
  """Makes the folder, or checks that it belongs to the same experiment; then writes config, versions and command.

  A run that ended before its first checkpoint (a misspelt path, say) left nothing to keep: it binds no later config.

  Raises:
    LmsptError: the folder can't be written, or holds checkpoints of a run with another config.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / '.write_test'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise LmsptError(f'--workdir={workdir}: can\'t be written ({error.strerror}); give a folder you own') from error
  path = workdir / CONFIG
  if path.exists() and has_checkpoint(workdir):
    try:
      before = _flatten(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
      raise LmsptError(f'{path}: not JSON ({error}); remove it or use another --workdir') from error
    now = _flatten(to_dict(config))
    changed = sorted(k for k in {**before, **now} if before.get(k) != now.get(k) and not FREE_FIELDS.fullmatch(k))
    if changed:
      shown = ', '.join(f'{k}: {before.get(k)!r} there, {now.get(k)!r} now' for k in changed[:4])
      more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
      raise LmsptError(f'{workdir}: holds a run with another config ({shown}{more}); use another --workdir')
  _write(path, json.dumps(to_dict(config), indent=2))
  versions = {name: metadata.version(name) for name in _PACKAGES if _installed(name)}
  versions |= {'python': platform.python_version(), 'platform': platform.platform()}
  _write(workdir / 'versions.json', json.dumps(versions, indent=2))
  with (workdir / 'commands.txt').open('a') as file:
    file.write(f'{time.strftime("%Y-%m-%dT%H:%M:%S%z")} {shlex.join(sys.argv)}\n')


def _write(path: Path, text: str) -> None:
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text + '\n')
  temporary.replace(path)


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
      value = dict(enumerate(value))
    flat |= _flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
  return flat


def _installed(name: str) -> bool:
  try:
    metadata.version(name)
  except metadata.PackageNotFoundError:
    return False
  return True
