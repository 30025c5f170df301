"""Arithmetic of a traced computation: multiplications and additions of its matrix products and convolutions.

The count is the model's own, the same whatever compiles it: of a computation with a form for each platform the default
one, loops times their length, zeros put between the samples of a strided convolution's gradient left out, and what a
rematerialisation computes again kept apart. Fourier transforms and elementwise work are not counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core

SCOPES = ('codec', 'discriminators', 'teacher', 'optimizer')  # jax.named_scope of the train step's parts
RECOMPUTED = 'recomputed'
OTHER = 'other'
_SCOPE = re.compile('|'.join(SCOPES))


def scope_of(name: str) -> str:
  """The part of the step that an operation's name, 'jit(step)/transpose(jvp(codec))/...', puts it in; or 'other'."""
  found = _SCOPE.findall(name)
  return found[-1] if found else OTHER


@dataclass
class Arithmetic:
  """Operations of a step over all devices.

  Attributes:
    parts: by part of the step (`SCOPES`, 'other'); those done twice under 'recomputed'.
    passes: of all of them, each as often as a TPU's bfloat16 unit does it: 6 times for float32 at the highest
      precision, 3 times at high, else once (`jax.lax.Precision`).
  """

  parts: Counter[str] = field(default_factory=Counter)
  passes: int = 0

  @property
  def model_flops(self) -> int:
    """What a step has to compute: all but what is recomputed."""
    return self.parts.total() - self.parts[RECOMPUTED]

  def add(self, other: Arithmetic) -> None:
    self.parts.update(other.parts)
    self.passes += other.passes


def count_flops(jaxpr: core.ClosedJaxpr) -> Arithmetic:
  """Counts a traced computation (`jax.stages.Traced.jaxpr`)."""
  found = Arithmetic()
  _count(jaxpr.jaxpr, '', 1, found)
  return found


def _count(jaxpr: core.Jaxpr, path: str, times: int, total: Arithmetic) -> None:
  platforms = {}  # variable -> the platforms that a branch index chooses between
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    here = f'{path}/{eqn.source_info.name_stack}'
    if name == 'platform_index':
      platforms[eqn.outvars[0]] = params['platforms']
    elif name in ('dot_general', 'conv_general_dilated'):
      flops = times * (_product if name == 'dot_general' else _convolution)(eqn)
      total.parts[RECOMPUTED if 'rematted_computation' in here else scope_of(here)] += flops
      total.passes += flops * _passes(eqn)
    elif name == 'cond':
      chosen = _branch(params['branches'], platforms.get(eqn.invars[0]))
      found = [Arithmetic() for _ in chosen]
      for branch, branch_total in zip(chosen, found, strict=True):
        _count(branch.jaxpr, here, times, branch_total)
      total.add(max(found, key=lambda each: each.passes))
    else:
      for inner in _inner(params):
        _count(inner, here, times * params['length'] if name == 'scan' else times, total)


def _branch(branches: Any, platforms: Any) -> Any:
  """The default form (`jax.lax.platform_dependent`); all branches where the data decides."""
  if platforms is None:
    return branches
  return [branch for branch, names in zip(branches, platforms, strict=True) if names is None]


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
  found = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in params.values()]
  return [value for value in found if isinstance(value, core.Jaxpr)]


def _passes(eqn: core.JaxprEqn) -> int:
  if eqn.invars[0].aval.dtype != jnp.float32 or not eqn.params['precision']:
    return 1
  return {lax.Precision.HIGHEST: 6, lax.Precision.HIGH: 3}.get(eqn.params['precision'][0], 1)


def _product(eqn: core.JaxprEqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: core.JaxprEqn) -> int:
  kernel = eqn.invars[1].aval.shape
  taps = math.prod(kernel) // kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
  return 2 * math.prod(eqn.outvars[0].aval.shape) * taps // math.prod(eqn.params['lhs_dilation'])
