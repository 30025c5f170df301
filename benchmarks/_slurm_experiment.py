"""The tiny experiment that benchmarks/slurm_run.sh trains, and the comparison of two of its runs.

    python benchmarks/_slurm_experiment.py make FOLDER            # writes FOLDER/config.py and its teacher
    python benchmarks/_slurm_experiment.py compare FOLDER A B     # the last checkpoints and metrics.jsonl of two runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))
import jax
import numpy as np
from make_golden_step import DIMS, TINY, replaced, write_teacher

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.training.state import Experiment

STEPS = 200
CONFIG = replaced(
    TINY, train__num_steps=STEPS, train__checkpoint_every=40, data__num_workers=1, discriminator__fft_sizes=(),
    model__semantic__revive_every=3, model__acoustic__revive_every=4)
CLOCKS = ('seconds', 'audio_hours', 'utilisation', 'goodput', 'waiting')  # in the names of metrics that a clock makes


def make(folder: Path) -> None:
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'))
  (folder / 'config.py').write_text(
      f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')


def compare(a: Path, b: Path) -> None:
  states = [last_state(workdir) for workdir in (a, b)]
  different = [path for path in states[0] if states[0][path].tobytes() != states[1][path].tobytes()]
  assert states[0].keys() == states[1].keys() and not different, different
  size = sum(value.nbytes for value in states[0].values())
  print(f'state after step {STEPS}: {len(states[0])} arrays, {size} bytes, equal bit for bit')
  rows = [metrics(workdir) for workdir in (a, b)]
  assert [row['step'] for row in rows[0]] == [*range(1, STEPS + 1)]
  assert rows[0] == rows[1]
  print(f'metrics.jsonl: {len(rows[0])} steps, each once, equal in all but the clocks')


def last_state(workdir: Path) -> dict[str, np.ndarray]:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                          vars(Experiment(CONFIG, DIMS).abstract_state()))
  store = CheckpointStore(workdir)
  state, _ = store.restore(STEPS, abstract)
  store.close()
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}


def metrics(workdir: Path) -> list[dict[str, Any]]:
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if not any(word in name for word in CLOCKS)} for row in rows]


if __name__ == '__main__':
  verb, folder, *runs = sys.argv[1:]
  make(Path(folder)) if verb == 'make' else compare(*(Path(folder) / run for run in runs))
