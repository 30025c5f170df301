"""Damage and malice for files: bytes of a valid file to those of one that a stranger might send. By a Random alone.

`mutate(data, kind, rng, other)` is the entry; `kind` says what the bytes are, so that what is changed lies behind the
checksums and lengths that would hide it. `other` is another valid file of the kind, to splice with.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import _hostile_pickles
from _damage import BOUNDARIES, FLIPS, damage, number

NAMES = ('../../escape', '/etc/passwd', '..\\escape', 'a\nb', 'a\x1b[31mb', 'a\0b', '', '.', '..', 'x' * 70_000,
         '\ud800', '\u202eb', '$(touch CANARY)', '{0.__class__}', '%s%n')
_TEXTS = (*NAMES, 'y' * (1 << 20), 'NaN', 'null', '1e999')
_RAW = ('NaN', '-Infinity', '1e999', '-0.0', '1' + '0' * 400, '1' * 5000, '-1', '1.5', '[' * 100_000, '{"a":' * 50_000,
        '[' * 500 + ']' * 500, 'true', 'null', '""', '[]', '{}', '{"a":1,"a":2}', *map(str, BOUNDARIES))

# What reading a file raises that was damaged before.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, RuntimeError, OverflowError, EOFError, OSError,
               MemoryError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
Mutator = Callable[[bytes, random.Random, bytes], bytes]


def mutate(data: bytes, kind: str, rng: random.Random, other: bytes) -> bytes:
  """Another content; `kind` is a key of KINDS."""
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    mutator = rng.choice(KINDS[kind]) if rng.random() < 0.75 else damage
    try:
      data = mutator(data, rng, other)
    except _UNREADABLE:
      data = damage(data, rng, other)  # damaged before, so that its structure is gone
  return data


# ---------------------------------------------------------------- JSON


class _Raw(str):
  """Text that stands in JSON as it is."""


class _Pairs(list):
  """A JSON object as pairs, of which two may have the same key."""


def _dump(node: Any) -> str:
  if isinstance(node, _Raw):
    return str(node)
  if isinstance(node, _Pairs):
    return '{' + ','.join(f'{_dump(key)}:{_dump(value)}' for key, value in node) + '}'
  if isinstance(node, list):
    return '[' + ','.join(map(_dump, node)) + ']'
  return json.dumps(node)


def _spots(node: Any) -> list[tuple[list, int, int]]:
  """(container, index, index within it) of every value; the last is 1 for an object's pair."""
  found, stack = [], [node]
  while stack:
    here = stack.pop()
    for index, item in enumerate(here):
      pair = isinstance(here, _Pairs)
      found.append((here, index, int(pair)))
      value = item[1] if pair else item
      if isinstance(value, list):
        stack.append(value)
  return found


def change_json(text: str, rng: random.Random) -> str:
  """A JSON text with one value, key or element changed; what stands in it as a text of JSON is looked into as well."""
  root = json.loads(text, object_pairs_hook=_Pairs)
  spots = _spots(root) if isinstance(root, list) else []
  if not spots:
    return rng.choice(_RAW)
  short = [spot for spot in spots if spot[0] is root]
  container, index, pair = rng.choice(short if rng.random() < 0.3 else spots)
  value = container[index][1] if pair else container[index]
  if isinstance(value, str) and value.startswith('{') and rng.random() < 0.9:
    changed = change_json(value, rng)
  else:
    changed = _changed(value, rng, spots)
  action = rng.random()
  if pair and action < 0.1:
    del container[index]
  elif pair and action < 0.2:
    container.append((container[index][0], changed))  # the same key twice
  elif pair and action < 0.35:
    container[index] = (rng.choice((*NAMES, container[index][0] + 'x')), value)
  elif not pair and action < 0.15:
    container[index:index + 1] = [value] * rng.choice((0, 2, 1000))
  else:
    container[index] = (container[index][0], changed) if pair else changed
  return _dump(root)


def _changed(value: Any, rng: random.Random, spots: list[tuple[list, int, int]]) -> Any:
  choice = rng.random()
  if choice < 0.4:
    return _Raw(rng.choice(_RAW))
  if choice < 0.55:
    return rng.choice(_TEXTS)
  if choice < 0.7:
    container, index, pair = rng.choice(spots)
    return container[index][1] if pair else container[index]
  if isinstance(value, bool | None):
    return not value
  if isinstance(value, int | float):
    return rng.choice((value + 1, value - 1, -value, value * 1000, value * 10**6, float(value), str(value), [value]))
  if isinstance(value, str):
    return rng.choice((value + 'x', value[1:], value.upper(), value * 1000, value + '\n', [value], {}, 7))
  return rng.choice(([], {}, [value], 3, None, 'x'))


