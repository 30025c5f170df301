"""A small tokenizer on the bundled real speech with the real Whisper tiny.en, on two CPU cores.

    make demo

16 kHz, 25 frames a second, 1 semantic and 3 acoustic codebooks. 1.4 s a step, about eight minutes in all. On held-out
utterances mel ends at 60 % of step 0 and distillation at 71 %, with 448 semantic codes in use (docs/results/demo.md).
"""

import ml_collections

from lmspt_jax.config import (
  DataConfig,
  DiscriminatorConfig,
  ExperimentConfig,
  LossConfig,
  ModelConfig,
  OptimizerConfig,
  QuantizerConfig,
  TeacherConfig,
  TrainConfig,
  to_config_dict,
)

SAMPLE = 'package:speech_sample'  # 64 utterances that come with lmspt_jax

# In 200 steps codes learnt by gradient are left behind by the latents: the distillation's weight of 500 moves the
# encoder, Adam's step bounds the codes, and the commitment loss grows a hundredfold. A moving average keeps up.
LIVELY = dict(kind='ema', ema_decay=0.9, revive_below=0.1, revive_every=10)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is a data URI to use in place of the bundled sample (its splits `train` and `valid`)."""
  source = arg or SAMPLE
  return to_config_dict(ExperimentConfig(
      name='demo',
      model=ModelConfig(
          sample_rate=16_000, encoder_channels=8, encoder_strides=(4, 4, 5, 8), latent_dim=256,
          decoder_channels=256, decoder_rates=(8, 5, 4, 4), resynthesis_channels=64, resynthesis_rates=(8, 5, 4, 4),
          semantic=QuantizerConfig(num_codebooks=1, codebook_size=1024, **LIVELY),
          acoustic=QuantizerConfig(num_codebooks=3, codebook_size=1024, dropout=0.5, **LIVELY)),
      discriminator=DiscriminatorConfig(
          periods=(2, 3, 5), period_channels=(8, 32, 64, 128, 128), fft_sizes=(512,), stft_channels=8),
      teacher=TeacherConfig(checkpoint='package:tiny.en'),
      loss=LossConfig(mel_bins=(40, 80), mel_windows=(512, 1024)),
      generator_optimizer=OptimizerConfig(learning_rate=5e-4, final_learning_rate=1e-4, warmup_steps=20),
      discriminator_optimizer=OptimizerConfig(learning_rate=2e-4, final_learning_rate=5e-5, warmup_steps=20),
      data=DataConfig(train=source, held_out=source, crop_seconds=1.6, batch_size=8, num_workers=1),
      train=TrainConfig(num_steps=200, log_every=10, eval_every=100, eval_utterances=8, eval_audio=4, eval_seconds=4.0,
                        checkpoint_every=100)))
