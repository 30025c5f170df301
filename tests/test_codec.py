"""The codec: the PyTorch reference's numbers on real speech, then lengths, causality, formulations and key layout."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _codec_fixture import FRAMES, KEPT, SMALL, load_fixture, summary
from _random_weights import random_weights
from flax import nnx

from lmspt_jax.config import from_config_dict
from lmspt_jax.convert.release import release_name, tokenizer_from_release
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.codec import Decoder, Encoder
from lmspt_jax.models.layers import (
  Conv1d,
  Snake,
  Upsample1d,
  _upsample_by_dilation,
  _upsample_by_products,
  fit_length,
  transposed_convolution,
)
from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer

CONFIGS = sorted((Path(__file__).resolve().parent.parent / 'configs').glob('*.py'))


def relative(ours, theirs) -> float:
  """Largest difference over largest value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def names_of(params) -> list[str]:
  """'decoder/conv_in/bias' of every leaf, in the tree's order."""
  return [jax.tree_util.keystr(path, simple=True, separator='/')
          for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def to_torch_layout(name, value):
  """A parameter as PyTorch holds it: [O, I, K], transposed convolutions [I, O, K], gains and snakes with axes of 1."""
  kind = name.rpartition('/')[2]
  if kind == 'weight_v':
    return np.einsum('kio->iok' if '/upsample/' in name else 'kio->oik', value)
  return value.reshape({'weight_g': (-1, 1, 1), 'alpha': (1, -1, 1)}.get(kind, value.shape))


@pytest.fixture(scope='module')
def fixture():
  """(speech, the reference's weights, its outputs)."""
  return load_fixture()


@pytest.fixture(scope='module')
def model(fixture):
  """Our tokenizer with the reference's weights."""
  return merge_tokenizer(SMALL, tokenizer_from_release(fixture[1], SMALL)[0], codebook_states(SMALL))


def codebook_states(config):
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_tokenizer(config)[2])


# ---------------------------------------------------------------- the reference's numbers


@pytest.fixture(scope='module')
def forward(fixture):
  """(what the training forward returns, gradient of the fixture's loss by parameter), one compilation for both."""
  audio, weights, _ = fixture

  def loss(params):
    # Attached, as in the release and in the reference.
    out = merge_tokenizer(SMALL, params, codebook_states(SMALL))(audio, attached_subtraction=True)
    quantizers = sum(part.commitment + part.codebook for part in (out.semantic, out.acoustic))
    return jnp.mean(out.audio**2) + jnp.mean(out.resynthesis**2) + quantizers, out

  (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tokenizer_from_release(weights, SMALL)[0])
  return out, gradient


def test_encoder_equals_the_reference(model, fixture):
  audio, _, theirs = fixture
  latent = jax.jit(lambda x: model.semantic_encoder(x))(audio)
  assert relative(latent, theirs['latent'].swapaxes(1, 2)) <= 1e-4


def test_codes_equal_the_reference(model, fixture):
  audio, _, theirs = fixture
  assert all(len(np.unique(row)) >= 10 for row in theirs['codes'].swapaxes(0, 1)), 'few codes in use: shows nothing'
  codes = jax.jit(lambda x: model.encode(x))(audio)
  assert codes.dtype == jnp.int32 and codes.shape == (3, SMALL.num_codebooks, FRAMES)
  np.testing.assert_array_equal(codes, theirs['codes'])


def test_quantizers_equal_the_reference(forward, fixture):
  (out, _), (_, _, theirs) = forward, fixture
  for part in ('semantic', 'acoustic'):
    assert relative(getattr(out, part).quantized, theirs[f'z_{part}'].swapaxes(1, 2)) <= 1e-4, part
  codes = jnp.concatenate([out.semantic.codes, out.acoustic.codes], -1)
  np.testing.assert_array_equal(codes.swapaxes(1, 2), theirs['codes'])
  losses = [loss for part in (out.semantic, out.acoustic) for loss in (part.commitment, part.codebook)]
  np.testing.assert_allclose(losses, theirs['losses'], rtol=1e-4)


