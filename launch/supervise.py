#!/usr/bin/env python3
"""Runs a training command as one or several processes, and starts it again while that can help. See docs/launch.md.

    supervise.py [OPTION ...] -- COMMAND ...

The launchers call it. A start ends with the status of the first process that fails; the others are then told to stop
(SIGTERM) and killed after the grace time. 0, 1, 2 and 130 end here too; after 75 and after a crash the same command is
started again. SIGTERM, SIGINT and SIGHUP are passed on and waited for, and nothing is started after them.
Standard library only: it also runs where lmspt_jax isn't installed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import BinaryIO, NoReturn

FINAL = (0, 1, 2, 130)  # done, a fault to mend, a command line to mend, the keyboard
EXIT_RESUME = 75
TICK = 0.05  # seconds between looks at the processes
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose faults are one line."""

  def error(self, message: str) -> NoReturn:
    print(f'{self.prog}: error: {message}', file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = Parser(prog='supervise.py', description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--processes', type=int, default=1, metavar='N',
                      help='processes on this machine, which find each other over loopback')
  parser.add_argument('--restarts', type=int, default=3, metavar='N', help='in a row without a new checkpoint')
  parser.add_argument('--pause', type=float, default=10, metavar='SECONDS', help='before a restart')
  parser.add_argument('--grace', type=float, default=120, metavar='SECONDS', help='between SIGTERM and SIGKILL')
  parser.add_argument('--progress', metavar='SHELL', help='prints the names of the checkpoints, which are their steps')
  parser.add_argument('--stop', metavar='SHELL', help='tells the processes to stop, where a signal does not reach them')
  parser.add_argument('--requeue', metavar='SHELL', help='run after 75 or a stop, in place of a restart')
  parser.add_argument('--dry-run', action='store_true', help='print what would be run')
  parser.add_argument('command', nargs='+', metavar='COMMAND')
  options = parser.parse_args(argv)
  for name, least in (('processes', 1), ('restarts', 0), ('pause', 0), ('grace', 0)):
    if not getattr(options, name) >= least:
      parser.error(f'--{name}={getattr(options, name):g}: give a number from {least} on')
  return options


def main(argv: list[str]) -> int:
  options = parse(argv)
  if options.dry_run:
    for environment in environments(options.processes, 'PORT'):
      print(shlex.join([*(f'{name}={value}' for name, value in environment.items()), *options.command]))
    return 0
  signals = Signals()
  furthest = latest_step(options.progress)
  in_vain = 0
  while True:
    status = Start(options, signals).run()
    if options.requeue and (status == EXIT_RESUME or (signals.seen and status not in FINAL)):
      say(f'status {status}: runs {options.requeue}')
      subprocess.run(options.requeue, shell=True, check=False)
      return status
    if status in FINAL or signals.seen:
      return status
    step = latest_step(options.progress)
    in_vain = 0 if step > furthest else in_vain + 1
    furthest = max(step, furthest)
    if in_vain > options.restarts:
      say(f'status {status}: {in_vain} starts in a row without a new checkpoint; see the log for the reason')
      return status
    say(f'status {status}: starts again in {options.pause:g} s '
        + (f'(restart {in_vain} of {options.restarts} without a new checkpoint)' if in_vain else f'(step {step})'))
    if not signals.wait(options.pause):
      return status


def environments(count: int, port: int | str) -> list[dict[str, str]]:
  """What each of `count` processes gets beside this one's environment."""
  if count == 1:
    return [{}]
  return [{'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(i)}
          for i in range(count)]


def latest_step(command: str | None) -> int:
  """The greatest whole number that the command prints on a line; -1 for none."""
  if command is None:
    return -1
  printed = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                           check=False).stdout
  return max((int(line) for line in printed.split() if line.isdigit()), default=-1)


class Signals:
  """Which of the signals that ask to stop have come."""

  def __init__(self):
    self.seen: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      signal.signal(number, lambda number, frame: self.seen.append(number))

  def wait(self, seconds: float) -> bool:
    """Whether the time passed without a signal."""
    end = time.monotonic() + seconds
    while not self.seen and time.monotonic() < end:
      time.sleep(TICK)
    return not self.seen


class Start:
  """One start of the command: its processes from first to last."""

  def __init__(self, options: argparse.Namespace, signals: Signals):
    self.options = options
    self.signals = signals
    self.passed_on = 0  # how many of signals.seen
    self.deadline = float('inf')  # when what still runs is killed
    self.failed: int | None = None  # status of the first process that failed
    self.output = selectors.DefaultSelector()
    self.processes: list[subprocess.Popen] = []
    self.stopping: list[subprocess.Popen] = []

  def run(self) -> int:
    """Starts the processes and waits for the last; the first failure's status, 128 + n for signal n."""
    port = free_port()
    try:
      for index, environment in enumerate(environments(self.options.processes, port)):
        try:
          self._start(index, environment)
        except OSError as error:
          say(f'error: {self.options.command[0]}: {error.strerror}')
          return 1
      while any(process.returncode is None for process in self.processes):
        self._look()
    finally:
      # And what it left behind: the data workers of one that was killed. scancel would try until it met the next start.
      for process in self.processes + self.stopping:
        kill_group(process)
      for key in [*self.output.get_map().values()]:
        self._copy(key, last=True)
    return self.failed or 0

  def _start(self, index: int, environment: dict[str, str]) -> None:
    many = self.options.processes > 1
    # A group of its own: a terminal's Ctrl-C arrives once, through here, and what is left can be swept up.
    process = subprocess.Popen(
        self.options.command, env=os.environ | environment, process_group=0, preexec_fn=_end_with_parent,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if many else None, stderr=subprocess.PIPE if many else None)
    self.processes.append(process)
    if many:
      for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        os.set_blocking(pipe.fileno(), False)
        self.output.register(pipe, selectors.EVENT_READ, Prefixed(f'[{index}] '.encode(), out.buffer))

  def _look(self) -> None:
    """One look: copies output, notes who ended, passes signals on, kills after the grace time."""
    for key, _ in self.output.select(TICK):
      self._copy(key)
    statuses = [128 - status if status < 0 else status for p in self.processes if (status := p.poll())]
    if statuses and self.failed is None:
      # At one look nobody knows which came first: rather a start too many than a run that ends for its neighbour.
      self.failed = next((status for status in statuses if status not in FINAL), statuses[0])
      self._tell(signal.SIGTERM)
    while self.passed_on < len(self.signals.seen):
      number = self.signals.seen[self.passed_on]
      self.passed_on += 1
      if not self.options.stop:
        self._tell(signal.SIGTERM if number == signal.SIGHUP else number)
      elif self.passed_on == 1:
        self._set_deadline()
        self.stopping.append(subprocess.Popen(self.options.stop, shell=True, process_group=0))
    if time.monotonic() > self.deadline:
      self.deadline = float('inf')
      say(f'not ended {self.options.grace:g} s after they were told to: killed')
      for process in self.processes:
        kill_group(process)

  def _tell(self, number: int) -> None:
    self._set_deadline()
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)

  def _set_deadline(self) -> None:
    self.deadline = min(self.deadline, time.monotonic() + self.options.grace)

  def _copy(self, key: selectors.SelectorKey, last: bool = False) -> None:
    """Copies what a pipe holds now."""
    while text := _read(key.fileobj):
      key.data.write(text)
    if text == b'' or last:  # after the last process a grandchild may still hold the pipe
      key.data.end()
      self.output.unregister(key.fileobj)
      key.fileobj.close()


def _read(pipe: BinaryIO) -> bytes | None:
  try:
    return os.read(pipe.fileno(), 1 << 16)
  except BlockingIOError:
    return None


class Prefixed:
  """Writes whole lines with a prefix; a progress bar's end with a carriage return."""

  def __init__(self, prefix: bytes, out: BinaryIO):
    self.prefix, self.out, self.rest = prefix, out, b''

  def write(self, text: bytes) -> None:
    *lines, self.rest = re.split(rb'(?<=[\r\n])', self.rest + text)
    self.out.write(b''.join(self.prefix + line for line in lines))
    self.out.flush()

  def end(self) -> None:
    if self.rest:
      self.write(b'\n')


def _end_with_parent() -> None:
  """In the child: SIGTERM when this program dies, were it by SIGKILL; two trainings in one folder would follow."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def kill_group(process: subprocess.Popen) -> None:
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass


def say(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
