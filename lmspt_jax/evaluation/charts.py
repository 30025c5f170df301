"""Charts as inline SVG that take the page's colours, and spectrograms as PNG, for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib import image

from lmspt_jax.measures import pictures

MAX_DOTS = 200  # of a distribution's row
MAX_POINTS = 400  # of a line
_WIDTH = 400  # of a chart's own units: a little more than the pixels it is shown at


def distributions(values: Mapping[str, Sequence[float]], label: str) -> str:
  """A row a system: its values as dots, over a box of the quartiles with the median."""
  shown = {name: np.asarray(found, np.float64) for name, found in values.items() if len(found)}
  if not shown:
    return ''
  everything = np.concatenate(list(shown.values()))
  low, high = float(everything.min()), float(everything.max())
  high = high if high > low else low + 1
  left, row, top = 130, 24, 4
  place = lambda value: left + (value - low) / (high - low) * (_WIDTH - left - 16)
  parts = []
  for number, (name, found) in enumerate(shown.items()):
    y = top + number * row + row / 2
    first, middle, last = (place(value) for value in np.percentile(found, [25, 50, 75]))
    parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" class="right">{escape(name)}</text>'
                 f'<rect x="{first:.1f}" y="{y - 7:.1f}" width="{max(1, last - first):.1f}" height="14" class="box"/>')
    dots = found if len(found) <= MAX_DOTS else np.percentile(found, np.linspace(0, 100, MAX_DOTS))
    parts += [f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="2.5" class="dot"/>' for value in dots]
    parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 9:.1f}" y2="{y + 9:.1f}" class="median"/>')
  bottom = top + len(shown) * row
  parts.append(f'<text x="{left}" y="{bottom + 14}">{low:.3g}</text>'
               f'<text x="{_WIDTH - 16}" y="{bottom + 14}" class="right">{high:.3g}</text>')
  medians = ', '.join(f'{name} {np.median(found):.3g}' for name, found in shown.items())
  return _svg(_WIDTH, bottom + 20, f'{label}: distribution over utterances; medians {medians}', parts)


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, height: int = 150,
          stretch: bool = False) -> str:
  """Named (x, y) over one pair of axes that begin at the least values; `stretch` lets the width follow the page."""
  shown = {name: (np.asarray(x, np.float64), np.asarray(y, np.float64)) for name, (x, y) in series.items() if len(x)}
  if not shown:
    return ''
  x_all, y_all = (np.concatenate([pair[axis] for pair in shown.values()]) for axis in (0, 1))
  x_span, y_span = np.ptp(x_all) or 1, np.ptp(y_all) or 1
  left, right, bottom = (0, _WIDTH, height - 4) if stretch else (52, _WIDTH - 12, height - 20)
  parts = []
  for number, (name, (x, y)) in enumerate(shown.items()):
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))
    points = ' '.join(f'{left + (a - x_all.min()) / x_span * (right - left):.1f},'
                      f'{bottom - (b - y_all.min()) / y_span * (bottom - 8):.1f}' for a, b in zip(x[keep], y[keep],
                                                                                              strict=True))
    parts.append(f'<polyline points="{points}" class="line c{number % 6}"/>')
    if len(shown) > 1:
      place = f'x="{right}" y="{14 + 14 * number}"'
      parts.append(f'<text {place} class="right c{number % 6}">{escape(name)}</text>')
  if not stretch:
    parts.append(f'<text x="{left}" y="{height - 4}">{x_all.min():.4g}</text>'
                 f'<text x="{right}" y="{height - 4}" class="right">{x_all.max():.4g}</text>'
                 f'<text x="{left - 6}" y="12" class="right">{y_all.max():.3g}</text>'
                 f'<text x="{left - 6}" y="{bottom + 4}" class="right">{y_all.min():.3g}</text>')
  ranges = ', '.join(f'{name} from {y[0]:.3g} to {y[-1]:.3g}' for name, (_, y) in shown.items())
  return _svg(_WIDTH, height, f'{label}: {ranges}', parts, stretch)


def _svg(width: int, height: float, label: str, parts: Sequence[str], stretch: bool = False) -> str:
  ratio = ' preserveAspectRatio="none"' if stretch else ''
  head = f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}"{ratio}>'
  return f'{head}{"".join(parts)}</svg>'


def spectrogram(audio_N: np.ndarray) -> str:
  """PNG data URI: 80 mel bands over time, a pixel column 10 ms, 80 dB below full scale black."""
  return _png(pictures.spectrogram(audio_N), 'magma')


def token_grid(ids_KT: np.ndarray, sizes: Sequence[int]) -> str:
  """PNG data URI: a row a codebook, a column a frame, the code as a colour."""
  return _png(np.stack([ids_T / max(1, size - 1) for ids_T, size in zip(ids_KT, sizes, strict=True)])[::-1], 'turbo')


def _png(values: np.ndarray, colours: str) -> str:
  """Of values in [0, 1], the first row lowest."""
  buffer = io.BytesIO()
  pixels = matplotlib.colormaps[colours](values[::-1], bytes=True)[..., :3]
  image.imsave(buffer, np.ascontiguousarray(pixels), format='png')
  return data_uri(buffer.getvalue(), 'image/png')


def data_uri(content: bytes, kind: str) -> str:
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'