def assert_waves_equal(ours, theirs, name):
  length = int(theirs[f'{name}_length'])
  assert 0 <= ours.shape[1] - length < 32, 'odd rates cost the reference a few samples, no more'
  assert not ours[:, length:].any(), 'what it lacks is zeros here'
  assert 0.05 < np.abs(theirs[name]).max() < 0.99, 'nothing to compare: silent or saturated'
  assert relative(ours[:, :length:KEPT], theirs[name]) <= 1e-4, name


def test_decoders_equal_the_reference(forward, fixture):
  (out, _), (_, _, theirs) = forward, fixture
  assert_waves_equal(out.audio, theirs, 'audio')
  assert_waves_equal(out.resynthesis, theirs, 'resynthesis')


def test_every_path_from_codes_equals_the_reference(model, fixture):
  _, _, theirs = fixture
  codes = jnp.asarray(theirs['codes'], jnp.int32)
  for name, method in (('audio', model.decode), ('semantic', model.decode_semantic),
                       ('resynthesis', model.resynthesize)):
    assert_waves_equal(jax.jit(lambda c, method=method: method(c))(codes), theirs, name)


def test_every_parameters_gradient_equals_the_reference(forward, fixture):
  (_, gradient), (_, _, theirs) = forward, fixture
  expected = dict(zip(theirs['names'].tolist(), theirs['gradients'], strict=True))
  for name, value in zip(names_of(gradient), jax.tree.leaves(gradient), strict=True):
    size, ramp = expected[release_name(name, SMALL)]
    ours = summary(to_torch_layout(name, np.asarray(value)))
    assert abs(ours[0] - size) <= 1e-3 * size and abs(ours[1] - ramp) <= 1e-3 * size, name


def test_items_do_not_depend_on_their_batch_mates(model, fixture):
  audio, _, theirs = fixture
  for i in range(len(audio)):
    np.testing.assert_array_equal(jax.jit(lambda x: model.encode(x))(audio[i : i + 1])[0], theirs['codes'][i])
  codes = jnp.asarray(theirs['codes'], jnp.int32)
  decode = jax.jit(lambda c: model.decode(c))
  np.testing.assert_allclose(decode(codes)[1:2], decode(codes[1:2]), atol=1e-6)


# ---------------------------------------------------------------- layers


def test_snake_is_its_formula():
  x_BTC = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32) * 3
  snake = Snake(3)
  assert snake.alpha[...].tolist() == [1, 1, 1]
  snake.alpha[...] = jnp.array([0.5, 1.0, 2.0])
  alpha = np.array([0.5, 1.0, 2.0])
  np.testing.assert_allclose(snake(x_BTC), x_BTC + np.sin(alpha * x_BTC) ** 2 / alpha, atol=1e-5)
  snake.alpha[...] = jnp.zeros(3)  # what training may reach
  np.testing.assert_array_equal(snake(x_BTC), x_BTC)


def convolve(x_BTC, kernel_KIO, stride, dilation, left, right):
  """float64, tap by tap."""
  x = np.pad(np.asarray(x_BTC, np.float64), ((0, 0), (left, right), (0, 0)))
  steps = (x.shape[1] - (len(kernel_KIO) - 1) * dilation - 1) // stride + 1
  return sum(x[:, k * dilation : k * dilation + (steps - 1) * stride + 1 : stride] @ tap
             for k, tap in enumerate(np.asarray(kernel_KIO, np.float64)))


def weight_normalised(layer, axes):
  """The kernel of a layer whose parameters are random, and its bias."""
  rng = np.random.default_rng(1)
  for parameter in (layer.weight_v, layer.weight_g, layer.bias):
    parameter[...] = jnp.asarray(rng.normal(size=parameter[...].shape), jnp.float32)
  v, g = (np.asarray(p[...], np.float64) for p in (layer.weight_v, layer.weight_g))
  return v / np.sqrt((v**2).sum(axes, keepdims=True)) * (g[:, None] if axes == (0, 2) else g), layer.bias[...]