def _json(data: bytes, rng: random.Random, _: bytes) -> bytes:
  return change_json(data.decode(), rng).encode('utf-8', 'surrogatepass')


def _jsonl(data: bytes, rng: random.Random, _: bytes) -> bytes:
  lines = data.decode().splitlines()
  number = rng.randrange(len(lines))
  lines[number] = rng.choice((change_json(lines[number], rng), lines[number - 1], lines[number] * 2, 'null', '[]'))
  return '\n'.join(lines).encode('utf-8', 'surrogatepass')


# ---------------------------------------------------------------- safetensors


def _safetensors(data: bytes, rng: random.Random, _: bytes) -> bytes:
  size = int.from_bytes(data[:8], 'little')
  text, body = data[8:8 + size].decode(), data[8 + size:]
  choice = rng.random()
  if choice < 0.1:
    return number(rng.choice((*BOUNDARIES, size + 1, size - 1, len(data), len(data) - 8)), 8) + data[8:]
  if choice < 0.2:
    body = rng.choice((body[:-4], body + bytes(4), body[:len(body) // 2], b'', body * 2))
  elif choice < 0.75:
    header = json.loads(text)
    name = rng.choice([key for key in header if key != '__metadata__'])
    entry, field = header[name], rng.choice(('dtype', 'shape', 'data_offsets', 'both', 'name'))
    if field == 'dtype':
      entry[field] = rng.choice(('F64', 'F16', 'BF16', 'I8', 'U64', 'BOOL', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0', 'F4',
                                 'C64', 'F6_E2M3', 'O', 'f32', '', 'I64', 'U16'))
    elif field in ('shape', 'data_offsets'):
      values = entry[field] or [0]
      values[rng.randrange(len(values))] = rng.choice(BOUNDARIES)
      entry[field] = rng.choice((values, values[::-1], [*values, 1], [*values, 0], values[:-1], [1] * 100, [0, 2**62],
                                 [2**32, 2**32]))
    elif field == 'both':  # another tensor's bytes
      entry['data_offsets'] = header[rng.choice([key for key in header if key != '__metadata__'])]['data_offsets']
    else:
      header[rng.choice((*NAMES, name + '.0'))] = header.pop(name)
    text = json.dumps(header)
  else:
    text = change_json(text, rng)
  raw = text.encode('utf-8', 'surrogatepass')
  return struct.pack('<Q', len(raw)) + raw + body


# ---------------------------------------------------------------- zip, with npy or a pickle inside


def _zip_write(members: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as file:
    for info, data in members:
      file.writestr(info, data)
  return out.getvalue()


def _zip(data: bytes, rng: random.Random, other: bytes) -> bytes:
  with zipfile.ZipFile(io.BytesIO(data)) as file:
    members = [(zipfile.ZipInfo(info.filename), file.read(info)) for info in file.infolist()]
  number_of = rng.randrange(len(members))
  pickles = [n for n, (info, _) in enumerate(members) if info.filename.endswith('.pkl')]
  if pickles and rng.random() < 0.6:
    number_of = pickles[0]
  info, content = members[number_of]
  choice = rng.random()
  if choice < 0.5:
    kind = 'npy' if info.filename.endswith('.npy') else 'pickle' if info.filename.endswith('.pkl') else 'bytes'
    content = mutate(content, kind, rng, other)
  elif choice < 0.6:
    info.filename = rng.choice(('../' + info.filename, '/' + info.filename, info.filename.upper(), 'archive/data/0',
                                'x' * 60_000, 'a\nb', 'ids.npy'))
  elif choice < 0.65:
    info.external_attr, content = 0o120777 << 16, b'/etc/passwd'  # a symlink
  elif choice < 0.72:
    members.append((zipfile.ZipInfo(info.filename), rng.choice((content, content[:-1], b''))))
  elif choice < 0.78:
    info.compress_type = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    content = rng.choice((content, bytes(1 << 24)))  # 16 MiB in some kilobytes
  elif choice < 0.82:
    del members[number_of]
    return _zip_write(members)
  members[number_of] = (info, content)
  written = bytearray(_zip_write(members))
  if choice >= 0.82:  # the directory lies: sizes, offsets, flags, methods
    _lie(written, rng)
  return bytes(written)


def _lie(data: bytearray, rng: random.Random) -> None:
  signature, fields = rng.choice((
      (b'PK\1\2', ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4))),
      (b'PK\3\4', ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
      (b'PK\5\6', ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))))
  places = [match.start() for match in re.finditer(re.escape(signature), data)]
  place, value = rng.choice(places), rng.choice((*BOUNDARIES, 20, 8, 12, 14, 99))
  chosen = rng.sample(fields, rng.choice((1, 1, 2)))
  if signature == b'PK\1\2' and rng.random() < 0.4:
    chosen = ((20, 4), (24, 4))  # both sizes alike
  for offset, width in chosen:
    data[place + offset:place + offset + width] = number(value, width)


def _npy(data: bytes, rng: random.Random, _: bytes) -> bytes:
  size = int.from_bytes(data[8:10], 'little')
  header, body = data[10:10 + size].decode('latin-1'), data[10 + size:]
  choice = rng.random()
  if choice < 0.35:
    header = re.sub(r"\(.*?\)", lambda _: rng.choice((
        '(1099511627776, 1099511627776)', '(268435456,)', '(2, 4294967296)', '(-1,)', '(0, 9223372036854775807)', '()',
        '(1.5, 2)', '(True, 4)', f'({"1, " * 100})', '(((((1,),),),),)', "('a',)", '(4611686018427387905, 4)')), header)
  elif choice < 0.65:
    header = re.sub(r"'[<|>][a-zA-Z]\d+'", lambda _: rng.choice((
        "'|O'", "'<U1000000000'", "'<U250000'", "'|V8'", "'<f8'", "'>u8'", "'|S5'", "'<M8[s]'", "'<i0'", "'<c16'",
        "[('a', '<i4')]", "'O,O'", "('<i4', (100000, 100000))", "'" + 'i4,' * 2000 + "'", '7', "'|b1'")), header)
  elif choice < 0.75:
    header = rng.choice(('-' * 9000 + '1', '(' * 9000, '[' * 200 + ']' * 200, '9' * 9000,
                         "__import__('os').system('x')", "{'a': " * 900, '{}', '"\\', "'''", '1_0', 'f"{x}"'))
  elif choice < 0.85:
    return data[:8] + number(rng.choice(BOUNDARIES), 2) + data[10:]
  elif choice < 0.92:
    return data[:6] + bytes((rng.choice((0, 1, 2, 3, 9)), rng.choice((0, 1)))) + data[8:]
  else:
    body = rng.choice((body[:-1], body + b'x', b'', body * 3, b'\xff' * len(body), b'\x80\x02}q\0.'))
  raw = header.encode('latin-1')
  return data[:8] + number(len(raw), 2) + raw + body


# ---------------------------------------------------------------- tar


def _tar(data: bytes, rng: random.Random, other: bytes) -> bytes:
  headers, position = [], 0
  while position + 512 <= len(data) and any(data[position:position + 512]):
    headers.append(position)
    position += 512 + -(-int(data[position + 124:position + 135].rstrip(b'\0 ') or b'0', 8) // 512) * 512
  place = rng.choice(headers)
  block, choice = bytearray(data[place:place + 512]), rng.random()
  size = int(block[124:135], 8)
  if choice < 0.3:
    value = rng.choice((*BOUNDARIES, size + 1, size - 1, size + 512, len(data)))
    block[124:136] = rng.choice((b'%011o\0' % (value % 8**11), b'\x80' + number(value, 11, 'big'),
                                 b'\xff' + number(value, 11, 'big'), b'-0000000001\0', b'           \0', b'9' * 12))
  elif choice < 0.5:
    block[156] = rng.choice(b'\x001234567gxLKSDNVAX')
  elif choice < 0.65:
    name = rng.choice(NAMES).encode('utf-8', 'surrogatepass')[:96] + rng.choice((b'.json', b'.flac', b'.txt', b''))
    block[:100] = name[:100].ljust(100, b'\0')
  elif choice < 0.85:
    return data[:place] + _pax(rng) + data[place:]
  else:
    inside = mutate(data[place + 512:place + 512 + size], 'json' if b'.json' in block[:100] else 'bytes', rng, other)
    block[124:136] = b'%011o\0' % len(inside)
    body = inside + bytes(-len(inside) % 512)
    return data[:place] + _summed(block, rng) + body + data[place + 512 + -(-size // 512) * 512:]
  return data[:place] + _summed(block, rng) + data[place + 512:]


def _summed(block: bytearray, rng: random.Random) -> bytes:
  """With its checksum, mostly."""
  if rng.random() < 0.9:
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


def _pax(rng: random.Random) -> bytes:
  name = rng.choice(NAMES).encode('utf-8', 'surrogatepass')
  record = b'path=' + name + b'.flac\n'
  body = rng.choice((
      b'%d %s' % (len(record) + 1 + len(str(len(record) + 4)), record), b'11 size=-1\n', b'0 size=1\n',
      b'-5 a=b\n-5 c=d\n',
      b'30 size=99999999999999999999\n', b'9 size=\n', b'22 GNU.sparse.major=1\n', b'9' * 40 + b' a=b\n', b' a=b\n',
      b'+8 a=b\n', b'1_0 a=bcd\n', b'8 a=b\n' * 3000, b'11 size=\xd9\xa3\n', rng.randbytes(100)))
  block = bytearray(512)
  block[:4], block[100:108], block[124:136] = b'name', b'0000644\0', b'%011o\0' % len(body)
  block[156:157], block[257:265] = rng.choice((b'x', b'x', b'g', b'L', b'K', b'X', b'S')), b'ustar\x0000'
  return _summed(block, rng) + body + bytes(-len(body) % 512)


# ---------------------------------------------------------------- CTranslate2


def _ctranslate2(data: bytes, rng: random.Random, _: bytes) -> bytes:
  """A field of the table: a length, a rank, a dimension, a type, a size, or a name."""
  fields, position = [(0, 4)], 4

  def text() -> None:
    nonlocal position
    fields.append((position, 2))
    position += 2 + int.from_bytes(data[position:position + 2], 'little')

  text()
  fields += [(position, 4), (position + 4, 4)]
  count = int.from_bytes(data[position + 4:position + 8], 'little')
  position += 8
  for _ in range(count):
    text()
    rank = data[position]
    fields += [(position, 1), *((position + 1 + 4 * axis, 4) for axis in range(rank)), (position + 1 + 4 * rank, 1),
               (position + 2 + 4 * rank, 4)]
    position += 6 + 4 * rank + int.from_bytes(data[position + 2 + 4 * rank:position + 6 + 4 * rank], 'little')
  fields.append((position, 4))
  place, width = rng.choice(fields)
  value = int.from_bytes(data[place:place + width], 'little')
  if width == 2 and rng.random() < 0.5:
    end = place + 2 + value
    name = rng.choice((*NAMES[:6], 'encoder/num_heads', 'encoder/layer_1000/x', 'decoder/layer_9/a'))
    raw = name.encode('utf-8', 'surrogatepass') + b'\0'
    return data[:place] + number(len(raw), 2) + raw + data[end:]
  value = rng.choice((*BOUNDARIES, value + 1, value - 1, value * 2))
  return data[:place] + number(value, width) + data[place + width:]


# ---------------------------------------------------------------- parquet: the footer; OCDBT: behind its checksum


def _parquet(data: bytes, rng: random.Random, other: bytes) -> bytes:
  size = int.from_bytes(data[-8:-4], 'little')
  footer = damage(data[-8 - size:-8], rng, other[-8 - size:-8])
  length = len(footer) if rng.random() < 0.9 else rng.choice(BOUNDARIES)
  return data[:-8 - size] + footer + number(length, 4) + data[-4:]


def _ocdbt(data: bytes, rng: random.Random, other: bytes) -> bytes:
  """Bytes of a manifest or a node, its length and checksum made right again."""
  if data[:4] != bytes.fromhex('0cdb3a2a') and data[:4] != bytes.fromhex('0cdb20de'):
    return damage(data, rng, other)
  content = rng.choice(FLIPS)(bytearray(data[12:-4]), rng, other)
  content = data[:4] + number(len(content) + 16, 8) + content
  return content + number(_crc32c(content), 4)


def _crc32c(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
  return crc ^ 0xFFFFFFFF


def _crc_row(value: int) -> int:
  for _ in range(8):
    value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
  return value


_CRC = tuple(map(_crc_row, range(256)))

KINDS: dict[str, tuple[Mutator, ...]] = {
    'bytes': (damage,), 'json': (_json,), 'jsonl': (_jsonl,), 'safetensors': (_safetensors,), 'zip': (_zip,),
    'npy': (_npy,), 'pickle': (_hostile_pickles.change,), 'tar': (_tar,), 'ctranslate2': (_ctranslate2,),
    'parquet': (_parquet,), 'ocdbt': (_ocdbt,)}
