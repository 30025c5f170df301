"""The picture of a sweep: every held-out figure over steps, a line a group."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence

from lmspt_jax.errors import LmsptError
from lmspt_jax.sweeps.summary import Result, by_group, curve, figure_names

_COLUMNS = 3


def require_matplotlib() -> None:
  if importlib.util.find_spec('matplotlib') is None:
    raise LmsptError("lmspt sweep draws with matplotlib, which is not installed; pip install -e '.[sweep]'")


def as_svg(results: Sequence[Result], title: str) -> str:
  """SVG text: thick, the mean of a group's runs; around it, one standard deviation; thin, the runs themselves.

  The same results give the same bytes (of one version of matplotlib).
  """
  import matplotlib
  from matplotlib.figure import Figure

  groups, figures = by_group(results), figure_names(results)
  columns = max(1, min(_COLUMNS, len(figures)))
  rows = max(1, math.ceil(len(figures) / columns))
  colours = matplotlib.colormaps['tab10' if len(groups) <= 10 else 'viridis']
  with matplotlib.rc_context({'svg.hashsalt': 'lmspt', 'svg.fonttype': 'none'}):
    picture = Figure(figsize=(4 * columns, 3 * rows + 0.8), layout='constrained')
    picture.suptitle(title)
    axes = picture.subplots(rows, columns, squeeze=False).ravel()
    for axis, figure in zip(axes, figures, strict=False):
      for number, (group, mine) in enumerate(groups.items()):
        colour = colours(number if len(groups) <= 10 else number / (len(groups) - 1))
        _draw(axis, mine, figure, colour, f'{group} ({len(mine)} run{"s" if len(mine) > 1 else ""})')
      axis.set_title(figure, loc='left', fontsize=10)
      axis.set_xlabel('step')
      axis.grid(alpha=0.3)
    for axis in axes[len(figures):]:
      axis.set_axis_off()
    if figures:
      picture.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(4, len(groups)))
    out = io.StringIO()
    picture.savefig(out, format='svg', metadata={'Date': None})
  return out.getvalue()


def _draw(axis, mine: Sequence[Result], figure: str, colour, label: str) -> None:
  if len(mine) > 1:
    for result in mine:
      steps = [step for step, row in result.progress.figures.items() if figure in row]
      values = [result.progress.figures[step][figure] for step in steps]
      axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.6)
  points = curve(mine, figure)
  mean = [point.mean for point in points.values()]
  axis.plot(list(points), mean, color=colour, linewidth=2, marker='o', markersize=3, label=label)
  spread = [0.0 if math.isnan(point.deviation) else point.deviation for point in points.values()]
  axis.fill_between(list(points), [m - s for m, s in zip(mean, spread, strict=True)],
                    [m + s for m, s in zip(mean, spread, strict=True)], color=colour, alpha=0.15, linewidth=0)
