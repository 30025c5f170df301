"""Reads what XLA's compiler wrote of a program for one chip: collectives, loops, and the scheduler's cycles.

`cost_analysis()` counts a loop's body once, and says nothing of collectives. Here loops count as often as they run: by
`known_trip_count`, or by the constant that a condition compares its counter with (scans count from 0 by 1).
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

from lmspt_jax.errors import LmsptError
from lmspt_jax.training.flops import scope_of

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 'token': 0, 's4': 4, 'u4': 4}
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_NAMES = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(calls|body|condition|to_apply|branch_computations|true_computation|false_computation'
                     r'|called_computations)=(\{[^}]*\}|%[\w.\-]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'iota'}


@dataclass(frozen=True)
class Instruction:
  """One line: `shape` as written, names of operands, the rest as `text`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  root: bool

  @functools.cached_property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Computations by role: calls, body, condition, ..."""
    return {role: tuple(_NAMES.findall(names)) for role, names in _CALLED.findall(self.text)}

  @functools.cached_property
  def bytes(self) -> int:
    return shape_bytes(self.shape)


@dataclass
class Computation:
  name: str
  instructions: list[Instruction] = field(default_factory=list)

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in self.instructions}

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions if i.root)


@dataclass
class Costs:
  """Of one chip and one run of the program.

  Attributes:
    payload: bytes of the arrays that a collective works on, by kind: the whole array, gathered or to be scattered.
    wire: bytes that the chip sends for them by a ring's arithmetic (all-reduce twice (n - 1) / n of the array).
    count: how many collectives, by kind.
    flops, bytes: of matrix products and convolutions, and of what instructions read and write; by our own count.
    cycles: the compiler's own estimates, by part of the step.
  """

  payload: Counter[str] = field(default_factory=Counter)
  wire: Counter[str] = field(default_factory=Counter)
  count: Counter[str] = field(default_factory=Counter)
  flops: float = 0.0
  bytes: float = 0.0
  cycles: Counter[str] = field(default_factory=Counter)

  def add(self, other: Costs, times: int = 1) -> None:
    for mine, theirs in ((self.payload, other.payload), (self.wire, other.wire), (self.count, other.count),
                         (self.cycles, other.cycles)):
      for key, value in theirs.items():
        mine[key] += times * value
    self.flops += times * other.flops
    self.bytes += times * other.bytes


def shape_bytes(shape: str) -> int:
  """Bytes of 'f32[4,8]{1,0}' or of a tuple of such."""
  total = 0
  for kind, sizes in _ARRAY.findall(shape):
    if kind not in ('T', 'S', 'E', 'L', 'D', 'P'):
      total += _elements(sizes) * _bits(kind) // 8
  return total


def _bits(kind: str) -> int:
  if kind in _BITS:
    return _BITS[kind]
  found = re.search(r'\d+', kind)
  if found is None:
    raise LmsptError(f'the compiler wrote the unknown type {kind!r}: install the libtpu that setup.py names')
  return int(found[0])


def _elements(sizes: str) -> int:
  return math.prod(int(size) for size in sizes.split(',') if size)


def _dimensions(shape: str) -> list[int]:
  found = _ARRAY.search(shape)
  return [int(size) for size in found[2].split(',') if size] if found else []


class Program:
  """The text of a compiled module (`jax.stages.Compiled.as_text()`)."""

  def __init__(self, text: str):
    """Raises LmsptError where there is no entry computation."""
    self.computations: dict[str, Computation] = {}
    self.entry = ''
    current = None
    devices = re.search(r'num_partitions=(\d+)', text[:10_000])
    self.devices = int(devices[1]) if devices else 1
    for line in text.splitlines():
      if line.startswith((' ', '\t')):
        if current is not None and (instruction := _instruction(line)) is not None:
          current.instructions.append(instruction)
      elif line.rstrip().endswith('{') and (found := re.match(r'(ENTRY )?%?([\w.\-]+)', line)):
        current = self.computations[found[2]] = Computation(found[2])
        self.entry = found[2] if found[1] else self.entry
    if not self.entry:
      raise LmsptError('the compiled program has no entry computation: install the libtpu that setup.py names')

  def costs(self, loops: bool = True) -> Costs:
    """Of a whole run; with `loops` false, as if every loop ran once."""
    return self._costs(self.entry, loops, {})

  def trip_count(self, loop: Instruction) -> int:
    """How often a while loop runs. Raises LmsptError where that can't be read."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if found:
      return int(found[1])
    limits = [number for name in loop.called['condition'] for number in self._limits(self.computations[name])]
    if len(limits) != 1:
      raise LmsptError(f'{loop.name}: how often it runs is not in the compiled program, so the costs are unknown')
    return limits[0]

  def _limits(self, condition: Computation) -> list[int]:
    constants = [int(found[1]) for instruction in condition.instructions if instruction.opcode == 'constant'
                 and (found := re.search(r'constant\((\d+)\)', instruction.text))]
    compares = [i for i in condition.instructions if i.opcode == 'compare' or 'compare' in i.name]
    return constants if len(constants) == 1 and compares else []

  def _costs(self, name: str, loops: bool, known: dict[str, Costs]) -> Costs:
    if name in known:
      return known[name]
    computation, total, channels = self.computations[name], Costs(), set()
    for instruction in computation.instructions:
      total.bytes += self._bytes(instruction, computation)
      if found := _CYCLES.search(instruction.text):
        total.cycles[scope_of(_op_name(instruction))] += int(found[1])
      if instruction.opcode == 'while':
        times = self.trip_count(instruction) if loops else 1
        for body in instruction.called['body']:
          total.add(self._costs(body, loops, known), times)
      elif instruction.opcode == 'conditional':
        branches = [self._costs(branch, loops, known) for names in instruction.called.values() for branch in names]
        total.add(max(branches, key=lambda costs: (costs.payload.total(), costs.flops)))
      elif instruction.opcode in ('call', 'async-start'):
        for names in instruction.called.values():
          for called in names:
            total.add(self._costs(called, loops, known))
      else:
        self._add_fused(instruction, computation, total, channels)
    known[name] = total
    return total

  def _add_fused(self, instruction: Instruction, computation: Computation, total: Costs, channels: set,
                 fused: bool = False) -> None:
    """Collectives and products of an instruction and of what is fused into it.

    A collective that runs beside other work stands in several fusions, start, middle and end: its channel says that
    it is one.
    """
    opcode = instruction.opcode.removesuffix('-start')
    if opcode in KINDS:
      channel = re.search(r'channel_id=(\d+)', instruction.text)
      key = (opcode, channel[1]) if channel and fused else None
      if key is None or key not in channels:
        channels.add(key)
        self._add_collective(opcode, instruction, computation, total)
    elif opcode in ('convolution', 'dot'):
      total.flops += _product_flops(instruction, computation)
    elif opcode == 'fusion':
      for name in instruction.called.get('calls', ()):
        inside = self.computations[name]
        for inner in inside.instructions:
          self._add_fused(inner, inside, total, channels, fused=True)

  def _add_collective(self, kind: str, instruction: Instruction, computation: Computation, total: Costs) -> None:
    operands = sum(computation.by_name[name].bytes for name in instruction.operands)
    size = self._group_size(instruction)
    if kind == 'all-reduce' and computation.root.opcode == 'dynamic-slice' and size > 1:
      kind = 'reduce-scatter'  # TPU programs hold it as an all-reduce and a slice in one fusion
    payload = operands * size if kind == 'all-gather' else operands
    steps = {'all-reduce': 2 * (size - 1), 'collective-permute': size}.get(kind, size - 1)
    total.payload[kind] += payload
    total.wire[kind] += payload * steps // size
    total.count[kind] += 1

  def _group_size(self, instruction: Instruction) -> int:
    """Devices that a collective joins: {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'a'}."""
    text = instruction.text
    if instruction.opcode.startswith('collective-permute'):
      return self.devices
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)?\s*\{([^}]*)\}", text):
      sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
      # "'a':(2)4" is a part of the axis, of size 4
      parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
      return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
      return int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
      return found[1].count(',') + 1
    if re.search(r'replica_groups=\{\}', text):
      return self.devices
    raise LmsptError(f'{instruction.name}: the devices it joins are written in an unknown way: install the libtpu that '
                     'setup.py names')

  def _bytes(self, instruction: Instruction, computation: Computation) -> int:
    """What an instruction reads and writes; slices count as what they take."""
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
      return 0
    operands = [computation.by_name[name].bytes for name in instruction.operands if name in computation.by_name]
    if instruction.opcode == 'dynamic-slice':
      return 2 * instruction.bytes
    if instruction.opcode == 'dynamic-update-slice':
      return 2 * operands[1]
    if instruction.opcode != 'fusion':
      return instruction.bytes + sum(operands)
    fused = self.computations[instruction.called['calls'][0]]
    return self._written(fused) + sum(
        min(size, self._read(fused, number)) for number, size in enumerate(operands))

  def _read(self, fused: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand `number`."""
    parameter = next(i for i in fused.instructions if i.opcode == 'parameter' and f'parameter({number})' in i.text)
    total = 0
    for user in fused.instructions:
      for place, name in enumerate(user.operands):
        if name != parameter.name:
          continue
        if user.opcode == 'dynamic-slice':
          total += user.bytes if place == 0 else 0
        elif user.opcode == 'fusion':
          total += self._read(self.computations[user.called['calls'][0]], place)
        elif user.opcode != 'dynamic-update-slice' or place != 0:
          total += parameter.bytes
    return total

  def _written(self, fused: Computation) -> int:
    """Bytes that a fusion writes."""
    roots = [fused.root]
    if fused.root.opcode == 'tuple':
      roots = [fused.by_name[name] for name in fused.root.operands]
    return sum(fused.by_name[root.operands[1]].bytes if root.opcode == 'dynamic-update-slice' else root.bytes
               for root in roots)


def _op_name(instruction: Instruction) -> str:
  found = _OP_NAME.search(instruction.text)
  return found[1] if found else ''


def _product_flops(instruction: Instruction, computation: Computation) -> float:
  """Of a convolution or dot: two for each output element and tap."""
  kernel = _dimensions(computation.by_name[instruction.operands[1]].shape)
  output = _elements(','.join(map(str, _dimensions(instruction.shape))))
  if found := re.search(r'dim_labels=\w+_(\w+)->', instruction.text):
    taps = math.prod(kernel) // kernel[found[1].index('o')]
  else:
    axes = re.search(r'rhs_contracting_dims=\{([\d,]*)\}', instruction.text)
    taps = math.prod(kernel[int(axis)] for axis in axes[1].split(',') if axis)
  dilation = re.search(r'lhs_dilate=([\dx]+)', instruction.text)
  return 2.0 * output * taps / (math.prod(map(int, dilation[1].split('x'))) if dilation else 1)


def _instruction(line: str) -> Instruction | None:
  """A line of a computation; None for what is none."""
  found = re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)
  if found is None:
    return None
  start = found.end()
  end = _closing(line, start) if line[start] == '(' else line.index(' ', start)
  opening = line.index('(', end)
  closing = _closing(line, opening)
  return Instruction(found[2], line[start:end], line[end:opening].strip(), tuple(_NAMES.findall(line[opening:closing])),
                     line[end:], bool(found[1]))


def _closing(line: str, start: int) -> int:
  """The position after the bracket that closes the one at `start`."""
  depth = 0
  for position in range(start, len(line)):
    depth += {'(': 1, ')': -1}.get(line[position], 0)
    if depth == 0:
      return position + 1
  return len(line)
