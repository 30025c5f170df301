"""The release's networks at 6.25 frames a second: 24 kHz, strides 4 x 5 x 6 x 8 x 4, semantic codebook 4096 (v1).

    lmspt train --config=configs/lmspt_6_25hz.py --workdir=DIR --config.data.train=arrayrecord:SHARDS

Untrained here.
"""

import ml_collections

from lmspt_jax.config import ComputeConfig, ExperimentConfig, ModelConfig, QuantizerConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(ExperimentConfig(
      name='lmspt_6_25hz', compute=ComputeConfig(dtype='bfloat16'), model=ModelConfig(
      encoder_strides=(4, 5, 6, 8, 4), decoder_rates=(4, 8, 6, 5, 4), resynthesis_rates=(8, 8, 8, 5),
      semantic=QuantizerConfig(codebook_size=4096),
      acoustic=QuantizerConfig(num_codebooks=7, codebook_size=4096, dropout=0.5))))
