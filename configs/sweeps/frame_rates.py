"""25, 12.5 and 6.25 frames a second, two seeds each, at demo size on the bundled real speech.

    lmspt sweep --sweep=configs/sweeps/frame_rates.py --workdir=runs/frame_rates

Strides alone differ: blocks, widths and codebooks are the demo's, so the bitrate halves with the frame rate (1, 0.5,
0.25 kbit/s). Sixty steps show whether a figure moves; they are far too few for speech.
"""

from lmspt_jax.sweeps import Sweep, named, product, seeds

SHORT = {'train.num_steps': 60, 'train.eval_every': 20, 'train.checkpoint_every': 20}


def strides(*encoder: int) -> dict:
  """Samples a frame are their product. 16 kHz is the rate of the teacher too, so both decoders mirror the encoder."""
  return {'model.encoder_strides': encoder, 'model.decoder_rates': encoder[::-1],
          'model.resynthesis_rates': encoder[::-1]}


def get_sweep() -> Sweep:
  rates = named({'25hz': strides(4, 4, 5, 8), '12.5hz': strides(4, 5, 8, 8), '6.25hz': strides(4, 8, 8, 10)})
  return Sweep('configs/demo.py', product(rates, seeds(2)), overrides=SHORT)
