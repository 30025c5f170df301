"""Runs of a sweep on this machine: `lmspt train` in processes of their own, some at a time.

No training outlives its sweep or meets its successor. Each is told to stop (SIGTERM, so it saves) when this process
dies, were it by SIGKILL: Linux does that (PR_SET_PDEATHSIG); elsewhere a training goes on. Either way it holds a lock
that it has inherited, and the next sweep in the folder begins when nobody holds that any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from lmspt_jax.errors import EXIT_RESUME, Interrupted, LmsptError
from lmspt_jax.sweeps.members import LOG, Member, last_checkpoint, last_step, note, remove_note

TRAIN = (sys.executable, '-m', 'lmspt_jax', 'train')
TICK = 0.1  # seconds between looks at the processes
REDRAW = 1.0  # seconds between looks at their metrics
RESTARTS = 3  # after status 75, in a row without a new checkpoint
GRACE = 120.0  # seconds between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def train_all(members: Sequence[Member], workdir: Path, *, parallel: int = 1) -> list[Member]:
  """Trains each to its end, or on from where it is, `parallel` at a time; returns those that failed.

  A failure is noted in the run's folder and the others go on. SIGTERM, SIGHUP and Ctrl-C stop the trainings, which
  save; a second one kills them.

  Raises:
    LmsptError: another sweep is at work in `workdir`, or it can't be written.
    Interrupted, KeyboardInterrupt: told to stop, by a signal or by Ctrl-C.
  """
  waiting, active, failed = deque(enumerate(members, start=1)), [], []
  with _alone(workdir) as lock, _Stop() as stop:
    try:
      while active or (waiting and not stop.seen):
        while waiting and len(active) < parallel and not stop.seen:
          number, member = waiting.popleft()
          active.append(_Training(member, f'{number} of {len(members)}', lock))
        time.sleep(TICK)
        stop.pass_on(active)
        for training in [*active]:
          status = training.look(stopping=bool(stop.seen))
          if status is not None:
            active.remove(training)
            if status and not stop.seen:
              failed.append(training.member)
    finally:
      for training in active:
        training.end()
  if signal.SIGINT in stop.seen:
    raise KeyboardInterrupt
  if stop.seen:
    raise Interrupted(f'{signal.Signals(stop.seen[0]).name}: the sweep stopped; run the same command again to go on')
  return failed


class _Training:
  """One run: its process, started again while that can help, and its line on the terminal."""

  def __init__(self, member: Member, place: str, lock: int):
    self.member, self._place, self._lock = member, place, lock
    self._in_vain, self._furthest = 0, last_checkpoint(member.folder)
    self._redrawn = 0.0
    self._deadline = float('inf')
    member.folder.mkdir(parents=True, exist_ok=True)
    remove_note(member, 'failed')
    # On a terminal only (None).
    self._bar = tqdm(total=member.config.train.num_steps, desc=member.name, unit='step', disable=None,
                     dynamic_ncols=True, initial=max(self._furthest, 0))
    self._say(f'started ({place})' if self._furthest < 0 else f'goes on at step {self._furthest} ({place})')
    self._start()

  def _start(self) -> None:
    path = self.member.folder / LOG
    self._log_start = path.stat().st_size if path.exists() else 0
    with path.open('ab') as log:
      self._process = _popen((*TRAIN, *self.member.arguments), log, self._lock)

  def look(self, *, stopping: bool) -> int | None:
    """The exit status once the run is over, else None."""
    if time.monotonic() > self._deadline:
      self._deadline = float('inf')
      self._say(f'not ended {GRACE:g} s after it was told to: killed')
      self._kill()
    status = self._process.poll()
    if time.monotonic() > self._redrawn + REDRAW or status is not None:
      self._redrawn = time.monotonic()
      self._bar.n = last_step(self.member.folder / 'metrics.jsonl')
      self._bar.refresh()
    if status is None:
      return None
    self._kill()  # what it left behind: the data workers of one that was killed
    if status == EXIT_RESUME and not stopping and self._may_start_again():
      self._say('status 75: starts again')
      self._start()
      return None
    self._bar.close()
    if status == 0:
      self._say('finished')
    elif stopping:
      self._say('stopped')
    else:
      status = 128 - status if status < 0 else status
      line = self._last_line()
      note(self.member, 'failed', status=status, line=line)
      self._say(f'failed with status {status}, {line}; see {self.member.folder / LOG}')
    return status

  def tell(self) -> None:
    """To stop; the second time at once."""
    if self._deadline < float('inf'):
      self._kill()
    elif self._process.poll() is None:
      self._process.terminate()
      self._deadline = time.monotonic() + GRACE

  def end(self) -> None:
    """Stops it whatever it does, and waits."""
    self._process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(GRACE)
    self._kill()
    self._process.wait()
    self._bar.close()

  def _may_start_again(self) -> bool:
    step = last_checkpoint(self.member.folder)
    self._in_vain = 1 if step > self._furthest else self._in_vain + 1
    self._furthest = step
    return self._in_vain <= RESTARTS

  def _kill(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)

  def _last_line(self) -> str:
    """What the last start of it said last: the one line of an error, or the end of a traceback."""
    with (self.member.folder / LOG).open('rb') as file:
      file.seek(self._log_start)
      lines = file.read().decode('utf-8', errors='replace').split('\n')
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), 'no word')

  def _say(self, text: str) -> None:
    tqdm.write(f'{self.member.name}: {text}', file=sys.stderr)


class _Stop:
  """Notes the signals that ask to stop, within its `with`, and passes them on."""

  def __init__(self):
    self.seen: list[int] = []
    self._passed_on = 0

  def __enter__(self) -> _Stop:
    self._before = {number: signal.signal(number, lambda number, frame: self.seen.append(number))
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                    if signal.getsignal(number) != signal.SIG_IGN}  # nohup's wish
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def pass_on(self, trainings: Sequence[_Training]) -> None:
    """SIGTERM for each that came, whichever it was: after it a training saves, after SIGINT it doesn't."""
    while self._passed_on < len(self.seen):
      self._passed_on += 1
      for training in trainings:
        training.tell()


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[int]:
  """Waits for what a killed sweep has left in the folder; yields the descriptor that trainings are to inherit."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    sweep, trainings = ((workdir / name).open('a') for name in ('.sweep.lock', '.trainings.lock'))
  except OSError as error:
    raise LmsptError(f'--workdir={workdir}: can\'t be written ({error.strerror}); give a folder you own') from error
  with sweep, trainings:
    if not _locked(sweep):
      raise LmsptError(f'--workdir={workdir}: another lmspt sweep is at work there; wait for its end')
    end, told = time.monotonic() + GRACE, False
    while not _locked(trainings):
      if not told:
        print(f'{workdir}: a training of a sweep that died is still saving; waits for it', file=sys.stderr, flush=True)
        told = True
      if time.monotonic() > end:
        raise LmsptError(f'--workdir={workdir}: a training that another sweep started is still at work there; stop it')
      time.sleep(TICK)
    yield trainings.fileno()


def _locked(file: Any) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _popen(command: Sequence[str], log: BinaryIO, lock: int) -> subprocess.Popen:
  """A process in a group of its own (a terminal's Ctrl-C comes through here), with both its outputs in the log."""
  parent, libc = os.getpid(), ctypes.CDLL(None)

  def end_with_parent() -> None:
    if sys.platform == 'linux':
      libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
      if os.getppid() != parent:  # it died before the line above
        os._exit(EXIT_RESUME)

  # Large arrays on huge pages, as launch/local.sh has them.
  environment = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1', **os.environ}
  return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,),
                          process_group=0, preexec_fn=end_with_parent, env=environment)
