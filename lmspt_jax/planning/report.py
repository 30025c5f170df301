"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lmspt_jax.planning.plan import Plan
from lmspt_jax.training.flops import RECOMPUTED

_GIB = 2**30
_COLOURS = {'parameters': '#31688e', 'optimizer': '#35b779', 'average': '#90d743', 'teacher': '#443983',
            'temporaries': '#e76f51', 'batch': '#777777'}
Cell = Callable[[Plan], str]


def as_json(config_name: str, plans: Sequence[Plan], versions: dict[str, str]) -> dict[str, Any]:
  """What plan.json holds: one entry a topology, with flops, bytes_accessed, memory and collectives at its top."""
  topologies = {}
  for plan in plans:
    entry = dataclasses.asdict(plan)
    topologies[entry.pop('topology')] = {**entry.pop('compiler'), **entry.pop('counted'), **entry}
  return {
    'config': config_name, 'versions': versions,
    'said_by_the_compiler': ['memory', 'flops_loops_once', 'bytes_accessed_loops_once', 'cycles', 'fits'],
    'counted': ['flops', 'bytes_accessed', 'collectives', 'model_flops', 'resident'],
    'projected': 'under "projected": bounds from published figures of the chip, nothing measured',
    'topologies': topologies}


def as_table(plans: Sequence[Plan]) -> str:
  """One column a topology; rows in groups by whose numbers they are."""
  groups: list[tuple[str, list[tuple[str, Cell]]]] = [
    ('the run', [
      ('chips (hosts)', lambda p: f'{p.setup["chips"]} ({p.setup["hosts"]})'),
      ('mesh', lambda p: ' x '.join(f'{size} {axis}' for axis, size in p.setup['mesh'].items())),
      ('batch, a chip', lambda p: f'{p.setup["batch_size"]}, {p.setup["batch_size"] / p.setup["chips"]:g}'),
      ('dtype', lambda p: p.setup['dtype'])]),
    ('memory of a chip, by the compiler (GiB)', [
      ('fits', lambda p: 'yes' if p.fits else f'no: needs {_gib(p.compiler["memory"]["peak"])}'),
      ('peak of available', lambda p: f'{_gib(_memory(p, "peak"))} of {_gib(_memory(p, "available"))}'),
      ('temporaries', lambda p: _gib(_memory(p, 'temporaries'))),
      ('program', lambda p: _gib(_memory(p, 'program')))]),
    ('of it between steps, by the shardings (GiB)', [
      (name, lambda p, name=name: _gib(p.resident[name])) for name in ('parameters', 'optimizer', 'average', 'teacher')
    ]),
    ('a step of a chip, by the compiler, loops counted as often as they run', [
      ('FLOPs', lambda p: _scaled(p.compiler.get('flops'))),
      ('bytes moved', lambda p: _scaled(p.compiler.get('bytes_accessed'))),
      ('compiled in', lambda p: f'{p.compiler["compile_seconds"]:.0f} s' if p.fits else '-')]),
    ('sent by a chip in a step, counted in the program (MB)', [
      (kind, lambda p, kind=kind: _collective(p, kind))
      for kind in sorted({kind for p in plans for kind in p.counted.get('collectives', {})})]),
    ('share of the step, by the compiler\'s cycles', [
      (part, lambda p, part=part: _share(p.counted.get('cycles', {}), part))
      for part in _parts(plans, 'cycles')]),
    ('share of the model\'s FLOPs, counted in the traced step', [
      (part, lambda p, part=part: _share(p.counted['model_flops'], part))
      for part in _parts(plans, 'model_flops')]),
    ('projected by the roofline, not measured', [
      ('step, at least', lambda p: _ms(p.projected.get('step_seconds'))),
      ('bound by', lambda p: p.projected.get('bound', '-')),
      ('compute / memory / network', lambda p: ' / '.join(
        _ms(p.projected.get(f'{name}_seconds')) for name in ('compute', 'memory', 'network')) if p.fits else '-'),
      ('model FLOP utilisation, at most', lambda p: f'{p.projected["utilisation"]:.1%}' if p.fits else '-'),
      ('hours of audio a day, at most', lambda p: f'{p.projected["audio_hours_per_day"]:,.0f}' if p.fits else '-')]),
  ]
  rows = [('', [plan.topology for plan in plans])]
  for title, cells in (group for group in groups if group[1]):
    rows.append((title, ['' for _ in plans]))
    rows += [(f'  {name}', [cell(plan) for plan in plans]) for name, cell in cells]
  # A group's title has no values, so it may run over the columns.
  width = max(len(name) for name, values in rows if any(values))
  columns = [max(len(values[number]) for _, values in rows) for number in range(len(plans))]
  return '\n'.join(
    f'{name:<{width}}  {"  ".join(f"{value:>{size}}" for value, size in zip(values, columns, strict=True))}'.rstrip()
    for name, values in rows)


