"""Losses: hand-computed values, what carries a gradient, and the mel loss of the PyTorch reference on real speech."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _discriminator_fixture import load_fixture

from lmspt_jax.losses.adversarial import discriminator_loss, feature_matching_loss, generator_adversarial_loss
from lmspt_jax.losses.distillation import feature_distance
from lmspt_jax.losses.mel import multi_scale_mel_loss

REAL = [[jnp.array([[1.0, 3.0]]), jnp.array([0.5, 1.0])], [jnp.array([2.0]), jnp.array([3.0])]]
FAKE = [[jnp.array([[0.0, 5.0]]), jnp.array([1.0, 2.0])], [jnp.array([5.0]), jnp.array([-1.0])]]


@pytest.fixture(scope='module')
def discriminator_fixture():
  return load_fixture()


def test_adversarial_losses_by_hand():
  assert discriminator_loss(REAL, FAKE) == (1 + 4) / 2 + 0.25 / 2 + 1 + 4
  assert generator_adversarial_loss(FAKE) == (0 + 1) / 2 + 4
  assert feature_matching_loss(REAL, FAKE) == (1 + 2) / 2 + 3  # the logits do not count


def test_feature_matching_has_no_gradient_into_the_real_branch():
  to_real, to_fake = jax.grad(feature_matching_loss, argnums=(0, 1))(REAL, FAKE)
  assert all(not leaf.any() for leaf in jax.tree.leaves(to_real))
  np.testing.assert_allclose(to_fake[0][0], [[-0.5, 0.5]])


def test_losses_want_the_same_discriminators_on_both_sides():
  with pytest.raises(ValueError):
    discriminator_loss(REAL, FAKE[:1])
  with pytest.raises(ValueError):
    feature_matching_loss(REAL, [FAKE[0][1:], FAKE[1]])


@pytest.mark.parametrize(('kind', 'plain', 'weighted'), [('mse', (5 + 1) / 2, 5.0), ('l1', (2 + 1) / 2, 2.0)])
def test_feature_distance_by_hand(kind, plain, weighted):
  a_BTD, b_BTD = jnp.array([[[1.0, 3.0], [1.0, 1.0]]]), jnp.array([[[0.0, 0.0], [2.0, 0.0]]])
  assert feature_distance(a_BTD, b_BTD, kind) == plain
  assert feature_distance(a_BTD, b_BTD, kind, jnp.array([[1.0, 0.0]])) == weighted
  assert feature_distance(a_BTD, b_BTD, kind, jnp.array([[2.0, 2.0]])) == plain
  assert feature_distance(a_BTD, b_BTD, kind, jnp.zeros((1, 2))) == 0


def test_feature_distance_refuses_another_kind():
  with pytest.raises(ValueError, match='cosine'):
    feature_distance(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), 'cosine')


def test_mel_loss_equals_the_reference(discriminator_fixture):
  real, fake, fixture = discriminator_fixture
  loss = jax.jit(lambda x, y: multi_scale_mel_loss(x, y, 16_000, (40, 80, 160, 320), (256, 512, 1024, 2048)))
  assert abs(loss(fake, real) - fixture['losses'][3]) <= 1e-4


def test_mel_loss_of_silence_has_a_finite_gradient(discriminator_fixture):
  real, _, _ = discriminator_fixture
  loss = jax.jit(lambda x, y: multi_scale_mel_loss(x, y, 16_000, (40,), (256,)))
  assert loss(real, real) <= 1e-6  # the two sides may be fused differently
  assert jnp.isfinite(jax.jit(jax.grad(loss))(jnp.zeros_like(real), real)).all()


def test_mel_loss_leaves_padding_out(discriminator_fixture):
  """An item padded beside a longer one, whatever the other side holds there, is worth what it is worth cut."""
  real, fake, _ = discriminator_fixture
  short = 1280  # of 2560: whole hops of both windows
  loss = jax.jit(lambda x, y, n: multi_scale_mel_loss(x, y, 16_000, (40, 80), (256, 512), n))
  noisy = jnp.asarray(fake).at[:, short:].set(0.3)
  cut, given = jnp.zeros_like(real).at[:, :short].set(real[:, :short]), jnp.full(len(real), short)
  np.testing.assert_allclose(loss(noisy, cut, given), loss(fake, real, given), rtol=1e-6)
  # Frames at the very end see reflected speech when cut and silence when padded: a few of many.
  alone = multi_scale_mel_loss(fake[:, :short], real[:, :short], 16_000, (40, 80), (256, 512))
  np.testing.assert_allclose(loss(noisy, cut, given), alone, rtol=0.03)
  np.testing.assert_allclose(loss(fake, real, jnp.full(len(real), real.shape[1])),
                             multi_scale_mel_loss(fake, real, 16_000, (40, 80), (256, 512)), rtol=1e-6)
