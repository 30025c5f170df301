"""Reads thousands of hostile files with every reader: what is not a valid file must be refused in one line.

    python benchmarks/fuzz_readers.py [--files=10000] [--seed=0] [--reader=NAME ...] [--rows=DIR]

Valid files are changed (`_mutations.py`: at random, in their structure, and with malice), one at a time, and read in a
process of its own, which is started again when it dies. Of every file are looked at:

  crash    the process ended by a signal
  hang     over 1 s of processor time, or 20 s by the clock
  memory   over 256 MiB of resident memory more than before, or an allocation of over 2 GiB
  code     an audit hook saw a program started, a socket, a file written or one read outside the folder, code made from
           text or imported; or a payload left its mark
  foreign  another exception than LmsptError
  text     its message has more than one line, control characters, or over 2,000 characters

Exit status 1 if any of these happened. The same seed gives the same files (but for runs, whose arrays' files Orbax
names at random): `--file=N` reads that one alone and shows what is raised.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import gc
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

from _hostile_pickles import CANARY  # noqa: E402
from _hostile_readers import READERS, Reader  # noqa: E402
from _mutations import mutate  # noqa: E402

FAULTS = ('crash', 'hang', 'memory', 'code', 'foreign', 'text')
PROCESSOR_SECONDS, CLOCK_SECONDS, START_SECONDS = 1.0, 20.0, 120.0
RESIDENT, ADDRESSES = 256 << 20, 2 << 30  # bytes that a file may cost
MAX_TEXT = 2000  # characters of a message
_COLLECT = 25  # files between two collections of garbage
_WARM_UP = 6  # hostile files that are not counted

# ---------------------------------------------------------------- a folder with one thing in it changed


def change(reader: Reader, seeds: Sequence[dict[str, bytes]], folder: Path, rng: random.Random) -> str:
  """Writes a folder of files, one or more of which are hostile; returns what was done."""
  variant = rng.randrange(len(seeds))
  files, other = dict(seeds[variant]), seeds[1 - variant]
  names = sorted(name for name in files if _kind(reader, name))
  chosen = min(names, key=lambda name: (_order(reader, name), name)) if rng.random() < 0.1 else rng.choice(names)
  how = rng.random()
  if how < 0.94:
    kind = _kind(reader, chosen) if rng.random() < 0.85 else 'bytes'
    rewrite = reader.rewrite is not None and how < 0.3
    if not rewrite:
      files[chosen] = mutate(files[chosen], kind, rng, other.get(chosen) or rng.choice(list(other.values())))
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  if how < 0.94:
    if rewrite:
      reader.rewrite(folder, rng)
    return f'{chosen} {"rewritten" if rewrite else kind}'
  return f'{chosen} {_replace(folder / chosen, rng)}'


def _kind(reader: Reader, name: str) -> str:
  return next((kind for pattern, kind in reader.files.items() if fnmatch.fnmatch(name, pattern)), '')


def _order(reader: Reader, name: str) -> int:
  return next(number for number, pattern in enumerate(reader.files) if fnmatch.fnmatch(name, pattern))


def _replace(path: Path, rng: random.Random) -> str:
  """Something else than a file of its own in a file's place."""
  choice = rng.choice(('missing', 'empty', 'folder', 'pipe', 'loop', 'dangling', 'device', 'zeros', 'huge', 'locked'))
  path.unlink()
  if choice == 'empty':
    path.touch()
  elif choice == 'folder':
    path.mkdir()
  elif choice == 'pipe':
    os.mkfifo(path)
  elif choice in ('loop', 'dangling', 'device', 'zeros'):
    path.symlink_to({'loop': path.name, 'dangling': 'absent', 'device': '/dev/tty', 'zeros': '/dev/zero'}[choice])
  elif choice == 'huge':  # a terabyte with nothing in it
    with path.open('wb') as file:
      file.truncate(1 << 40)
  elif choice == 'locked':
    path.touch(0o000)
  return choice


