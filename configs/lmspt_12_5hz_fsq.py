"""The release with a finite scalar quantizer for the semantic codes: levels 8, 8, 8, 6, 5, so 15,360 codes.

    lmspt train --config=configs/lmspt_12_5hz_fsq.py --workdir=DIR --config.data.train=arrayrecord:SHARDS

Untrained here.
"""

import ml_collections

from lmspt_jax.config import ComputeConfig, ExperimentConfig, ModelConfig, QuantizerConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(ExperimentConfig(
      name='lmspt_12_5hz_fsq', compute=ComputeConfig(dtype='bfloat16'), model=ModelConfig(
      semantic=QuantizerConfig(kind='fsq', fsq_levels=(8, 8, 8, 6, 5)))))
