"""Discriminators and losses against descript-audio-codec and descript-audiotools, on real speech."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _discriminator_fixture import SMALL, speech
from _torch_discriminator import (
  MEL_BINS,
  MEL_WINDOWS,
  channels_last,
  gan_loss,
  mel_loss,
  torch_discriminator,
)
from flax import nnx

from lmspt_jax.config import DiscriminatorConfig
from lmspt_jax.convert.dac import discriminator_params_from_torch
from lmspt_jax.losses.adversarial import discriminator_loss, feature_matching_loss, generator_adversarial_loss
from lmspt_jax.losses.mel import multi_scale_mel_loss
from lmspt_jax.models.discriminators import Discriminators

CASES = {'release': (DiscriminatorConfig(), 24_000, 2, 24_000), 'small': (SMALL, 16_000, 2, 8_192),
         'scales': (DiscriminatorConfig(periods=(), rates=(1, 2, 4), fft_sizes=()), 24_000, 2, 12_001)}


@pytest.fixture(scope='module', params=CASES)
def case(request):
  config, sample_rate, batch, samples = CASES[request.param]
  reference = torch_discriminator(config, sample_rate)
  params = discriminator_params_from_torch({k: v.numpy() for k, v in reference.state_dict().items()}, config)
  graph, state = nnx.split(nnx.eval_shape(lambda: Discriminators(config, sample_rate, rngs=nnx.Rngs(0))))
  nnx.replace_by_pure_dict(state, params)
  return config, reference, lambda params, x: nnx.merge(graph, params)(x), state, speech(batch, samples)


def test_feature_maps(case):
  config, reference, apply, state, (real, _) = case
  with torch.no_grad():
    expected = channels_last(reference(torch.from_numpy(real)[:, None]), config)
  got = jax.jit(apply)(state, real)
  assert [[m.shape for m in part] for part in got] == [[m.shape for m in part] for part in expected]
  worst = max(np.abs(g - e).max() for gs, es in zip(got, expected, strict=True) for g, e in zip(gs, es, strict=True))
  largest = max(np.abs(e).max() for es in expected for e in es)
  print(f'worst {worst:.2e}, largest value {largest:.2f}')
  assert worst <= 1e-4


def test_losses_and_gradients(case):
  _, reference, apply, state, (real, fake) = case
  gan, signal = gan_loss(reference)
  fake_t = torch.from_numpy(fake).requires_grad_()
  discriminator = gan.discriminator_loss(signal(fake_t), signal(torch.from_numpy(real)))
  discriminator.backward()
  grads = discriminator_params_from_torch({k: p.grad.numpy() for k, p in reference.named_parameters()}, case[0])
  adversarial, feature = gan.generator_loss(signal(fake_t), signal(torch.from_numpy(real)))
  (audio_grad,) = torch.autograd.grad(adversarial + 2 * feature, fake_t)

  got, got_grads = jax.jit(jax.value_and_grad(
      lambda p, r, f: discriminator_loss(apply(p, r), apply(p, f))))(state, real, fake)
  np.testing.assert_allclose(got, discriminator.item(), rtol=1e-5)
  for (path, g), e in zip(jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(got_grads)), jax.tree.leaves(grads),
                          strict=True):
    # The two sum in another order, and a value that changes sign at a leaky ReLU changes its slope.
    assert np.linalg.norm(g - e) <= 1e-3 * np.linalg.norm(e), jax.tree_util.keystr(path)

  def generator(x, params, real):  # as arguments: constants would be folded, for minutes
    reals, fakes = apply(params, real), apply(params, x)
    parts = generator_adversarial_loss(fakes), feature_matching_loss(reals, fakes)
    return parts[0] + 2 * parts[1], parts
  (_, parts), got_grad = jax.jit(jax.value_and_grad(generator, has_aux=True))(jnp.asarray(fake), state, real)
  np.testing.assert_allclose(parts[0], adversarial.item(), rtol=1e-5)
  np.testing.assert_allclose(parts[1], feature.item(), rtol=1e-4)
  difference = np.linalg.norm(got_grad - audio_grad.numpy()) / np.linalg.norm(audio_grad.numpy())
  print(f'audio gradient differs by {difference:.2e} of its norm')
  assert difference <= 1e-3


@pytest.mark.parametrize('sample_rate', [16_000, 24_000])
def test_mel_loss(sample_rate):
  real, fake = speech(4, 24_000)
  fake_t = torch.from_numpy(fake).requires_grad_()
  expected = mel_loss(fake_t, torch.from_numpy(real), sample_rate)
  (grad,) = torch.autograd.grad(expected, fake_t)
  got, got_grad = jax.value_and_grad(multi_scale_mel_loss)(
      jnp.asarray(fake), jnp.asarray(real), sample_rate, MEL_BINS, MEL_WINDOWS)
  difference = np.linalg.norm(got_grad - grad.numpy()) / np.linalg.norm(grad.numpy())
  print(f'mel loss {got:.6f}, reference {expected.item():.6f}; gradient differs by {difference:.2e} of its norm')
  assert abs(got - expected.item()) <= 1e-4
  assert difference <= 1e-3
