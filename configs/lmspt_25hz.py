"""The release's networks at 25 frames a second: 24 kHz, strides 4 x 5 x 6 x 8, semantic codebook 1024 (paper, v1).

    lmspt train --config=configs/lmspt_25hz.py --workdir=DIR --config.data.train=arrayrecord:SHARDS

The paper's figures for its 25 Hz model belong to its first recipe (transformer encoders, Vocos decoders), not to this
one. Untrained here.
"""

import ml_collections

from lmspt_jax.config import ComputeConfig, ExperimentConfig, ModelConfig, QuantizerConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(ExperimentConfig(
      name='lmspt_25hz', compute=ComputeConfig(dtype='bfloat16'), model=ModelConfig(
      encoder_strides=(4, 5, 6, 8), decoder_rates=(8, 6, 5, 4), resynthesis_rates=(8, 5, 4, 4),
      semantic=QuantizerConfig(codebook_size=1024),
      acoustic=QuantizerConfig(num_codebooks=7, codebook_size=1024, dropout=0.5))))
