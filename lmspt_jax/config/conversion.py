"""Config dataclasses from and to `ml_collections.ConfigDict` and JSON, with every name and type checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from typing import Any

import ml_collections

from lmspt_jax.config.experiment import CorpusConfig, ExperimentConfig, QuirksConfig
from lmspt_jax.errors import LmsptError, nearest, shown


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """What a file in `configs/` returns: typed, locked against unknown fields."""
  return ml_collections.ConfigDict(dataclasses.asdict(config), convert_dict=True).lock()


def to_dict(config: Any) -> dict[str, Any]:
  """Plain JSON-able dictionary of any config dataclass."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


_type_hints = functools.cache(typing.get_type_hints)


def from_config_dict(config_dict: ml_collections.ConfigDict) -> ExperimentConfig:
  """Checks names, types and values; raises LmsptError naming the field, its value and the nearest known names."""
  return from_dict(ExperimentConfig, config_dict.to_dict()).check()


def from_dict(cls: type, values: dict[str, Any], prefix: str = '') -> Any:
  """Builds the dataclass `cls` from nested dictionaries (a ConfigDict's or a JSON file's)."""
  hints = _type_hints(cls)
  names = {f.name for f in dataclasses.fields(cls)}
  out = {}
  for key, value in values.items():
    if key not in names:
      raise LmsptError(f'unknown config field {prefix}{key}: {nearest(key, names)}')
    out[key] = _coerce(hints[key], value, f'{prefix}{key}')
  return cls(**out)


def _coerce(hint: Any, value: Any, name: str) -> Any:
  if dataclasses.is_dataclass(hint):
    if name == 'quirks' and isinstance(value, str):
      return QuirksConfig.named(value)
    if not isinstance(value, dict):
      example = f'{name}.{dataclasses.fields(hint)[0].name}'
      raise LmsptError(f'config field {name} = {shown(value)}: set its fields, e.g. {example}')
    return from_dict(hint, value, prefix=f'{name}.')
  if typing.get_origin(hint) is tuple:
    element = typing.get_args(hint)[0]
    if element is CorpusConfig and isinstance(value, str):
      return value  # DataConfig takes it
    if not isinstance(value, list | tuple):
      raise LmsptError(f'config field {name} = {shown(value)}: give a tuple')
    numbered = dataclasses.is_dataclass(element)
    return tuple(_coerce(element, v, f'{name}.{i}' if numbered else name) for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
    return float(value)
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    wanted = hint.__name__ if not isinstance(hint, types.UnionType) else str(hint)
    raise LmsptError(f'config field {name} = {shown(value)}: must be {wanted}')
  return value
