"""In which fields two configs differ, and which of them may differ in one run."""

from __future__ import annotations

import re
from typing import Any

# What may change when a run goes on: nothing that the parameters depend on. Data may move (the checkpoint knows which
# utterances it held).
FREE_FIELDS = re.compile('|'.join((
    r'data\.num_workers', r'data\.max_fault_rate', r'data\.train\.\d+\.uri', r'mesh\.\w+',
    r'compute\.(accumulation|remat_\w+|tpu_convolution_target)',
    r'train\.(log_every|eval_every|eval_utterances|eval_audio|eval_seconds|eval_metrics|eval_asr)',
    r'train\.(checkpoint_every|keep_checkpoints|best_metric|max_skipped_steps)')))


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
  """'NAME: VALUE there, VALUE now' of every field that differs between two configs, by its dotted name."""
  before, now = _flatten(before), _flatten(now)
  return {name: f'{name}: {before.get(name)!r} there, {now.get(name)!r} now'
          for name in sorted({**before, **now}) if before.get(name) != now.get(name)}


def binding_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Of `changed_fields` those that make another run of it."""
  return [text for name, text in changed_fields(before, now).items() if not FREE_FIELDS.fullmatch(name)]


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
      value = dict(enumerate(value))
    flat |= _flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
  return flat
