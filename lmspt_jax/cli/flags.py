"""`--config=FILE[:ARG] --config.FIELD=VALUE`: a file in `configs/` and changes to it, as an ExperimentConfig.

The spelling is that of ml_collections' config_flags. Values are read by the type that the field has in the file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from lmspt_jax import config as config_lib
from lmspt_jax.config import ExperimentConfig
from lmspt_jax.errors import LmsptError, nearest

PREFIX = '--config.'
# Help of verbs that take one.
MODEL = ("a run's workdir (its newest checkpoint; WORKDIR@best, WORKDIR@STEP), a folder written by lmspt export, a "
         ".safetensors file in the layout of the authors' release, or hf://org/name[@revision]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds `--config` to a verb; `load` turns it and the overrides into a config."""
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]',
                      help='a file with get_config(), such as configs/demo.py; ARG is passed to it')
  parser.set_defaults(overrides=[])
  parser.epilog = ('Any field of the config can be changed: --config.train.num_steps=300 '
                   '--config.model.encoder_strides=4,5,6,8 --config.quirks=release')


def add_weights(parser: argparse.ArgumentParser) -> None:
  """Adds `--weights` to a verb that reads a run for others."""
  parser.add_argument('--weights', choices=('average', 'last'), default='average',
                      help="of a run: the moving average over steps, where it keeps one, or the last step's "
                           '(default: average)')


def add_hosts(parser: argparse.ArgumentParser) -> None:
  """Adds what `hosts.start` takes to a verb that several processes run together."""
  parser.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 listens for the others')
  parser.add_argument('--num-processes', type=int, metavar='N', help='how many processes work together')
  parser.add_argument('--process-id', type=int, metavar='I', help='which of them this is, from 0')


def split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Takes `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) out of a command line."""
  overrides, rest = [], []
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith(PREFIX):
      rest.append(argument)
      continue
    name, equals, value = argument.removeprefix(PREFIX).partition('=')
    if not equals:
      value = next(arguments, None)
      if value is None:
        raise LmsptError(f'{argument} has no value: write {argument}=VALUE')
    overrides.append((name, value))
  return overrides, rest


def load(reference: str, overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
  """Runs the file's get_config, applies the overrides in order and checks the result.

  Raises:
    LmsptError: names the file or the field, the value and the way out.
  """
  values = _get_config(reference).to_dict()
  for name, text in overrides:
    _override(values, name, text)
  return config_lib.from_dict(ExperimentConfig, values).check()


def _get_config(reference: str) -> ml_collections.ConfigDict:
  result = call_file('config', reference)
  if not isinstance(result, ml_collections.ConfigDict):
    raise LmsptError(f'--config={reference}: get_config returned {type(result).__name__}: '
                     'return lmspt_jax.config.to_config_dict(ExperimentConfig(...))')
  return result


def call_file(kind: str, reference: str) -> Any:
  """What get_KIND([ARG]) returns in the Python file of `--KIND=FILE[:ARG]`.

  Raises LmsptError: no such file, no Python, no such function, or it doesn't take what is given.
  """
  option, function = f'--{kind}={reference}', f'get_{kind}'
  path, _, argument = reference.partition(':')  # the argument may hold more of them: demo.py:folder:DIR
  if not Path(path).is_file():
    here = Path(path).parent
    known = sorted(str(p) for p in here.glob('*.py')) if here.is_dir() else []
    way_out = nearest(path, known) if known else 'check the path'
    raise LmsptError(f'{option}: no file {path}: {way_out}')
  spec = importlib.util.spec_from_file_location(f'lmspt_{kind}_{Path(path).stem}', path)
  if spec is None:
    raise LmsptError(f'{option}: {path} is not a Python file: give one with {function}()')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:  # also what is no text at all
    where = f'{error.filename}:{error.lineno}' if error.lineno else path
    raise LmsptError(f'{option}: {where} is not Python ({error.msg}): give a file with {function}()') from error
  found = getattr(module, function, None)
  if not callable(found):
    raise LmsptError(f'{option}: {path} has no function {function}(): see configs/ for examples')
  arguments = (argument,) if argument else ()
  try:
    inspect.signature(found).bind(*arguments)
  except TypeError as error:
    way_out = f'it takes no argument, leave out :{argument}' if argument else 'it needs one, write FILE:ARG'
    raise LmsptError(f'{option}: {function} in {path}: {way_out}') from error
  return found(*arguments)


def _override(values: dict[str, Any], name: str, text: str) -> None:
  """Sets the field with the dotted `name` to what `text` says, in the type it has now."""
  node, parts = values, name.split('.')
  for part in parts[:-1]:
    node = _child(node, part)
  if not isinstance(node, dict) or parts[-1] not in node:
    raise LmsptError(f'unknown config field {name}: {nearest(name, _alternatives(values, name))}')
  old = node[parts[-1]]
  if name == 'quirks':
    node['quirks'] = dataclasses.asdict(config_lib.QuirksConfig.named(text))
  elif name == 'data.train':
    node['train'] = tuple(map(dataclasses.asdict, config_lib.DataConfig(train=text).train))
  elif isinstance(old, dict):
    raise LmsptError(f'config field {name} = {text!r}: set its fields, e.g. --config.{name}.{next(iter(old))}=...')
  else:
    node[parts[-1]] = _parse(old, text, name)


def _child(node: Any, part: str) -> Any:
  """The field of a section, or the section of a tuple of them (data.train.0); None where there is none."""
  if isinstance(node, tuple) and part.isdecimal() and int(part) < len(node):
    return node[int(part)]
  return node.get(part) if isinstance(node, dict) else None


def _alternatives(values: dict[str, Any], name: str) -> list[str]:
  """Every dotted name; if none is near, only those of the section that was meant, or the sections."""
  names = list(_names(values))
  if nearest(name, names).startswith('did'):
    return names
  return [n for n in names if n.startswith(name.partition('.')[0] + '.')] or list(values)


def _names(values: dict[str, Any], prefix: str = '') -> Iterator[str]:
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _names(value, f'{prefix}{key}.')
      continue
    yield f'{prefix}{key}'
    for number, element in enumerate(value if isinstance(value, tuple) else ()):
      if isinstance(element, dict):
        yield from _names(element, f'{prefix}{key}.{number}.')


def _parse(old: Any, text: str, name: str) -> Any:
  """`text` as a value of `old`'s type."""
  if isinstance(old, str):
    return text
  if isinstance(old, bool):
    words = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
    if text.lower() not in words:
      raise _wrong(name, text, 'true or false')
    return words[text.lower()]
  if isinstance(old, tuple | list):
    return _parse_tuple(old, text, name)
  wanted = 'a whole number' if isinstance(old, int) else 'a number'
  try:
    return type(old)(text)
  except ValueError as error:
    raise _wrong(name, text, wanted) from error


def _parse_tuple(old: Sequence[Any], text: str, name: str) -> tuple[Any, ...]:
  example = ','.join(map(str, old)) or '1,2'
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
    raise _wrong(name, text, f'numbers separated by commas, as in {example}') from error
  value = tuple(value) if isinstance(value, tuple | list) else (value,)
  if not all(isinstance(v, int | float | str) and not isinstance(v, bool) for v in value):
    raise _wrong(name, text, f'numbers or quoted texts separated by commas, as in {example}')
  return value


def _wrong(name: str, text: str, wanted: str) -> LmsptError:
  return LmsptError(f'config field {name} = {text!r}: must be {wanted}')
