"""What the parts of the release's train step cost to compile for a v5e chip, without one.

    python -m benchmarks.compile_time                          # needs the extra `plan`; some 20 minutes on 2 cores
    python -m benchmarks.compile_time --parts=period_3 --targets=1,0.95,0.9

Each part is compiled forward and backward in bfloat16, two crops of 6 s. For every `compute.tpu_convolution_target` it
prints CPU and wall seconds of the compiler, the size of the program, and the time the compiler estimates for a run:
milliseconds by its own cycles, not a measurement.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from lmspt_jax.cli.plan import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lmspt_jax.audio.mel import log_mel_spectrogram
from lmspt_jax.chips import parse_topology
from lmspt_jax.cli import flags
from lmspt_jax.config import ComputeConfig, ExperimentConfig
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.models.codec import Decoder, Encoder
from lmspt_jax.models.discriminators import PeriodDiscriminator, ResolutionDiscriminator
from lmspt_jax.models.layers import ResidualUnit
from lmspt_jax.models.whisper import WHISPER_SIZES, WhisperEncoder, abstract_params, bind
from lmspt_jax.planning.hlo import Program
from lmspt_jax.planning.plan import slice_devices
from lmspt_jax.training.compiled import tpu_options

CROPS = 2
CLOCK = 1.5e9  # Hz, of a v5e's TensorCore (https://cloud.google.com/tpu/docs/v5e: 197e12 / (4 * 128 * 128 * 2))
Traceable = tuple[Callable[..., Any], tuple[Any, ...]]


def module(make: Callable[[], nnx.Module], x: jax.ShapeDtypeStruct) -> Traceable:
  """The gradient of what a module makes of x, in its parameters and in x."""
  graphdef, state = nnx.split(nnx.eval_shape(make))

  def loss(state, x):
    return sum(jnp.mean(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(nnx.merge(graphdef, state)(x)))

  return jax.value_and_grad(loss, argnums=(0, 1)), (state, x)


def parts(config: ExperimentConfig) -> dict[str, Callable[[], Traceable]]:
  model, judges, loss = config.model, config.discriminator, config.loss
  samples, dtype = config.crop_samples, jnp.dtype(config.compute.dtype)
  audio = jax.ShapeDtypeStruct((CROPS, samples), jnp.float32)
  pairs = jax.ShapeDtypeStruct((2 * CROPS, samples), jnp.float32)  # real and generated
  latents = jax.ShapeDtypeStruct((CROPS, samples // model.hop, model.latent_dim), jnp.float32)
  speech = jax.ShapeDtypeStruct((CROPS, 16 * samples // 24), jnp.float32)
  options = lambda: dict(rngs=nnx.Rngs(0), dtype=dtype)
  dims = WHISPER_SIZES['large-v3']

  def teacher() -> Traceable:
    def distance(params, x):
      return jnp.mean(jnp.square(bind(WhisperEncoder, dims, params, dtype=dtype)(log_mel_spectrogram(x, dims.n_mels))))
    return jax.grad(distance, argnums=1), (abstract_params(WhisperEncoder, dims), speech)

  def unit(channels: int, steps: int) -> Callable[[], Traceable]:
    return lambda: module(lambda: ResidualUnit(channels, 3, **options()),
                          jax.ShapeDtypeStruct((CROPS, steps, channels), dtype))

  return {
      'unit_32': unit(32, samples), 'unit_128': unit(128, samples // 20),
      'encoder': lambda: module(lambda: Encoder(
          model.encoder_channels, model.encoder_strides, model.latent_dim, model.dilations, **options()), audio),
      'decoder': lambda: module(lambda: Decoder(
          model.latent_dim, model.decoder_channels, model.decoder_rates, model.dilations, **options()), latents),
      'auxiliary_decoder': lambda: module(lambda: Decoder(
          model.latent_dim, model.resynthesis_channels, model.resynthesis_rates, model.dilations, **options()),
          latents),
      **{f'period_{period}': lambda period=period: module(
          lambda: PeriodDiscriminator(period, judges.period_channels, **options()), pairs)
         for period in judges.periods},
      **{f'resolution_{size}': lambda size=size: module(
          lambda: ResolutionDiscriminator(size, judges.stft_channels, judges.band_edges, **options()), pairs)
         for size in judges.fft_sizes},
      'mel_loss': lambda: (jax.grad(lambda x, y: multi_scale_mel_loss(
          x, y, model.sample_rate, loss.mel_bins, loss.mel_windows)), (audio, audio)),
      'teacher': teacher}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/lmspt_12_5hz.py')
  parser.add_argument('--parts', default='', help='A,B: these alone')
  parser.add_argument('--targets', default='1,0.95', help='values of compute.tpu_convolution_target')
  args = parser.parse_args()
  device = SingleDeviceSharding(slice_devices(parse_topology('v5e:2x2'))[0])
  known = parts(flags.load(args.config))
  print('| part | convolution target | CPU, s | wall, s | program, MB | run, ms (estimated) |')
  print('|---|---|---|---|---|---|')
  for name in args.parts.split(',') if args.parts else known:
    function, shapes = known[name]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=('tpu',))
    for target in map(float, args.targets.split(',')):
      start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
      compiled = lowered.compile(compiler_options=tpu_options(ComputeConfig(tpu_convolution_target=target)))
      after = resource.getrusage(resource.RUSAGE_SELF)
      cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
      cycles = Program(compiled.as_text()).costs().cycles.total()
      size = compiled.memory_analysis().generated_code_size_in_bytes
      print(f'| {name} | {target:g} | {cpu:.0f} | {time.monotonic() - start:.0f} | {size / 1e6:.1f} | '
            f'{1000 * cycles / CLOCK:.2f} |', flush=True)


if __name__ == '__main__':
  main()
