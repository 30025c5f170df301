"""Kills `lmspt tokenize` at random moments, again and again, and compares what it leaves with an unbroken run.

    python benchmarks/tokenize_kills.py [--kills=50] [--seed=0] [--processes=1] [--out=docs/results/tokenize_kills.md]

The bundled speech and a tiny model of arbitrary weights, small shards and parts so that there is much to break off.
Every start is killed with SIGKILL at a random moment of its work, one in eight while it is still starting, and the same
command is started again; a run that comes to its end in spite of it is compared, and the next corpus is begun. With
--processes=2 two hosts share the work, and one of the two is killed. Exit status 1 unless every end has the unbroken
run's files, byte for byte.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT

from _tiny_run import write_run  # isort: skip  (common has put tests/ on the path)

# The command line itself, with small parts; it says when the model is there and the work begins.
DRIVER = """
import sys
from lmspt_jax.cli.main import main
from lmspt_jax.slm import corpus, plan

def working(*arguments, **options):
  print('working', flush=True)
  return tokenize(*arguments, **options)

plan._PART_UTTERANCES = 3
tokenize, corpus.tokenize = corpus.tokenize, working
sys.exit(main(sys.argv[1:]))
"""


def start(model: Path, out: Path, processes: int) -> list[subprocess.Popen]:
  command = [sys.executable, '-c', DRIVER, 'tokenize', f'--model={model}', '--data=package:speech_sample',
             f'--out={out}', '--shard_utterances=9']
  options = {'cwd': ROOT, 'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
  if processes == 1:
    return [subprocess.Popen(command, **options)]
  with socket.create_server(('127.0.0.1', 0)) as server:
    command += [f'--coordinator=127.0.0.1:{server.getsockname()[1]}', f'--num-processes={processes}']
  return [subprocess.Popen([*command, f'--process-id={host}'], **options) for host in range(processes)]


def files(out: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def left_behind(out: Path) -> tuple[int, int, int]:
  """Finished shards, parts, and files that were being written."""
  state = out / '.tokenize'
  return (len(list(state.glob('shards/*.arrow'))), len(list(state.glob('parts/*.arrow'))),
          len(list(out.glob('.*.tmp'))) + len(list(state.glob('**/.*.tmp'))))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--out', type=Path, help='a page for docs/results')
  args = parser.parse_args()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  rng, begun = random.Random(args.seed), time.time()
  kills, ends, met, broken = 0, [], [0, 0, 0], 0
  with tempfile.TemporaryDirectory() as work:
    model = write_run(Path(work) / 'run')
    for name in ('warm', 'unbroken'):  # the first compiles
      processes = start(model, Path(work) / name, args.processes)
      processes[0].stdout.readline()
      working = time.monotonic()
      assert [process.wait() for process in processes] == [0] * args.processes
      length = time.monotonic() - working
    wanted = files(Path(work) / 'unbroken')
    assert wanted == files(Path(work) / 'warm')
    print(f'unbroken: {length:.1f} s of work, {len(wanted)} files', flush=True)
    while kills < args.kills:
      out, starts = Path(work) / 'out', 0
      shutil.rmtree(out, ignore_errors=True)
      while True:
        starts += 1
        processes, early = start(model, out, args.processes), rng.random() < 1 / 8
        victim, moment = rng.choice(processes), rng.uniform(0, 3 if early else 1.1 * length)
        if not early:
          victim.stdout.readline()
        try:
          victim.wait(moment)
        except subprocess.TimeoutExpired:
          victim.send_signal(signal.SIGKILL)
          kills += 1
        for process in processes:
          process.wait()
        if all(process.returncode == 0 for process in processes):
          break
        found = left_behind(out) if out.exists() else (0, 0, 0)
        met = [a + (b > 0) for a, b in zip(met, found, strict=True)]
        print(f'kill {kills}: after {moment:.1f} s{" of starting" if early else ""}; {found[0]} shards, '
              f'{found[1]} parts, {found[2]} half-written', flush=True)
        if kills >= args.kills:  # and now to the end
          assert [process.wait() for process in start(model, out, args.processes)] == [0] * args.processes
          starts += 1
          break
      same = files(out) == wanted
      broken += not same
      ends.append(starts)
      print(f'end {len(ends)}: {starts} starts, {"equal" if same else "DIFFERENT"}', flush=True)
  lines = [f'{kills} kills over {len(ends)} corpora ({min(ends)} to {max(ends)} starts each); after {met[0]} of them '
           f'there were finished shards, after {met[1]} parts of one, after {met[2]} a file that was being written.',
           f'Ends that differ from the unbroken run in any byte of any file: {broken}.']
  print('\n'.join(lines))
  if args.out:
    args.out.write_text(f"""# `lmspt tokenize` killed at random moments

    python benchmarks/tokenize_kills.py --kills={args.kills} --seed={args.seed} --processes={args.processes}

{datetime.date.today()}, 2 CPU cores, {(time.time() - begun) / 60:.0f} minutes: the bundled speech, a tiny model of
arbitrary weights, shards of 9 utterances in parts of 3.

""" + '\n\n'.join(lines) + '\n')
  return 1 if broken else 0


if __name__ == '__main__':
  sys.exit(main())
