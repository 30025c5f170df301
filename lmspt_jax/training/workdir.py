"""A run's folder: what is written before step 0, and whether a run may go on in it."""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

from lmspt_jax import hosts
from lmspt_jax.checkpoint import has_checkpoint
from lmspt_jax.config import ExperimentConfig, binding_changes, to_dict
from lmspt_jax.errors import LmsptError
from lmspt_jax.files import read_json

CONFIG = 'config.json'
_SEEN_WITHIN = 60.0  # seconds after which a file that host 0 wrote is on no storage that this host shares
_PACKAGES = ('lmspt_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def open_workdir(config: ExperimentConfig, workdir: Path) -> None:
  """Host 0 makes the folder, or checks that it belongs to the same experiment, and writes config, versions and command;
  the others see that they were started for the same, with the same folder.

  A run that ended before its first checkpoint (a misspelt path, say) left nothing to keep: it binds no later config.

  Raises:
    LmsptError: the folder can't be written, holds checkpoints of a run with another config, or isn't every host's.
  """
  hosts.check_same('--config', json.dumps(to_dict(config)), 'start all hosts with the same command')
  if hosts.is_writer():
    _prepare(config, workdir)
  _check_shared(workdir)


def _check_shared(workdir: Path) -> None:
  name = hosts.gather('token', secrets.token_hex(8))[0]
  path = workdir / f'.shared_{name}'
  if hosts.is_writer():
    path.touch()
  hosts.gather('written', '')
  end = time.monotonic() + _SEEN_WITHIN
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  seen = hosts.gather('seen', 'yes' if path.exists() else '')
  if hosts.is_writer():
    path.unlink()
  if not all(seen):
    raise LmsptError(f'--workdir={workdir}: host {seen.index("")} does not see what host 0 writes there; give a folder '
                     'on storage that all hosts share')


def _prepare(config: ExperimentConfig, workdir: Path) -> None:
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
      before = read_json(path)
    except LmsptError as error:
      raise LmsptError(f'{error}; remove it or use another --workdir') from error
    if not isinstance(before, dict):
      raise LmsptError(f'{path}: not a config; remove it or use another --workdir')
    changed = binding_changes(before, to_dict(config))
    if changed:
      more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
      raise LmsptError(f'{workdir}: holds a run with another config ({", ".join(changed[:4])}{more}); use another '
                       '--workdir')
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


def _installed(name: str) -> bool:
  try:
    metadata.version(name)
  except metadata.PackageNotFoundError:
    return False
  return True
