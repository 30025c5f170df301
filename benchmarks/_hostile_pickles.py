"""Streams of pickle opcodes that would run something, allocate far too much, or confuse what interprets them.

Whatever is run would make a file CANARY in the working directory, or show in an audit hook.
"""

from __future__ import annotations

import pickletools
import random
import struct

CANARY = 'CANARY'
_SHELL = f'touch {CANARY}'.encode()
_HUGE = struct.pack('<Q', 1 << 40)


def _text(value: bytes) -> bytes:
  return b'X' + struct.pack('<I', len(value)) + value


def _call(module: bytes, name: bytes, argument: bytes) -> tuple[bytes, ...]:
  """Every way to name a function and to call it."""
  named = (b'c' + module + b'\n' + name + b'\n', _text(module) + _text(name) + b'\x93')
  return (*(n + argument + b'\x85R' for n in named), *(n + b'(' + argument + b'tR' for n in named),
          *(n + argument + b'\x85\x81' for n in named), *(n + argument + b'\x85}\x92' for n in named),
          b'(' + argument + b'i' + module + b'\n' + name + b'\n', b'(' + named[0] + argument + b'o',
          *(n + b')R' + argument + b'b' for n in named))


CALLS = (
    *_call(b'os', b'system', _text(_SHELL)), *_call(b'posix', b'system', _text(_SHELL)),
    *_call(b'subprocess', b'getoutput', _text(_SHELL)), *_call(b'builtins', b'eval', _text(b"open('CANARY','w')")),
    *_call(b'builtins', b'exec', _text(b"open('CANARY','w')")), *_call(b'__builtin__', b'eval', _text(b'1')),
    *_call(b'importlib', b'import_module', _text(b'this')), *_call(b'torch', b'load', _text(b'x')),
    *_call(b'torch.storage', b'_load_from_bytes', _text(b'x')), *_call(b'builtins', b'bytearray', b'J\xff\xff\xff\x7f'),
    *_call(b'collections', b'OrderedDict.fromkeys', _text(b'x')), *_call(b'torch._utils', b'_rebuild_tensor', b'K\1'),
    *_call(b'torch', b'FloatStorage.__class__', _text(b'x')), *_call(b'numpy.core.multiarray', b'_reconstruct', b'N'),
    *_call(b'collections', b'OrderedDict', b']'), *_call(b'torch', b'FloatStorage', b'K\1'),
    *_call(b'torch._utils', b'_rebuild_tensor_v2', b'N'))
