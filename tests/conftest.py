"""What every test shares. Set before jax is imported, and inherited by the subprocesses that tests start."""

import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiled programs stay in the checkout: a second run of the suite skips most of the compilation.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

# Tracing makes millions of small objects that live on; looking through them all costs a tenth of the suite's time.
gc.set_threshold(100_000, 20, 100)


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
  from _tiny_run import write_run

  return write_run(tmp_path_factory.mktemp('tiny_run'))


@pytest.fixture(scope='session')
def tiny_tokenizer(tiny_run):
  """The model of `tiny_run`, loaded once."""
  from lmspt_jax import Tokenizer

  return Tokenizer.from_pretrained(tiny_run)
