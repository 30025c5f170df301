"""The same tokens in processes with other numbers of devices and threads; the rest is in tests/test_same_tokens.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_same_tokens import _small_windows, alone, digest, recordings, run, tokenizer  # noqa: F401  fixtures

# In a process of its own, as the number of devices and threads is fixed when JAX starts.
ELSEWHERE = """
import json, sys
import jax
devices, model, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update('jax_num_cpu_devices', devices)
import numpy as np
from lmspt_jax import Tokenizer
sys.path.insert(0, folder)
from test_same_tokens import LARGEST, RATE, digest
from lmspt_jax.inference import windows
windows.LEAST_LARGEST = LARGEST
tokenizer = Tokenizer.from_pretrained(model)
with np.load(sys.argv[4]) as archive:
  recordings = [archive[name] for name in archive]
codes = tokenizer.encode(recordings, sample_rate=RATE)
used = {next(iter(x.devices())) for x in jax.live_arrays()}
assert len(jax.local_devices()) == devices == len(used), used
print(json.dumps(digest(codes, tokenizer.decode(codes))))
"""


@pytest.mark.parametrize('devices, threads', [(8, '8'), (1, '1')])
def test_any_number_of_devices_and_threads(devices, threads, run, recordings, alone, tmp_path, repo):  # noqa: F811
  chosen = (13, 14, 12)  # in more windows than there are devices
  np.savez(tmp_path / 'recordings.npz', *(recordings[number] for number in chosen))
  environment = {**os.environ, 'NPROC': threads, 'PYTHONPATH': str(repo)}
  done = subprocess.run([sys.executable, '-c', ELSEWHERE, str(devices), str(run), str(repo / 'tests'),
                         str(tmp_path / 'recordings.npz')], capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  wanted = digest(*alone)
  assert json.loads(done.stdout.splitlines()[-1]) == [wanted[number] for number in chosen]
