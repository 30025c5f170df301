"""One full training step at the release's widths, against PyTorch. Run: python benchmarks/train_step.py

Batch 2 x 2 s of real speech, real Whisper tiny.en on 30 s windows, float32, the release's order: generator forward,
discriminator update on the detached output, generator loss against the updated discriminators, generator update. The
PyTorch side is assembled from descript-audio-codec, descript-audiotools and openai-whisper with the same sizes and
the same starting weights of the codec, and does what the release does (its generator backward also computes the
discriminators' weight gradients and throws them away). Quantizer dropout is off on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

from common import by_turns, report, speech

import _torch_discriminator  # isort: skip
import _torch_tokenizer  # isort: skip
import _torch_whisper  # isort: skip
import jax
import numpy as np
import torch
import whisper as openai_whisper
from _torch_reference import load_audiotools, load_dac

from lmspt_jax.config import (
  DiscriminatorConfig,
  ExperimentConfig,
  ModelConfig,
  OptimizerConfig,
  QuantizerConfig,
  TeacherConfig,
)
from lmspt_jax.convert.dac import discriminator_params_from_torch
from lmspt_jax.convert.release import tokenizer_from_release
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step


class TorchStep:
  """The release's step on CPU."""

  def __init__(self, config: ExperimentConfig, checkpoint, generator, discriminator):
    audiotools, dac = load_audiotools(), load_dac()
    self.signal, self.config = audiotools.AudioSignal, config
    self.generator, self.discriminator = generator.train(), discriminator.train()
    self.teacher = _torch_whisper.openai_model(checkpoint).encoder.requires_grad_(False)
    self.mel = dac.loss.MelSpectrogramLoss(
        n_mels=list(config.loss.mel_bins), window_lengths=list(config.loss.mel_windows), mel_fmin=[0] * 4,
        mel_fmax=[None] * 4, pow=2.0, mag_weight=1.0, clamp_eps=1e-5)
    adamw = lambda module, rate: torch.optim.AdamW(module.parameters(), rate, betas=(0.8, 0.9), weight_decay=0.01)
    self.generator_opt = adamw(generator, config.generator_optimizer.learning_rate)
    self.discriminator_opt = adamw(discriminator, config.discriminator_optimizer.learning_rate)

  def features(self, audio: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(audio, (0, 480_000 - audio.shape[1]))
    return self.teacher(torch.stack([openai_whisper.log_mel_spectrogram(row, 80) for row in padded]))

  def __call__(self, audio: torch.Tensor, audio_16k: torch.Tensor) -> dict[str, float]:
    weights = self.config.loss
    out = self.generator(audio)
    fake = torch.nn.functional.pad(out['audio'], (0, audio.shape[1] - out['audio'].shape[1]))
    real_maps, fake_maps = self.discriminator(audio[:, None]), self.discriminator(fake.detach()[:, None])
    d_loss = sum((f[-1] ** 2).mean() + ((1 - r[-1]) ** 2).mean() for r, f in zip(real_maps, fake_maps, strict=True))
    self.discriminator_opt.zero_grad()
    d_loss.backward()
    torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
    self.discriminator_opt.step()

    fake_maps, real_maps = self.discriminator(fake[:, None]), self.discriminator(audio[:, None])
    adversarial = sum(((1 - f[-1]) ** 2).mean() for f in fake_maps)
    matching = sum((a - b.detach()).abs().mean() for f, r in zip(fake_maps, real_maps, strict=True)
                   for a, b in zip(f[:-1], r[:-1], strict=True))
    mel = self.mel(self.signal(fake[:, None], 24_000), self.signal(audio[:, None], 24_000))
    with torch.no_grad():
      target = self.features(audio_16k)
    resynthesis = torch.nn.functional.pad(
        out['resynthesis'], (0, audio_16k.shape[1] - out['resynthesis'].shape[1]))
    distillation = ((self.features(resynthesis) - target) ** 2).mean()
    loss = (weights.adversarial * adversarial + weights.feature_matching * matching + weights.mel * mel
            + weights.distillation * distillation + sum(
                getattr(weights, k) * out[k] for k in ('semantic_commitment', 'semantic_codebook',
                                                       'acoustic_commitment', 'acoustic_codebook')))
    self.generator_opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
    self.generator_opt.step()
    return {'mel': mel.item(), 'adversarial': adversarial.item(), 'feature_matching': matching.item(),
            'discriminator': d_loss.item()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=2.0)
  parser.add_argument('--window', choices=('full', 'crop'), default='full',
                      help='of our teacher; the reference is full')
  args = parser.parse_args()
  model = dataclasses.replace(ModelConfig(), acoustic=QuantizerConfig(num_codebooks=7, codebook_size=4096))
  constant = OptimizerConfig(learning_rate=2e-4, final_learning_rate=2e-4, warmup_steps=0)
  config = ExperimentConfig(
      model=model, teacher=TeacherConfig(window=args.window), generator_optimizer=constant,
      discriminator_optimizer=constant)
  samples = model.num_frames(round(args.seconds * model.sample_rate)) * model.hop
  audio = speech(2, samples / model.sample_rate, model.sample_rate)
  audio_16k = speech(2, samples / model.sample_rate, 16_000)
  checkpoint = load_whisper('package:tiny.en', ('encoder', 'decoder'))

  generator = _torch_tokenizer.make(model)
  discriminator = _torch_discriminator.torch_discriminator(DiscriminatorConfig(), model.sample_rate)
  experiment = Experiment(config, checkpoint.dims)
  state = jax.jit(experiment.init)()
  tokenizer = tokenizer_from_release(_torch_tokenizer.state_dict(generator), model)[0]
  weights = {k: v.numpy() for k, v in discriminator.state_dict().items()}
  state = jax.device_put(state.replace(
      generator={**state.generator, 'tokenizer': tokenizer},
      discriminator=discriminator_params_from_torch(weights, DiscriminatorConfig())))
  batch = {'audio': audio, 'num_samples': np.full(2, samples, np.int32)}
  step = jax.jit(make_train_step(experiment), donate_argnums=0)
  teacher = jax.device_put(checkpoint.params['encoder'])
  start = time.perf_counter()
  step = step.lower(state, teacher, batch).compile()
  print(f'compiled in {time.perf_counter() - start:.0f} s', flush=True)

  reference = TorchStep(config, checkpoint, generator, discriminator)
  current = {'state': state, 'first': None}

  def ours():
    current['state'], found = step(current['state'], teacher, batch)
    found = jax.device_get(found)
    current['first'] = current['first'] or found

  audio_torch, audio_16k_torch = torch.from_numpy(audio), torch.from_numpy(audio_16k)
  theirs_first: dict[str, float] = {}

  def theirs():
    found = reference(audio_torch, audio_16k_torch)
    if not theirs_first:
      theirs_first.update(found)

  seconds = by_turns({'lmspt_jax': ours, 'pytorch': theirs}, args.rounds)
  for name, value in theirs_first.items():  # the same work: the first step's losses agree
    total, weight = current['first'][f'loss/{name}']
    print(f'  first step {name:<18} lmspt_jax {float(total / weight):9.4f}   pytorch {value:9.4f}')
  report(f'training step, batch 2 x {samples / model.sample_rate:.2f} s', seconds, 2 * samples / model.sample_rate,
         'lmspt_jax', 'pytorch')


if __name__ == '__main__':
  main()
