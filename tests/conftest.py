"""What every test shares. Set before jax is imported, and inherited by the subprocesses that tests start."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiled programs stay in the checkout: a second run of the suite skips most of the compilation.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')


@pytest.fixture(scope='session')
def repo() -> Path:
  """The checkout."""
  return ROOT


@pytest.fixture(scope='session')
def speech_folder() -> Path:
  """The bundled real speech."""
  return ROOT / 'lmspt_jax' / 'assets' / 'speech_sample'


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory) -> Path:
  """A run's workdir with one checkpoint of a tiny untrained tokenizer: 24 kHz, hop 480, codebooks 32, 16, 16, 16."""
  from _random_weights import random_weights

  from lmspt_jax.checkpoint import CheckpointStore
  from lmspt_jax.config import ExperimentConfig, ModelConfig, QuantizerConfig, to_dict
  from lmspt_jax.models.tokenizer import abstract_tokenizer

  config = ExperimentConfig(name='tiny', model=ModelConfig(
      encoder_channels=4, encoder_strides=(4, 4, 5, 6), latent_dim=16, decoder_channels=32, decoder_rates=(6, 5, 4, 4),
      resynthesis_channels=16, resynthesis_rates=(8, 8, 5), dilations=(1,),
      semantic=QuantizerConfig(codebook_size=32),
      acoustic=QuantizerConfig(num_codebooks=3, codebook_size=16))).check()
  params, codebooks = random_weights(abstract_tokenizer(config.model)[1:])
  workdir = tmp_path_factory.mktemp('tiny_run')
  store = CheckpointStore(workdir)
  store.save(3, {'average': {'params': params, 'codebooks': codebooks}},
             {'config': to_dict(config), 'teacher_id': 'teacher-id'})
  store.close()
  return workdir


@pytest.fixture(scope='session')
def tiny_tokenizer(tiny_run):
  """The model of `tiny_run`, loaded once."""
  from lmspt_jax import Tokenizer

  return Tokenizer.from_pretrained(tiny_run)
