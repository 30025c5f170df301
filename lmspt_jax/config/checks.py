"""How a field that does not fit is reported."""

from __future__ import annotations

from typing import Any

from lmspt_jax.errors import LmsptError, shown


def require(condition: bool, field_name: str, value: Any, way_out: str) -> None:
  """Raises LmsptError naming the field, its value and the way out, unless `condition`."""
  if not condition:
    raise LmsptError(f'config field {field_name} = {shown(value)}: {way_out}')
