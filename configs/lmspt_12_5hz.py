"""The authors' release, `12d5hz_v1` (arXiv 2506.16738 v2, `kakao/lmspt`): 24 kHz, 12.5 frames a second, 8 codebooks.

    lmspt train --config=configs/lmspt_12_5hz.py --workdir=DIR --config.data.train=arrayrecord:SHARDS

`configs/lmspt_12_5hz.py:release` switches the release's faults on as well (docs/quirks.md), for reproduction.
The authors trained on Emilia (6 languages), 8 GPUs with batch 8 each, 3 epochs, fp32. 74.65 M parameters; 1.4 kbit/s
at most. Untrained here: no accelerator was at hand, so no number is claimed.

Here it computes in bfloat16 and keeps a moving average of the generator; `:release` does neither. Which batch fits
which chip: `lmspt plan`, and docs/results/plan.md.
"""

import ml_collections

from lmspt_jax.config import (
  FLOAT32,
  ComputeConfig,
  ExperimentConfig,
  QuirksConfig,
  TeacherConfig,
  TrainConfig,
  to_config_dict,
)


def get_config(arg: str = 'fixed') -> ml_collections.ConfigDict:
  """`arg`: 'fixed' (default) or 'release'."""
  quirks = QuirksConfig.named(arg or 'fixed')
  window = 'full' if quirks.loss_over_padding else 'crop'
  release = arg == 'release'
  return to_config_dict(ExperimentConfig(
      name='lmspt_12_5hz', quirks=quirks, teacher=TeacherConfig(window=window),
      compute=FLOAT32 if release else ComputeConfig(dtype='bfloat16'),
      train=TrainConfig(ema_decay=0.0) if release else TrainConfig()))
