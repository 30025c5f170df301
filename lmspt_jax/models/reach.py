"""How far a frame of the codec sees: its receptive field, from the config.

Layer by layer from the output back to the input, an interval of steps becomes the interval that it is computed from.
Reference for the layers' padding: `models/layers.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lmspt_jax.config import ModelConfig
from lmspt_jax.models.steady import SLICED


class Reach(NamedTuple):
  """Frame t depends on frames t - left to t + right, and on no others."""

  left: int
  right: int


def encoder_reach(config: ModelConfig) -> Reach:
  """Of codes in frames of samples."""
  first, last = encoder_samples(config)
  return Reach(-(first // config.hop), last // config.hop)


def encoder_samples(config: ModelConfig) -> tuple[int, int]:
  """First and last sample that the codes of frame 0 depend on; the frame itself is samples 0 to hop - 1."""
  first, last = _same(0, 0, 3, 1, config.causal)
  for stride in reversed(config.encoder_strides):
    before = stride if config.causal else -(-stride // 2)  # steps of padding, of 2 * stride taps
    first, last = first * stride - before, last * stride - before + 2 * stride - 1
    first, last = _units(first, last, config)
  return _same(first, last, 7, 1, config.causal)


def decoder_reach(config: ModelConfig) -> Reach:
  """Of the main decoder's samples, a hop of them a frame, in frames of codes."""
  return _decoder(config, config.decoder_rates)


def resynthesis_reach(config: ModelConfig) -> Reach:
  """Of the auxiliary decoder's samples."""
  return _decoder(config, config.resynthesis_rates)


def _decoder(config: ModelConfig, rates: tuple[int, ...]) -> Reach:
  first, last = _same(0, math.prod(rates) - 1, 7, 1, config.causal)
  for rate in reversed(rates):
    first, last = _units(first, last, config)
    trimmed = 0 if config.causal else -(-rate // 2)
    # 2 * rate taps: an untrimmed step comes of the input step in whose place it is and of the one before.
    first, last = (first + trimmed) // rate - 1, (last + trimmed) // rate
  first, last = _same(first, last, 7, 1, config.causal)
  return Reach(-first, last)


def encoder_gap(config: ModelConfig) -> int:
  """Frames between two recordings in one array, as `models.inside` has it.

  A layer that sees farther is evaluated tap by tap, in the form in which wide layers are evaluated anyway; of the
  others, whose form that would change, none sees farther.
  """
  found, steps, channels = [1], config.hop, config.encoder_channels
  for stride in config.encoder_strides:
    found.append(_gap(channels, 7, max(config.dilations), steps, config))
    channels, steps = 2 * channels, steps // stride
  return max(*found, _gap(channels, 3, 1, steps, config))


def decoder_gap(config: ModelConfig) -> int:
  """The same of codes that the main decoder makes speech of."""
  return _decoder_gap(config, config.decoder_channels, config.decoder_rates)


def resynthesis_gap(config: ModelConfig) -> int:
  """The same of the auxiliary decoder."""
  return _decoder_gap(config, config.resynthesis_channels, config.resynthesis_rates)


# By method of the model: what its programs are made by.
REACH_AND_GAP = {'encode': (encoder_reach, encoder_gap), 'decode': (decoder_reach, decoder_gap),
                 'resynthesize': (resynthesis_reach, resynthesis_gap)}


def _decoder_gap(config: ModelConfig, channels: int, rates: tuple[int, ...]) -> int:
  found, steps = [1, _gap(config.latent_dim, 7, 1, 1, config)], 1
  for rate in rates:
    channels, steps = channels // 2, steps * rate
    found.append(_gap(channels, 7, max(config.dilations), steps, config))
  return max(found)


def _gap(channels: int, taps: int, dilation: int, steps: int, config: ModelConfig) -> int:
  """Frames of so many steps that a layer sees to one side; 0 of a wide one."""
  width = (taps - 1) * dilation
  return -(-(width if config.causal else width // 2) // steps) if channels <= SLICED else 0


def _units(first: int, last: int, config: ModelConfig) -> tuple[int, int]:
  for dilation in config.dilations:
    first, last = _same(first, last, 7, dilation, config.causal)
  return first, last


def _same(first: int, last: int, taps: int, dilation: int, causal: bool) -> tuple[int, int]:
  """Through a convolution that keeps the number of steps."""
  width = (taps - 1) * dilation
  return (first - width, last) if causal else (first - width // 2, last + width // 2)
