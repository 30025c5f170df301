"""Encode and decode at the release's widths, against PyTorch with the same weights. Run: python benchmarks/codec.py

Ten seconds of real speech, batch 1, float32, both codes checked to be equal before anything is timed.
"""

from __future__ import annotations

import argparse

from common import by_turns, report, speech

import _torch_tokenizer  # isort: skip
import jax
import numpy as np
import torch

from lmspt_jax.config import ModelConfig
from lmspt_jax.convert.release import tokenizer_from_release
from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=9.6, help='of audio, whole frames')
  args = parser.parse_args()
  config = ModelConfig()
  audio = speech(1, args.seconds, config.sample_rate)
  theirs = _torch_tokenizer.make(config)
  params = tokenizer_from_release(_torch_tokenizer.state_dict(theirs), config)[0]
  codebooks = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_tokenizer(config)[2])
  encode = jax.jit(lambda p, x: merge_tokenizer(config, p, codebooks).encode(x))
  decode = jax.jit(lambda p, c: merge_tokenizer(config, p, codebooks).decode(c))
  params = jax.device_put(params)

  codes = np.asarray(encode(params, audio))
  audio_torch, codes_torch = torch.from_numpy(audio), torch.from_numpy(codes).long()
  with torch.inference_mode():
    expected = theirs.encode(audio_torch).numpy()
  print(f'codes equal: {np.mean(codes == expected):.4%} of {codes.size}')

  def torch_encode():
    with torch.inference_mode():
      theirs.encode(audio_torch)

  def torch_decode():
    with torch.inference_mode():
      theirs.decode(codes_torch)

  report('encode', by_turns({'lmspt_jax': lambda: encode(params, audio).block_until_ready(), 'pytorch': torch_encode},
                            args.rounds), args.seconds, 'lmspt_jax', 'pytorch')
  report('decode', by_turns({'lmspt_jax': lambda: decode(params, codes).block_until_ready(), 'pytorch': torch_decode},
                            args.rounds), args.seconds, 'lmspt_jax', 'pytorch')


if __name__ == '__main__':
  main()