def as_picture(plans: Sequence[Plan]) -> str:
  """Memory of a chip by what it holds, a bar a topology against what is there; SVG text, the same everywhere."""
  left, top, wide, high = 110, 40, 560, 26
  parts = [_memory_parts(plan) for plan in plans]
  full = max(max(sum(part.values()), _memory(plan, 'available') or 0) for part, plan in zip(parts, plans, strict=True))
  shapes = []
  for row, (plan, part) in enumerate(zip(plans, parts, strict=True)):
    y, x = top + row * (high + 14), float(left)
    for name, size in part.items():
      length = wide * size / full
      shapes.append(f'<rect x="{x:.2f}" y="{y}" width="{length:.2f}" height="{high}" fill="{_COLOURS[name]}"><title>'
                    f'{name}: {_gib(size)} GiB</title></rect>')
      x += length
    limit = left + wide * (_memory(plan, 'available') or 0) / full
    shapes.append(f'<path d="M{limit:.2f} {y - 4}v{high + 8}" stroke="black" stroke-width="2"/>')
    shapes.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{plan.topology}</text>')
  y = top + len(plans) * (high + 14) + 10
  for number, (name, colour) in enumerate(_COLOURS.items()):
    x = left + number * 105
    shapes.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
    shapes.append(f'<text x="{x + 17}" y="{y + 11}">{name}</text>')
  return '\n'.join([
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 60}" height="{y + 30}" font-family="sans-serif" '
    'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
    f'<text x="{left}" y="20">memory of a chip in a train step; the line is what there is</text>', *shapes,
    '</svg>', ''])


def _memory_parts(plan: Plan) -> dict[str, float]:
  """What is resident, and on top of it what the step needs while it runs."""
  resident = {name: float(plan.resident[name]) for name in _COLOURS if name in plan.resident}
  rest = (_memory(plan, 'peak') or 0) - sum(resident.values())
  return {**resident, 'temporaries': max(rest, 0.0)}


def _memory(plan: Plan, name: str) -> int | None:
  return plan.compiler['memory'].get(name)


def _collective(plan: Plan, kind: str) -> str:
  if not plan.fits:
    return '-'
  found = plan.counted['collectives'].get(kind)
  return f'{found["sent_bytes"] / 1e6:,.1f} ({found["count"]} x)' if found else '0'


def _parts(plans: Sequence[Plan], name: str) -> list[str]:
  """Parts of the step that any plan has, the largest first, what is left over last."""
  totals: dict[str, float] = {}
  for plan in plans:
    for part, value in plan.counted.get(name, {}).items():
      totals[part] = totals.get(part, 0) + value
  return sorted(totals, key=lambda part: (part in ('other', RECOMPUTED), -totals[part]))


def _share(values: dict[str, float], part: str) -> str:
  return f'{values.get(part, 0) / sum(values.values()):.0%}' if values else '-'


def _gib(size: float | None) -> str:
  return '-' if size is None else f'{size / _GIB:.2f}'


def _ms(seconds: float | None) -> str:
  return '-' if seconds is None else f'{1000 * seconds:,.0f} ms'


def _scaled(value: float | None) -> str:
  if value is None:
    return '-'
  for scale, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
    if value >= scale:
      return f'{value / scale:.2f} {name}'
  return f'{value:.0f}'
