"""Sweeps: many runs of one config, each with changes of its own. What a file in configs/sweeps/ builds one from."""

from __future__ import annotations

from lmspt_jax.sweeps.runs import (
  Run,
  Sweep,
  choice,
  grid,
  log_uniform,
  named,
  product,
  random,
  seeds,
  uniform,
  zipped,
)

__all__ = ['Run', 'Sweep', 'choice', 'grid', 'log_uniform', 'named', 'product', 'random', 'seeds', 'uniform', 'zipped']
