"""Hyper-parameters as frozen dataclasses, and the only place that sees an `ml_collections.ConfigDict`.

A file in `configs/` builds an `ExperimentConfig` and returns `to_config_dict(it)`; the command line applies
overrides to that ConfigDict and hands it to `from_config_dict`, which checks every field. Everything behind this
module takes dataclasses. Defaults are the authors' release `12d5hz_v1` (arXiv 2506.16738, `kakao/lmspt`).
"""

from __future__ import annotations

from lmspt_jax.config.changes import binding_changes, changed_fields
from lmspt_jax.config.conversion import (
  from_config_dict,
  from_dict,
  to_config_dict,
  to_dict,
)
from lmspt_jax.config.experiment import (
  FLOAT32,
  AugmentConfig,
  ComputeConfig,
  CorpusConfig,
  DataConfig,
  ExperimentConfig,
  InitConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  QuirksConfig,
  TeacherConfig,
  TrainConfig,
)
from lmspt_jax.config.model import (
  DiscriminatorConfig,
  ModelConfig,
  QuantizerConfig,
)

__all__ = [
  'FLOAT32',
  'AugmentConfig',
  'ComputeConfig',
  'CorpusConfig',
  'DataConfig',
  'DiscriminatorConfig',
  'ExperimentConfig',
  'InitConfig',
  'LossConfig',
  'MeshConfig',
  'ModelConfig',
  'OptimizerConfig',
  'QuantizerConfig',
  'QuirksConfig',
  'TeacherConfig',
  'TrainConfig',
  'binding_changes',
  'changed_fields',
  'from_config_dict',
  'from_dict',
  'to_config_dict',
  'to_dict',
]