def load_seeds(folder: Path) -> list[dict[str, bytes]]:
  """Both valid folders of a reader: path -> bytes."""
  return [{path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}
          for root in (folder / '0', folder / '1')]


# ---------------------------------------------------------------- the process that reads


class Watch:
  """An audit hook that notes what reading a file should not do. It can't be taken away: for processes of their own."""

  _NEVER = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'pty.spawn', 'socket.bind',
            'socket.connect', 'socket.get', 'socket.send', 'subprocess.', 'ctypes.dlopen', 'pickle.find_class',
            'code.__new__', 'urllib.', 'webbrowser.', 'ftplib.')
  _CHANGES = ('os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.chmod', 'os.chown', 'os.link', 'os.symlink',
              'os.truncate', 'shutil.')
  _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

  def __init__(self, allowed: Sequence[Path]):
    self.seen: list[str] = []
    self.armed = False
    self._allowed = tuple(str(path) for path in allowed)
    self._libraries = tuple({*map(os.path.realpath, (sys.prefix, sys.base_prefix, ROOT)), sys.prefix, '/proc/', '/sys/',
                             '/dev/', '/usr/', '/etc/ld.so', '/etc/localtime', '/etc/mime'})
    sys.addaudithook(self._hear)

  def _hear(self, event: str, arguments: tuple) -> None:
    if not self.armed:
      return
    if event == 'open':
      path, _, flags = arguments
      if isinstance(path, int):
        return
      path = os.path.abspath(os.fsdecode(path))
      if not path.startswith(self._allowed) and (flags & self._WRITING or not path.startswith(self._libraries)):
        self.seen.append(f'open {path} {flags:o}')
    elif event in ('exec', 'compile'):
      if sys._getframe(2).f_code.co_filename == traceback.__file__:  # parses source, to underline a part of it
        return
      name = getattr(arguments[0], 'co_filename', None) if event == 'exec' else arguments[1]
      name = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
      if not name.startswith(self._libraries) and not name.startswith('<frozen'):
        self.seen.append(f'{event} {name}')
    elif event.startswith(self._NEVER):
      self.seen.append(f'{event} {arguments!r:.200}')
    elif event.startswith(self._CHANGES) and not os.path.abspath(os.fsdecode(arguments[0])).startswith(self._allowed):
      self.seen.append(f'{event} {arguments!r:.200}')


def work(seeds_folder: Path, plan: Plan, first: int, last: int, pipe: int) -> None:
  """Reads the plan's files first to last - 1; of each it writes a line of JSON to `pipe` before it (its place in the
  plan) and after it (the row)."""
  faulthandler.enable()
  folder = Path(tempfile.mkdtemp(prefix='work-', dir=seeds_folder))
  os.chdir(folder)
  os.environ['LMSPT_CACHE'] = str(folder / 'cache')
  out = os.fdopen(pipe, 'w', buffering=1)
  watch = Watch([folder])
  gc.disable()  # garbage is no one file's
  name = ''
  for place in range(first, last):
    if name != plan.reader(place):
      name = plan.reader(place)
      reader, seeds = READERS[name], load_seeds(seeds_folder / name)
      _warm_up(name, seeds, folder, watch)
    number = place % plan.files
    case = folder / f'{name}-{number}'
    case.mkdir()
    done = change(reader, seeds, case, random.Random(f'{plan.seed}:{name}:{number}'))
    out.write(f'{place}\n')
    row = _read(reader, case, watch)
    out.write(json.dumps({'reader': name, 'number': number, 'change': done, **row}) + '\n')
    if place % _COLLECT == 0:
      gc.collect()
    shutil.rmtree(case)
    shutil.rmtree(folder / 'cache', ignore_errors=True)
    (folder / CANARY).unlink(missing_ok=True)


