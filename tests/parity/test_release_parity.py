"""Files that PyTorch writes are our models, and files that we write are PyTorch's: every variant, on bundled speech."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import _torch_release
import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from _torch_tokenizer import SMALL

import lmspt_jax
from lmspt_jax import Tokenizer
from lmspt_jax.convert.release_file import read_release, write_release

SAMPLE = Path(lmspt_jax.__file__).parent / 'assets' / 'speech_sample'
VARIANTS = {
    'release': {}, 'causal': {'causal': True}, 'shared encoder': {'shared_encoder': True},
    'no subtraction': {'subtract_semantic': False}, 'fsq': {'semantic': _torch_release.FSQ_LEVELS}}


@pytest.fixture(scope='module')
def speech() -> list[np.ndarray]:
  """All bundled recordings end to end, float32, in rows of one length, which is compiled once.

  16 kHz taken as 24, so that no resampler is involved.
  """
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()]
  audio = np.concatenate([soundfile.read(SAMPLE / row['path'], dtype='float32')[0] for row in rows])
  length = 50 * SMALL.hop
  return list(audio[: len(audio) // length * length].reshape(-1, length))


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_file_of_pytorch_and_back(variant, speech, tmp_path):
  config = dataclasses.replace(SMALL, **VARIANTS[variant])
  reference = _torch_release.make(config)
  theirs = tmp_path / 'theirs.safetensors'
  safetensors.torch.save_model(reference, str(theirs))
  told = variant not in ('no subtraction', 'fsq')  # of itself, by shapes
  ours = Tokenizer.from_pretrained(theirs, None if told else config)
  drop = lambda c: dataclasses.replace(c, acoustic=dataclasses.replace(c.acoustic, dropout=0.0))
  assert drop(ours.config.model) == drop(config)

  frames, semantic, worst = 0, set(), 0.0
  for audio in speech:
    with torch.no_grad():
      codes, full, resynthesis = (x[0].numpy() for x in reference(torch.from_numpy(audio)[None]))
    found = ours.encode(audio, sample_rate=ours.sample_rate)
    np.testing.assert_array_equal(found.ids, codes)
    for path, wanted in (('full', full), ('resynthesis', resynthesis)):
      got = ours.decode(found, path)
      assert 0 <= len(got) - len(wanted) < 32
      worst = max(worst, float(np.abs(got[: len(wanted)] - wanted).max()))
      assert 1e-3 < np.abs(wanted).max() < 0.999, 'nothing to compare: silent or saturated'
    frames += codes.shape[1]
    semantic |= set(codes[0].tolist())
  assert worst <= 1e-4 and frames > 2000 and len(semantic) > 20
  print(f'{variant}: {frames} frames, {len(semantic)} semantic codes, audio within {worst:.1e}')

  again = tmp_path / 'ours.safetensors'
  write_release(again, read_release(theirs, None if told else config))
  fresh = _torch_release.make(config, seed=1)
  safetensors.torch.load_model(fresh, str(again), strict=True)
  for (name, wanted), got in zip(reference.state_dict().items(), fresh.state_dict().values(), strict=True):
    assert torch.equal(wanted, got), name
  there, back = safetensors.torch.load_file(theirs), safetensors.torch.load_file(again)
  assert {n.replace('acoustic_encoder', 'semantic_encoder') for n in there} == {
      n.replace('acoustic_encoder', 'semantic_encoder') for n in back} if config.shared_encoder else (
          there.keys() == back.keys())