@pytest.mark.parametrize('kernel_size, stride, dilation, steps', [
    (7, 1, 1, 20), (7, 1, 9, 20), (1, 1, 1, 20), (3, 1, 1, 20), (8, 4, 1, 20), (10, 5, 1, 20), (10, 5, 1, 21),
    (16, 8, 1, 23), (4, 2, 1, 21)])
def test_causal_convolution_is_its_definition(kernel_size, stride, dilation, steps):
  """All padding on the left, plus zeros on the right up to a whole stride: output t ends with stride t."""
  layer = Conv1d(3, 4, kernel_size, stride=stride, dilation=dilation, padding=99, causal=True, rngs=nnx.Rngs(0))
  kernel_KIO, bias = weight_normalised(layer, (0, 1))
  x_BTC = np.random.default_rng(2).normal(size=(2, steps, 3)).astype(np.float32)
  right = -steps % stride
  expected = convolve(x_BTC, kernel_KIO, stride, dilation, (kernel_size - 1) * dilation + 1 - stride, right) + bias
  assert expected.shape[1] == -(-steps // stride)
  np.testing.assert_allclose(layer(x_BTC), expected, atol=1e-5)


def transposed(x_BTC, kernel_KIO, rate):
  """float64: every input adds its kernel to the output, `rate` steps further on than its predecessor."""
  y = np.zeros((x_BTC.shape[0], (x_BTC.shape[1] - 1) * rate + len(kernel_KIO), kernel_KIO.shape[2]))
  for t in range(x_BTC.shape[1]):
    y[:, t * rate : t * rate + len(kernel_KIO)] += np.einsum('bi,kio->bko', x_BTC[:, t], kernel_KIO)
  return y


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('rate', [2, 3, 4, 5, 8])
def test_upsampling_is_a_transposed_convolution(rate, causal):
  layer = Upsample1d(4, 3, rate, causal=causal, rngs=nnx.Rngs(0))
  kernel_KIO, bias = weight_normalised(layer, (0, 2))
  x_BTC = np.random.default_rng(2).normal(size=(2, 6, 4)).astype(np.float32)
  y = transposed(x_BTC, kernel_KIO, rate)
  half = -(-rate // 2)
  y = y[:, : 6 * rate] if causal else y[:, half : y.shape[1] - half]
  assert y.shape[1] == 6 * rate - (not causal and rate % 2)
  np.testing.assert_allclose(layer(x_BTC), y + bias, atol=1e-5)


@pytest.mark.parametrize('rate', [2, 3, 5, 8])
def test_both_formulations_of_upsampling_are_one_function(rate):
  keys = jax.random.split(jax.random.key(0), 3)
  x_BTC, kernel_KIO = jax.random.normal(keys[0], (2, 6, 4)), jax.random.normal(keys[1], (2 * rate, 4, 3))
  expected = transposed(np.asarray(x_BTC), np.asarray(kernel_KIO), rate)
  cotangent = jax.random.normal(keys[2], expected.shape)

  @functools.partial(jax.jit, static_argnums=0)
  def run(upsample, x_BTC, kernel_KIO):
    y, pull = jax.vjp(lambda x, k: upsample(x, k, rate), x_BTC, kernel_KIO)
    return y, pull(cotangent)

  gradients = []
  for upsample in (_upsample_by_products, _upsample_by_dilation):
    y, gradient = run(upsample, x_BTC, kernel_KIO)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gradients.append(gradient)
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_formulation_of_upsampling_follows_the_platform():
  def lowered(platform):
    shapes = jax.ShapeDtypeStruct((1, 4, 2), jnp.float32), jax.ShapeDtypeStruct((6, 2, 2), jnp.float32)
    upsample = jax.jit(lambda x, k: transposed_convolution(x, k, 3))
    return upsample.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
  assert 'stablehlo.convolution' not in lowered('cpu') and 'stablehlo.dot_general' in lowered('cpu')
  assert 'lhs_dilate = [3]' in lowered('tpu')


# ---------------------------------------------------------------- causality and lengths

HOP, TOTAL, FIRST = 20, 30, 20  # samples a frame, frames, the first frame that differs


def random_module(make):
  """The module that `make` returns, with weights."""
  graphdef, params = nnx.split(nnx.eval_shape(make))
  return nnx.merge(graphdef, random_weights(nnx.to_pure_dict(params)))


@pytest.mark.parametrize('causal', [True, False])
def test_causal_encoder_sees_no_sample_after_its_frame(causal):
  encoder = random_module(lambda: Encoder(4, (4, 5), 8, (1, 3), causal=causal, rngs=nnx.Rngs(0)))
  audio = np.random.default_rng(1).normal(size=(1, TOTAL * HOP)).astype(np.float32)
  other = audio.copy()
  other[:, FIRST * HOP :] *= -1
  encode = jax.jit(lambda x: encoder(x))
  change_T = jnp.abs(encode(audio) - encode(other)).max((0, 2))
  assert change_T.shape == (TOTAL,)
  assert change_T[FIRST] > 1e-3
  if causal:
    assert change_T[:FIRST].max() == 0
  else:
    assert change_T[FIRST - 1] > 1e-3, 'the ordinary encoder looks ahead: else this test shows nothing'


@pytest.mark.parametrize('causal', [True, False])
def test_causal_decoder_hears_no_later_frame(causal):
  decoder = random_module(lambda: Decoder(8, 16, (5, 4), (1, 3), causal=causal, rngs=nnx.Rngs(0)))
  z_BTC = np.random.default_rng(1).normal(size=(1, TOTAL, 8)).astype(np.float32)
  other = z_BTC.copy()
  other[:, FIRST:] *= -1
  decode = jax.jit(lambda z: decoder(z))
  change_N = jnp.abs(decode(z_BTC) - decode(other))[0]
  assert change_N[FIRST * HOP : (FIRST + 1) * HOP].max() > 1e-3
  if causal:
    assert change_N.shape == (TOTAL * HOP,)
    assert change_N[: FIRST * HOP].max() == 0
  else:
    assert change_N[: FIRST * HOP].max() > 1e-3, 'the ordinary decoder looks ahead: else this test shows nothing'


@functools.cache
def preset(path):
  """(its model's config, and that model without arrays)."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = from_config_dict(module.get_config()).model
  return config, *abstract_tokenizer(config)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_lengths_of_every_preset(path):
  config, graphdef, params, codebooks = preset(path)
  frames = 7

  def run(params, codebooks, audio):
    model = nnx.merge(graphdef, params, codebooks)
    out = model(audio)
    z_BTC = out.semantic.quantized
    return (z_BTC, out.semantic.codes, out.acoustic.codes, out.audio, out.resynthesis, model.decoder(z_BTC),
            model.resynthesis_decoder(z_BTC))

  audio = jax.ShapeDtypeStruct((2, frames * config.hop), jnp.float32)
  shapes = [x.shape for x in jax.eval_shape(run, params, codebooks, audio)]
  assert shapes[:3] == [(2, frames, config.latent_dim), (2, frames, 1), (2, frames, config.acoustic.num_codebooks)]
  fitted = audio.shape[1], audio.shape[1] * config.resynthesis_sample_rate // config.sample_rate
  assert shapes[3:5] == [(2, samples) for samples in fitted]
  for shape, wanted, rates in zip(shapes[5:], fitted, (config.decoder_rates, config.resynthesis_rates), strict=True):
    length = frames
    for rate in rates:  # PyTorch's (T - 1) rate - 2 ceil(rate / 2) + 2 rate: an odd rate is one short
      length = length * rate - (0 if config.causal else rate % 2)
    assert shape == (2, length) and 0 <= wanted - length < 32


def test_audio_that_is_no_whole_frames_is_refused(model):
  for shape in ((1, SMALL.hop + 1), (SMALL.hop,)):
    with pytest.raises(ValueError, match='multiple of the hop, 240'):
      model.encode(jnp.zeros(shape))


def test_fit_length_cuts_and_pads_the_end():
  x_BN = jnp.arange(1.0, 5)[None]
  assert [fit_length(x_BN, n)[0].tolist() for n in (2, 4, 6)] == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 0, 0]]


# ---------------------------------------------------------------- key layout of the release


# Of the release's checkpoint; the fixture's names come from PyTorch's modules.
RELEASE_KEYS = {
    'semantic_encoder.block.0.weight_v': (32, 1, 7),
    'acoustic_encoder.block.5.block.2.block.0.alpha': (1, 512, 1),
    'acoustic_encoder.block.1.block.1.block.3.weight_v': (32, 32, 1),
    'semantic_encoder.block.2.block.4.weight_v': (128, 64, 10),
    'semantic_encoder.block.6.alpha': (1, 1024, 1),
    'semantic_encoder.block.7.weight_g': (1024, 1, 1),
    'quantizer.rvq_first.quantizers.0.codebook.weight': (16384, 8),
    'quantizer.rvq_rest.quantizers.6.in_proj.weight_v': (8, 1024, 1),
    'decoder.model.0.bias': (1536,),
    'decoder.model.3.block.1.weight_v': (384, 192, 12),
    'decoder.model.3.block.1.weight_g': (384, 1, 1),
    'decoder.model.3.block.1.bias': (192,),
    'decoder.model.5.block.4.block.1.weight_v': (48, 48, 7),
    'aux_decoder.model.4.block.0.alpha': (1, 16, 1),
    'aux_decoder.model.5.alpha': (1, 8, 1),
    'aux_decoder.model.6.weight_v': (1, 8, 7),
}


def test_release_has_its_keys_shapes_and_size():
  config, _, params, _ = preset(next(path for path in CONFIGS if path.stem == 'lmspt_12_5hz'))
  shapes = {release_name(name, config): to_torch_layout(name, np.broadcast_to(np.float32(0), leaf.shape)).shape
            for name, leaf in zip(names_of(params), jax.tree.leaves(params), strict=True)}
  assert {key: shapes.get(key) for key in RELEASE_KEYS} == RELEASE_KEYS
  assert round(sum(np.prod(shape) for shape in shapes.values()) / 1e6, 2) == 74.65


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_no_two_parameters_share_a_key(path):
  config, _, params, _ = preset(path)
  names = names_of(params)
  assert len({release_name(name, config) for name in names}) == len(names)


def test_weights_survive_the_way_there_and_back(fixture):
  _, weights, _ = fixture
  params = tokenizer_from_release(weights, SMALL)[0]
  back = {release_name(name, SMALL): to_torch_layout(name, value)
          for name, value in zip(names_of(params), jax.tree.leaves(params), strict=True)}
  assert back.keys() == weights.keys()
  for key, value in weights.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_importer_names_what_does_not_fit(fixture):
  _, weights, _ = fixture
  key = 'decoder.model.1.block.1.bias'
  usage = {'quantizer.semantic_vocab_usage': np.zeros((1, 64))}
  tokenizer_from_release(weights | usage, SMALL)  # passed over
  for broken, text in (({k: v for k, v in weights.items() if k != key}, f'missing: {key}$'),
                       (weights | {key: weights[key][:3]}, rf'misshaped: {key} \(3,\)$'),
                       (weights | {'decoder.model.9.bias': weights[key]}, 'unexpected: decoder.model.9.bias$'),
                       ({}, 'missing: .* and [0-9]{3} more$')):
    with pytest.raises(LmsptError, match=text):
      tokenizer_from_release(broken, SMALL)