_STORAGE = b'(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ'
_REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n('


def _tensor(shape: bytes, strides: bytes, offset: bytes = b'K\0', storage: bytes = _STORAGE) -> bytes:
  return _REBUILD + storage + offset + shape + strides + b'\x89ccollections\nOrderedDict\n)RtR'


_BIG = b'\x8a\x09' + b'\xff' * 8 + b'\0'  # 2^64 - 1
_GIANT = b'\x8b' + struct.pack('<I', 5000) + b'\xff' * 4999 + b'\x01'
TENSORS = (
    _tensor(b'(' + b'K\1' * 100 + b't', b'(' + b'K\1' * 100 + b't'), _tensor(_BIG + b'\x85', b'K\1\x85'),
    _tensor(_GIANT + b'\x85', b'K\1\x85'), _tensor(b'K\0' + _BIG + b'\x86', b'K\1K\1\x86'),
    _tensor(b'K\4\x85', _BIG + b'\x85'),
    _tensor(b'K\4\x85', b'K\1\x85', _BIG), _tensor(b'K\4\x85', b'K\1\x85', _GIANT), _tensor(b'K\4\x85', b')'),
    _tensor(b'N', b'N'), _tensor(b'K\4\x85', b'J\xff\xff\xff\xff\x85'), _tensor(b'\x88\x85', b'K\1\x85'),
    _tensor(b'(' + b'J\xff\xff\xff\x7f' * 60 + b't', b'(' + b'K\0' * 60 + b't'),
    _tensor(b'K\4\x85', b'K\1\x85', storage=_STORAGE.replace(b'X\x01\0\0\x000', _text(b'../../../etc/passwd'))),
    _tensor(b'K\4\x85', b'K\1\x85', storage=_STORAGE.replace(b'X\x01\0\0\x000', _text(b'a\nb'))),
    _tensor(b'K\4\x85', b'K\1\x85', storage=_STORAGE.replace(b'K\x10t', _BIG + b't')),
    _tensor(b'K\4\x85', b'K\1\x85', storage=_STORAGE.replace(b'K\x10t', _GIANT + b't')),
    _tensor(b'K\4\x85', b'K\1\x85', storage=b'K\1Q'), _tensor(b'K\4\x85', b'K\1\x85', storage=b'Pabc\n'))
GREEDY = (
    b'\x8e' + _HUGE, b'\x8d' + _HUGE, b'\x96' + _HUGE, b'\x95' + _HUGE, b'B\xff\xff\xff\x7f', b'B\xff\xff\xff\xff',
    b'X\xff\xff\xff\xff', b'T\xff\xff\xff\x7f', b'T\xff\xff\xff\xff', b'\x8b\xff\xff\xff\x7f', b'\x8b\xff\xff\xff\xff',
    b'Nr\xff\xff\xff\x7f', b'Nr\0\0\0\x10', b'Nr\xff\xff\xff\xff', b'Np99999999999999\n', b'j\xff\xff\xff\xff',
    b'g-1\n', b'I' + b'9' * 9000 + b'\n', b'L' + b'9' * 9000 + b'L\n', _GIANT, b'}' * 100_000, b'(' * 100_000,
    b'(' * 3000 + b't' * 3000, b']' * 30_000 + b'a' * 29_999, b'2' * 1000, b'\x95' + struct.pack('<Q', 0), b']q\0h\0a',
    b'}q\0h\0h\0s', b']h\0a', b'0' * 10, b'1' * 10, b'\x94' * 50, b'F1e999\n', b'Fnan\n', b'G' + b'\x7f\xf0' * 4)
MISCHIEF = (b'Pabc\n', b'Q', b'NQ', b'\x82\1', b'\x83\1\0', b'\x84\1\0\0\0', b'\x84\xff\xff\xff\xff', b'\x98', b'\x97',
            b'b', b'}}b', b'N}b', b'R', b')R', b'N)R', b'\x80\xff', b'\x80\2', b'.', b'e', b'u', b't', b'd', b'l',
            b'S"\\x"\n', b"S'a\n",
            b'V\\ud800\n', b'V\\u\n', b'X\2\0\0\0\xff\xff', b'\x8c\1\xff', b'I01\n', b'I1_0\n', b'c\n\n',
            b'cos\n',
            b'NN\x93', b'\x90', b'\x91', b'\x8f', b'(\x91', b'K\1K\1s', b']]s', b'}]K\1s', b'N]\x92', b'\x88I00\nL1L\n')
PAYLOADS = (*CALLS, *TENSORS, *GREEDY, *MISCHIEF)


def change(data: bytes, rng: random.Random, _: bytes) -> bytes:
  """A stream with a payload in it or in its place, or with opcodes left out, doubled or exchanged."""
  choice = rng.random()
  if choice < 0.15:
    return b'\x80\2' + rng.choice(PAYLOADS) + b'.'
  if choice < 0.3:  # as one of the values that are looked for
    return b'\x80\2}' + _text(rng.choice((b'dims', b'model_state_dict'))) + rng.choice(PAYLOADS) + b's.'
  starts = [position for _, _, position in pickletools.genops(data)]
  at = rng.choice(starts[1:])
  if choice < 0.5:
    return data[:at] + rng.choice(PAYLOADS) + data[at:]
  if choice < 0.6:
    return data[:at] + rng.choice(PAYLOADS) + b'0' + data[at:]  # and taken from the stack again
  first, second = sorted(rng.sample(range(1, len(starts)), 2))
  span = data[starts[first]:starts[min(second, first + rng.choice((1, 1, 2, 8)))]]
  if choice < 0.75:
    return data[:starts[first]] + data[starts[first] + len(span):]
  if choice < 0.9:
    return data[:starts[second]] + span + data[starts[second]:]
  number = bytearray(data)  # an argument
  at = starts[first] + 1
  number[at:at + 4] = rng.choice((b'\xff\xff\xff\x7f', b'\xff' * 4, bytes(4), b'\0\0\0\x10'))
  return bytes(number)
