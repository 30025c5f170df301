"""One output per input file: names and faults are settled before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmspt_jax.errors import LmsptError
from lmspt_jax.files import writable_folder


def plan(inputs: Sequence[str], out: str, suffix: str) -> list[tuple[Path, Path]]:
  """Pairs every input with OUT/STEM+SUFFIX and makes OUT.

  Raises:
    LmsptError: an input is missing, two would be written to the same file, or OUT can't be made or written.
  """
  pairs: dict[Path, Path] = {}
  for source in map(Path, inputs):
    if source.is_dir():
      raise LmsptError(f'{source}: is a directory; give the files in it')
    if not source.exists():
      raise LmsptError(f'{source}: no such file; check the path')
    target = Path(out) / f'{source.stem}{suffix}'
    if target in pairs:
      raise LmsptError(f'{source}: {pairs[target]} would be written to {target} too; call once for each of them, '
                       'with another --out')
    pairs[target] = source
  writable_folder(out)
  return [(source, target) for target, source in pairs.items()]
