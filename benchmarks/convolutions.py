"""How the discriminators' convolutions should be written on this machine. Run: python -m benchmarks.convolutions

For shapes of the release (2 x 2 s, 24 kHz) and of a demo (8 x 1.6 s, 16 kHz) it times three things: forward, gradient
of the input, gradient of the kernel; each in the form that `lmspt_jax.models.convolution2d` uses, in the plain form
(time along the last axis, XLA's own gradients), and for period discriminators in DAC's layout (time along the first
axis). Forms take turns within a round, so that a busy machine slows all alike, and each is the minimum over the rounds.
Milliseconds, and the ratio to the form in use.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
from jax import lax

from lmspt_jax.models.convolution2d import convolution, plain_convolution

# name: input [B, H, W, C], kernel [Hk, Wk], channels out, stride along W
SHAPES = {
    'release, resolution, 32 -> 32': ((2, 94, 257, 32), (3, 9), 32, 2),
    'release, resolution, 2 -> 32': ((2, 94, 257, 2), (3, 9), 32, 1),
    'release, period 3, 32 -> 128': ((2, 3, 5334, 32), (1, 5), 128, 3),
    'release, period 3, 128 -> 512': ((2, 3, 1778, 128), (1, 5), 512, 3),
    'release, period 3, 512 -> 1024': ((2, 3, 593, 512), (1, 5), 1024, 3),
    'release, period 3, 1024 -> 1024': ((2, 3, 198, 1024), (1, 5), 1024, 1),
    'demo, resolution, 16 -> 16': ((8, 50, 129, 16), (3, 9), 16, 2),
    'demo, resolution, 32 -> 32': ((8, 50, 129, 32), (3, 9), 32, 2),
    'demo, period 3, 16 -> 64': ((8, 3, 2845, 16), (1, 5), 64, 3),
    'demo, period 3, 64 -> 128': ((8, 3, 949, 64), (1, 5), 128, 3),
    'demo, period 3, 128 -> 256': ((8, 3, 317, 128), (1, 5), 256, 3),
    'demo, period 3, 256 -> 256': ((8, 3, 106, 256), (1, 5), 256, 1),
}


def time_first(x_BWHC, kernel_WHIO, stride, padding):
  """DAC's layout: the strided axis before the period."""
  return lax.conv_general_dilated(x_BWHC, kernel_WHIO, (stride, 1), [(p, p) for p in padding[::-1]],
                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def passes(form, x, kernel):
  """Compiled forward, input gradient and kernel gradient of `form`, each without arguments."""
  output = jax.jit(form)(x, kernel)
  cotangent = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
  input_grad = jax.jit(lambda x, k, c: jax.vjp(lambda x: form(x, k), x)[1](c)[0])
  kernel_grad = jax.jit(lambda x, k, c: jax.vjp(lambda k: form(x, k), k)[1](c)[0])
  forward = jax.jit(form)
  return [lambda: forward(x, kernel), lambda: input_grad(x, kernel, cotangent),
          lambda: kernel_grad(x, kernel, cotangent)]


def measure(shape, kernel_size, out_channels, stride, rounds):
  """{form: [forward, input gradient, kernel gradient] in milliseconds}."""
  padding = (kernel_size[0] // 2, kernel_size[1] // 2)
  x = jax.random.normal(jax.random.key(0), shape)
  kernel = 0.05 * jax.random.normal(jax.random.key(1), (*kernel_size, shape[-1], out_channels))
  forms = {'used': passes(lambda x, k: convolution(x, k, stride, padding), x, kernel),
           'plain': passes(lambda x, k: plain_convolution(x, k, stride, padding), x, kernel)}
  if kernel_size[0] == 1:
    forms['DAC layout'] = passes(
        lambda x, k: time_first(x, k, stride, padding), x.swapaxes(1, 2), kernel.swapaxes(0, 1))
  best = {name: [float('inf')] * 3 for name in forms}
  for index in range(rounds + 1):
    for name, runs in forms.items():
      for i, run in enumerate(runs):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if index:  # the first round compiles
          best[name][i] = min(best[name][i], 1e3 * (time.perf_counter() - start))
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--only', default='', help='shapes whose name contains this')
  args = parser.parse_args()
  print(f'{jax.default_backend()}, jax {jax.__version__}; milliseconds, in brackets relative to the form used')
  print('| convolution | form | forward | input gradient | kernel gradient | sum |\n|---|---|---|---|---|---|')
  for name, spec in SHAPES.items():
    if args.only not in name:
      continue
    best = measure(*spec, args.rounds)
    used = [*best['used'], sum(best['used'])]
    for form, times in best.items():
      cells = [f'{t:.1f} ({t / u:.1f})' for t, u in zip([*times, sum(times)], used, strict=True)]
      print(f'| {name} | {form} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
  main()
