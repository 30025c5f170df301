"""PyTorch references for the parity tests: descript-audio-codec and descript-audiotools, on CPU.

audiotools imports torchaudio at its top and needs none of it here, so empty modules stand in for it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types


@functools.cache
def load_audiotools() -> types.ModuleType:
  """The module `audiotools`."""
  if 'torchaudio' not in sys.modules:
    for name in ('torchaudio', 'torchaudio.functional', 'torchaudio.transforms', 'torchaudio.backend'):
      sys.modules[name] = types.ModuleType(name)
      parent, _, child = name.rpartition('.')
      if parent:
        setattr(sys.modules[parent], child, sys.modules[name])
  return importlib.import_module('audiotools')


@functools.cache
def load_dac() -> types.SimpleNamespace:
  """The reference's modules: .model (dac.model.dac), .quantize, .discriminator, .loss and .layers."""
  load_audiotools()
  names = {'model': 'dac.model.dac', 'quantize': 'dac.nn.quantize', 'discriminator': 'dac.model.discriminator',
           'loss': 'dac.nn.loss', 'layers': 'dac.nn.layers'}
  return types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
