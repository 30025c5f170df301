"""A run's workdir with one checkpoint of a tiny untrained tokenizer: 24 kHz, hop 480, codebooks 32, 16, 16, 16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from _random_weights import random_weights

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.config import ExperimentConfig, ModelConfig, QuantizerConfig, to_dict
from lmspt_jax.models.tokenizer import abstract_tokenizer

CONFIG = ExperimentConfig(name='tiny', model=ModelConfig(
    encoder_channels=4, encoder_strides=(4, 4, 5, 6), latent_dim=16, decoder_channels=32, decoder_rates=(6, 5, 4, 4),
    resynthesis_channels=16, resynthesis_rates=(8, 8, 5), dilations=(1,),
    semantic=QuantizerConfig(codebook_size=32), acoustic=QuantizerConfig(num_codebooks=3, codebook_size=16))).check()


def write_run(workdir: Path, **changed: Any) -> Path:
  """With CONFIG's fields changed; average and last step differ."""
  config = dataclasses.replace(CONFIG, **changed)
  params, codebooks = random_weights(abstract_tokenizer(config.model)[1:])
  last = random_weights(params, seed=1)
  store = CheckpointStore(workdir)
  store.save(3, {'average': {'params': params, 'codebooks': codebooks}, 'generator': {'tokenizer': last},
                 'codebooks': {**codebooks}}, {'config': to_dict(config), 'teacher_id': 'teacher-id'})
  store.close()
  return workdir
