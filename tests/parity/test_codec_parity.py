"""Live comparison with PyTorch: encoder, quantizers, decoders, and the gradient of the distillation loss."""

from __future__ import annotations

import json
from pathlib import Path

import _torch_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
import torch
import whisper as openai_whisper
from _torch_whisper import openai_model
from flax import nnx

import lmspt_jax
from lmspt_jax.config import ModelConfig
from lmspt_jax.convert.release import release_name, tokenizer_from_release
from lmspt_jax.convert.whisper import load_whisper
from lmspt_jax.models.codec import Decoder
from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer
from lmspt_jax.training.teacher import FrozenTeacher, ResynthesisDistillation

SAMPLE = Path(lmspt_jax.__file__).parent / 'assets' / 'speech_sample'


def speech(count: int, seconds: float, rate: int) -> np.ndarray:
  """Real recordings [count, seconds * rate], float32."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()]
  rows = [r for r in rows if r['seconds'] > seconds + 0.5][:count]
  audio = [soxr.resample(soundfile.read(SAMPLE / r['path'], dtype='float32')[0], 16_000, rate) for r in rows]
  return np.stack([a[rate // 4 : rate // 4 + round(seconds * rate)] for a in audio]).astype(np.float32)


def relative(ours, theirs) -> float:
  """Largest difference over largest value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope='module', params=['small', 'release'])
def pair(request):
  config = {'small': _torch_tokenizer.SMALL, 'release': ModelConfig()}[request.param]
  reference = _torch_tokenizer.make(config)
  params = tokenizer_from_release(_torch_tokenizer.state_dict(reference), config)[0]
  ours = merge_tokenizer(config, params, _zeros(abstract_tokenizer(config)[2]))
  audio = speech(2, 1.92, config.sample_rate)  # whole frames
  with torch.no_grad():
    theirs = {k: v.numpy() for k, v in reference(torch.from_numpy(audio)).items()}
  return ours, audio, theirs


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def test_encoder_latents(pair):
  ours, audio, theirs = pair
  latent = jax.jit(ours.semantic_encoder.__call__)(audio)
  assert relative(latent, theirs['latent'].swapaxes(1, 2)) <= 1e-4


def test_codes_are_equal(pair):
  ours, audio, theirs = pair
  codes = np.asarray(jax.jit(ours.encode)(audio))
  assert len(np.unique(theirs['codes'][:, 0])) > 5, 'the reference draws one code only: this shows nothing'
  np.testing.assert_array_equal(codes, theirs['codes'])


def test_decoders(pair):
  ours, audio, theirs = pair
  out = jax.jit(ours.__call__)(audio)
  for name in ('audio', 'resynthesis'):
    length = theirs[name].shape[1]
    assert 0 <= np.asarray(getattr(out, name)).shape[1] - length < 32, 'odd rates cost a few samples, no more'
    assert 1e-3 < np.abs(theirs[name]).max() < 0.99, 'nothing to compare: silent or saturated'
    assert relative(np.asarray(getattr(out, name))[:, :length], theirs[name]) <= 1e-4, name


def test_quantizer_losses(pair):
  ours, audio, theirs = pair
  out = jax.jit(ours.__call__)(audio)
  for part in ('semantic', 'acoustic'):
    for term in ('commitment', 'codebook'):
      assert relative(getattr(getattr(out, part), term), theirs[f'{part}_{term}']) <= 1e-4, (part, term)


def test_distillation_gradient_reaches_the_auxiliary_decoder():
  """d(distillation) / d(auxiliary decoder), through the real Whisper tiny.en and its log-mel."""
  config = _torch_tokenizer.SMALL
  reference = _torch_tokenizer.make(config)
  audio = speech(2, 1.92, 24_000)
  original = soxr.resample(audio.T, 24_000, 16_000).T.astype(np.float32)
  with torch.no_grad():
    z_sem = reference(torch.from_numpy(audio))['z_semantic']

  checkpoint = load_whisper('package:tiny.en', ('encoder', 'decoder'))
  encoder = openai_model(checkpoint).encoder
  resynthesis = reference.aux_decoder(z_sem)[:, 0]
  resynthesis = torch.nn.functional.pad(resynthesis, (0, original.shape[1] - resynthesis.shape[1]))
  features = []
  for wave in (torch.from_numpy(original), resynthesis):
    # one item at a time: openai-whisper floors a batch at its own maximum
    mel = torch.stack([openai_whisper.log_mel_spectrogram(row, 80, padding=480_000 - row.shape[0]) for row in wave])
    features.append(encoder(mel))
  valid = original.shape[1] // 320
  loss = torch.mean((features[1] - features[0].detach())[:, :valid] ** 2)
  loss.backward()

  ours = Decoder(config.latent_dim, config.resynthesis_channels, config.resynthesis_rates, config.dilations,
                 rngs=nnx.Rngs(0))
  params = tokenizer_from_release(_torch_tokenizer.state_dict(reference), config)[0]['resynthesis_decoder']
  graphdef = nnx.graphdef(ours)
  strategy = ResynthesisDistillation(FrozenTeacher(checkpoint.dims, 16_000, 'full'), 'mse', over_padding=False)

  def distance(params):
    wave = nnx.merge(graphdef, params)(jnp.asarray(z_sem.numpy().swapaxes(1, 2)))
    wave = jnp.pad(wave, ((0, 0), (0, original.shape[1] - wave.shape[1])))
    return strategy.loss(checkpoint.params['encoder'], original, jnp.full((2,), original.shape[1]), wave)

  value, gradient = jax.jit(jax.value_and_grad(distance))(params)
  assert relative(value, loss.item()) <= 1e-3
  theirs = tokenizer_from_release(
      _torch_tokenizer.state_dict(reference) | {f'aux_decoder.{k}': v.grad.numpy()
                                                for k, v in reference.aux_decoder.named_parameters()},
      config)[0]['resynthesis_decoder']
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(theirs), strict=True):
    assert relative(a, b) <= 1e-3, release_name('resynthesis_decoder/' + '/'.join(str(p.key) for p in path), config)
