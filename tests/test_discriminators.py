"""Discriminators: the PyTorch reference's numbers on real speech, and gradients that do not depend on formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _discriminator_fixture import SMALL, load_fixture
from flax import nnx

from lmspt_jax.config import DiscriminatorConfig
from lmspt_jax.convert.dac import discriminator_params_from_torch
from lmspt_jax.errors import LmsptError
from lmspt_jax.losses.adversarial import discriminator_loss, feature_matching_loss, generator_adversarial_loss
from lmspt_jax.models.convolution2d import convolution, plain_convolution
from lmspt_jax.models.discriminators import (
  Discriminators,
  PeriodDiscriminator,
  ResolutionDiscriminator,
  ScaleDiscriminator,
  normalise,
)


@pytest.fixture(scope='module')
def discriminator_fixture():
  return load_fixture()


@pytest.fixture(scope='module')
def small(discriminator_fixture):
  """(apply, params with the reference's weights)."""
  _, _, fixture = discriminator_fixture
  weights = {k.removeprefix('weight/'): v for k, v in fixture.items() if k.startswith('weight/')}
  graph, params = nnx.split(nnx.eval_shape(lambda: Discriminators(SMALL, 16_000, rngs=nnx.Rngs(0))))
  nnx.replace_by_pure_dict(params, discriminator_params_from_torch(weights, SMALL))
  return jax.jit(lambda p, x: nnx.merge(graph, p)(x)), params


def test_feature_maps_equal_the_reference(small, discriminator_fixture):
  (apply, params), (real, _, fixture) = small, discriminator_fixture
  parts = apply(params, real)
  assert [len(p) for p in parts] == [6, 6, 7, 26]
  for i, part in enumerate(parts):
    np.testing.assert_allclose(part[-1], fixture[f'logits/{i}'], atol=1e-5)
    for m, expected in zip(part, fixture[f'maps/{i}'], strict=True):
      ramp = np.linspace(-1, 1, m.size).reshape(m.shape)
      np.testing.assert_allclose([jnp.sqrt(jnp.mean(m**2)), jnp.mean(m * ramp)], expected, atol=1e-5)


def test_losses_and_audio_gradient_equal_the_reference(small, discriminator_fixture):
  (apply, params), (real, fake, fixture) = small, discriminator_fixture

  def generator(x):
    reals, fakes = apply(params, real), apply(params, x)
    parts = discriminator_loss(reals, fakes), generator_adversarial_loss(fakes), feature_matching_loss(reals, fakes)
    return parts[1] + 2 * parts[2], parts
  (_, parts), grad = jax.jit(jax.value_and_grad(generator, has_aux=True))(fake)
  np.testing.assert_allclose(parts, fixture['losses'][:3], rtol=1e-5)
  assert np.linalg.norm(grad - fixture['audio_grad']) <= 1e-3 * np.linalg.norm(fixture['audio_grad'])


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('kernel', [(1, 5), (3, 9), (3, 3)])
@pytest.mark.parametrize(('stride', 'width'), [(1, 20), (2, 21), (3, 20), (3, 22), (4, 23)])
def test_gradients_equal_the_plain_convolution(kernel, stride, width, groups):
  keys = jax.random.split(jax.random.key(0), 3)
  x_BHWC = jax.random.normal(keys[0], (2, 6, width, 4))
  kernel_HWIO = jax.random.normal(keys[1], (*kernel, 4 // groups, 6))
  args = stride, (kernel[0] // 2, kernel[1] // 2), groups
  y, pull = jax.vjp(lambda x, k: convolution(x, k, *args), x_BHWC, kernel_HWIO)
  expected, expected_pull = jax.vjp(lambda x, k: plain_convolution(x, k, *args), x_BHWC, kernel_HWIO)
  np.testing.assert_array_equal(y, expected)
  cotangent = jax.random.normal(keys[2], y.shape)
  for got, wanted in zip(pull(cotangent), expected_pull(cotangent), strict=True):
    np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-5)


def test_formulation_follows_the_platform():
  def lowered(platform):
    grad = jax.grad(lambda x, k: convolution(x, k, 2, (1, 4), 1).sum())
    shapes = jax.ShapeDtypeStruct((1, 4, 16, 2), jnp.float32), jax.ShapeDtypeStruct((3, 9, 2, 2), jnp.float32)
    return jax.jit(grad).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
  assert 'lhs_dilate = [1, 2]' not in lowered('cpu')
  assert 'lhs_dilate = [1, 2]' in lowered('tpu')


@pytest.mark.parametrize('edges, channels', [(DiscriminatorConfig().band_edges, 60), ((0.0, 0.4, 1.0), 4)])
def test_bands_together_equal_bands_apart(edges, channels):
  """Features and all gradients; at 60 channels only two bands fit one convolution."""
  discriminator = ResolutionDiscriminator(128, channels, edges, rngs=nnx.Rngs(0))
  graph, params = nnx.split(discriminator)
  x_BTFC = jax.random.normal(jax.random.key(0), (2, 6, 65, 2))

  def features(name):
    return lambda params, x: getattr(nnx.merge(graph, params), name)(x)

  apart, pull_apart = jax.vjp(features('bands_apart'), params, x_BTFC)
  together, pull_together = jax.vjp(features('bands_together'), params, x_BTFC)
  assert [len(maps) for maps in together] == [5] * (len(edges) - 1)
  cotangent = jax.tree.map(jnp.sin, apart)
  for a, b in zip(jax.tree.leaves((apart, pull_apart(cotangent))),
                  jax.tree.leaves((together, pull_together(cotangent))), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_a_tpu_takes_bands_together():
  def convolutions(platform):
    graph, params = nnx.split(ResolutionDiscriminator(1024, 32, DiscriminatorConfig().band_edges, rngs=nnx.Rngs(0)))
    traced = jax.jit(lambda p, x: nnx.merge(graph, p)(x)).trace(params, jax.ShapeDtypeStruct((1, 4_096), jnp.float32))
    return traced.lower(lowering_platforms=(platform,)).as_text().count('stablehlo.convolution')
  assert [convolutions(platform) for platform in ('cpu', 'tpu')] == [5 * 5 + 1, 2 * 5 + 1]


def test_normalise_ignores_offset_and_gain(discriminator_fixture):
  real, _, _ = discriminator_fixture
  audio = normalise(real)
  np.testing.assert_allclose(jnp.abs(audio).max(axis=1), 0.8, rtol=1e-6)
  np.testing.assert_allclose(normalise(0.1 * real + 0.3), audio, atol=1e-5)
  assert not normalise(jnp.zeros((1, 100))).any()


def test_a_whole_number_of_periods_gets_one_more():
  discriminator = PeriodDiscriminator(2, (1,) * 5, rngs=nnx.Rngs(0))
  assert discriminator(jnp.ones((1, 54)))[0].shape == (1, 2, 10, 1)  # ceil(28 / 3) steps; 27 would give 9


def test_resampling_repeats_the_edge_samples():
  discriminator = ScaleDiscriminator(2, (4, 8, 8, 8, 8, 8), rngs=nnx.Rngs(0))
  halved = discriminator(jnp.ones((1, 101)))  # a constant stays one, up to its ends
  discriminator.rate = 1
  for a, b in zip(halved, discriminator(jnp.ones((1, 50))), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_items_do_not_depend_on_their_batch_mates(small, discriminator_fixture):
  (apply, params), (real, _, _) = small, discriminator_fixture
  for both, alone in zip(jax.tree.leaves(apply(params, real)), jax.tree.leaves(apply(params, real[1:])), strict=True):
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_release_has_its_parameters_and_tree_mode_works():
  nnx.set_graph_mode(False)
  try:
    state = nnx.state(nnx.eval_shape(lambda: Discriminators(DiscriminatorConfig(), 24_000, rngs=nnx.Rngs(0))))
  finally:
    nnx.set_graph_mode(True)
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 42_519_760


def test_importer_names_what_does_not_fit(discriminator_fixture):
  _, _, fixture = discriminator_fixture
  weights = {k.removeprefix('weight/'): v for k, v in fixture.items() if k.startswith('weight/')}
  name = 'discriminators.0.convs.1.0.bias'
  for broken in ({k: v for k, v in weights.items() if k != name}, weights | {name: weights[name][:3]},
                 weights | {'discriminators.9.bias': weights[name]}):
    with pytest.raises(LmsptError, match=r'discriminators\.(0\.convs\.1\.0|9)\.bias'):
      discriminator_params_from_torch(broken, SMALL)