def _warm_up(name: str, seeds: Sequence[dict[str, bytes]], folder: Path, watch: Watch) -> None:
  """Reads valid files and some others: what is imported late and kept ready is no one file's fault.

  Raises RuntimeError if a valid one is refused.
  """
  reader, unlimited = READERS[name], resource.getrlimit(resource.RLIMIT_AS)[1]
  resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
  for number in range(2 + _WARM_UP):
    case = folder / f'{name}-warm-{number}'
    case.mkdir()
    if number < 2:
      for path, data in seeds[number].items():
        (case / path).parent.mkdir(parents=True, exist_ok=True)
        (case / path).write_bytes(data)
    else:
      change(reader, seeds, case, random.Random(number))
    if all(path.is_file() or path.is_dir() for path in case.rglob('*')):
      found = _read(reader, case, watch)
      if number < 2 and found['result'] != 'loaded':
        raise RuntimeError(f'{name}: a valid file is refused: {found}')
  gc.collect()
  size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, unlimited))


def _read(reader: Reader, case: Path, watch: Watch) -> dict[str, Any]:
  """What happened, by name; `faults` are of FAULTS."""
  Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  before, start, faults = _memory('VmRSS'), time.process_time(), []
  watch.seen.clear()
  watch.armed = True
  error: BaseException | None = None
  try:
    counted = reader.read(case)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as caught:  # noqa: BLE001  a panic of Rust's is no Exception
    error = caught
  finally:
    watch.armed = False
  seconds, grown = time.process_time() - start, _memory('VmHWM') - before
  result = 'refused' if error else 'counted' if counted else 'loaded'
  text = '' if error is None else f'{type(error).__name__}: {error}'
  from lmspt_jax.errors import LmsptError
  if error is not None and not isinstance(error, LmsptError):
    faults.append('foreign')
    where = traceback.extract_tb(error.__traceback__)[-3:]
    text += f' at {", ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in where)}'
    text = f'{text} {"".join(traceback.format_exception(error))[-1500:]}'
  elif error is not None and (not str(error).isprintable() or len(str(error)) > MAX_TEXT):
    faults.append('text')
  if seconds > PROCESSOR_SECONDS:
    faults.append('hang')
  if grown > RESIDENT or isinstance(error, MemoryError):
    faults.append('memory')
  if watch.seen or Path(CANARY).exists() or (case / CANARY).exists():
    faults.append('code')
  return {'result': result, 'faults': faults, 'seconds': round(seconds, 3), 'grown': grown,
          'text': text if faults else text[:300], 'seen': watch.seen[:5]}


def _memory(field: str) -> int:
  """Bytes, of /proc/self/status."""
  return int(Path('/proc/self/status').read_text().partition(f'{field}:')[2].split()[0]) << 10


# ---------------------------------------------------------------- the process that watches


