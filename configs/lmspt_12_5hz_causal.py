"""The release's causal variant at 12.5 frames a second: no code depends on audio after the end of its frame.

    lmspt train --config=configs/lmspt_12_5hz_causal.py --workdir=DIR --config.data.train=arrayrecord:SHARDS

Untrained here.
"""

import ml_collections

from lmspt_jax.config import ComputeConfig, ExperimentConfig, ModelConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(ExperimentConfig(
      name='lmspt_12_5hz_causal', compute=ComputeConfig(dtype='bfloat16'), model=ModelConfig(causal=True)))
