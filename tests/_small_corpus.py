"""A folder with a manifest, made of the bundled speech, and what a prepared folder holds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import soundfile

from lmspt_jax.data.sources.folder import ASSETS

SAMPLE = ASSETS / 'speech_sample'


def files(folder: Path) -> dict[str, bytes]:
  """Everything a run leaves behind, but for the rows it keeps of its shards."""
  names = [path for path in folder.rglob('*') if path.is_file() and path.parent.name != 'shards']
  return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def small_folder(folder: Path, count: int = 12, manifest: bool = True) -> list[dict]:
  """The first utterances of the sample, two of them as wav; returns the manifest's rows."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text().splitlines()[:count]]
  (folder / 'audio').mkdir(parents=True)
  for number, row in enumerate(rows):
    if number in (3, 5):
      audio, rate = soundfile.read(SAMPLE / row['path'], dtype='int16')
      row['path'] = row['path'].replace('.flac', '.wav')
      soundfile.write(folder / row['path'], audio, rate)
    else:
      shutil.copy(SAMPLE / row['path'], folder / row['path'])
    row['split'] = 'test' if number % 4 == 0 else 'train'
  if manifest:
    write_manifest(folder, rows)
  return rows


def write_manifest(folder: Path, rows: list[dict]) -> None:
  (folder / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def children(pid: int) -> list[int]:
  threads = Path(f'/proc/{pid}/task').glob('*/children')
  return [int(child) for thread in threads for child in thread.read_text().split()]


def signalled_prepare(out: Path, *arguments: str, after: str, count: int, how: signal.Signals,
                      whom: Callable[[int], list[int]] | None = None) -> tuple[int, str]:
  """Runs `lmspt prepare` and signals it once `count` files match OUT/.prepare/`after`.

  A Ctrl-C reaches the whole process group, a kill the process alone, unless `whom` says which processes. Returns when
  all have ended, with the exit status and what was on stderr.
  """
  command = [sys.executable, '-m', 'lmspt_jax', 'prepare', f'--out={out}', *arguments]
  # A test run that was itself started in the background ignores SIGINT, and what it starts would too.
  process = subprocess.Popen(command, cwd=ASSETS.parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             text=True, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
  end = time.monotonic() + 60
  while len(list((out / '.prepare').glob(after))) < count and process.poll() is None:
    assert time.monotonic() < end
    time.sleep(0.001)
  assert process.poll() is None, process.stderr.read()
  if whom:
    chosen = whom(process.pid)
    assert chosen
    for pid in chosen:
      os.kill(pid, how)
  elif how == signal.SIGINT:
    os.killpg(process.pid, how)
  else:
    process.send_signal(how)
  try:
    _, errors = process.communicate(timeout=30)  # ends when no worker holds its end of the pipe
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)  # a failed test leaves nothing running
    raise
  return process.returncode, errors