@dataclass(frozen=True)
class Plan:
  """Which files are read: so many of each reader, one reader after the other."""

  readers: tuple[str, ...]
  files: int
  seed: int

  def reader(self, place: int) -> str:
    return self.readers[place // self.files]


def campaign(seeds: Path, plan: Plan, first: int = 0) -> Iterator[dict[str, Any]]:
  """A row for each file of the plan. `seeds` is where `make_seeds` wrote valid ones."""
  place, end = first, plan.files * len(plan.readers)
  while place < end:
    for row in _one_process(seeds, plan, place, min(end, place + READERS[plan.reader(place)].life)):
      place += 1
      yield row


def _one_process(seeds: Path, plan: Plan, first: int, last: int) -> Iterator[dict[str, Any]]:
  """Rows until the last file, or until one after which the process can't go on."""
  get, give = os.pipe()
  log = seeds / 'log'
  with log.open('wb') as errors:
    process = subprocess.Popen(
        [sys.executable, __file__, f'--work={seeds}', *(f'--reader={name}' for name in plan.readers),
         f'--seed={plan.seed}', f'--files={plan.files}', f'--span={first}:{last}:{give}'], pass_fds=(give,),
        stdout=errors, stderr=errors, stdin=subprocess.DEVNULL, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  os.close(give)
  begun, held, patience = None, b'', START_SECONDS
  try:
    while True:
      ready, _, _ = select.select([get], [], [], patience)
      part = os.read(get, 1 << 16) if ready else b''
      if not part:
        if begun is None and (not ready or process.wait()):
          raise RuntimeError(f'the process that reads did not start: {log.read_text(errors="replace")[-2000:]}')
        if begun is not None:
          process.kill() if not ready else None
          fault = 'crash' if ready else 'hang'
          yield {'reader': plan.reader(begun), 'number': begun % plan.files, 'result': fault, 'faults': [fault],
                 'seconds': CLOCK_SECONDS, 'text': f'{process.wait()}: {log.read_text(errors="replace")[-1500:]}'}
        return
      *lines, held = (held + part).split(b'\n')
      for line in lines:
        row = json.loads(line)
        begun, patience = (row, CLOCK_SECONDS) if isinstance(row, int) else (None, START_SECONDS)
        if begun is None:
          yield row
  finally:
    process.kill()
    process.wait()
    os.close(get)


def make_seeds(folder: Path, names: Sequence[str]) -> None:
  """Writes the valid files of readers."""
  for name in names:
    for variant in (0, 1):
      (folder / name / str(variant)).mkdir(parents=True)
      READERS[name].make(folder / name / str(variant), variant)


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
  """Markdown: a line a reader."""
  titles = ('reader', 'files', 'loaded', 'loaded, records counted as faults', 'refused in one line', *FAULTS,
            'longest, s')
  lines = ['| ' + ' | '.join(titles) + ' |', '|' + '---|' * len(titles)]
  for name, found in rows.items():
    results = Counter(row['result'] for row in found)
    faults = Counter(fault for row in found for fault in row['faults'])
    fine = sum(row['result'] == 'refused' and not row['faults'] for row in found)
    cells = (name, len(found), results['loaded'], results['counted'], fine, *(faults[fault] for fault in FAULTS),
             f'{max(row["seconds"] for row in found):.2f}')
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  return '\n'.join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--files', type=int, default=10_000, help='of each reader')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--reader', action='append', choices=READERS, help='again for another one; all if left out')
  parser.add_argument('--file', type=int, help='this one alone')
  parser.add_argument('--rows', type=Path, help='a folder for what happened with each file')
  parser.add_argument('--work', type=Path, help=argparse.SUPPRESS)
  parser.add_argument('--span', help=argparse.SUPPRESS)
  args = parser.parse_args()
  names = tuple(args.reader or READERS)
  if args.work:
    work(args.work, Plan(names, args.files, args.seed), *map(int, args.span.split(':')))
    return 0
  os.environ['JAX_PLATFORMS'] = 'cpu'
  started, rows = time.monotonic(), {}
  with tempfile.TemporaryDirectory() as folder:
    make_seeds(Path(folder), names)
    for name in names:
      rows[name] = []
      plan, first = (Plan((name,), args.files, args.seed), 0) if args.file is None else (
          Plan((name,), args.file + 1, args.seed), args.file)
      for row in campaign(Path(folder), plan, first):
        rows[name].append(row)
        if row['faults'] or args.file is not None:
          print(row, file=sys.stderr, flush=True)
        if args.rows:
          args.rows.mkdir(parents=True, exist_ok=True)
          with (args.rows / f'{name}.jsonl').open('a') as file:
            file.write(json.dumps(row) + '\n')
      print(table({name: rows[name]}).splitlines()[-1], file=sys.stderr, flush=True)
  print(f'{table(rows)}\n\n{time.strftime("%Y-%m-%d")}, {(time.monotonic() - started) / 60:.0f} minutes')
  return int(any(row['faults'] for found in rows.values() for row in found))


if __name__ == '__main__':
  sys.exit(main())
