"""Who runs a stage's tasks: processes of this machine, or a runner of Apache Beam.

A task is a number. All it makes are files, so nothing but its end (or its error) comes back, and any runner will do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from lmspt_jax.errors import LmsptError

Task = Callable[[int], None]
Runner = Callable[[Task, int], None]  # (task, how many numbers from 0)
_in_worker: Task


def find_runner(name: str, *, num_workers: int | None, beam_options: Sequence[str]) -> Runner:
  """The runner of a name: 'local', 'direct', or any that Beam knows. Raises LmsptError saying what is missing."""
  if name == 'local':
    if beam_options:
      raise LmsptError(f'{beam_options[0]}: is for Beam, and --runner=local does without; choose another --runner')
    return functools.partial(run_local, num_workers=num_workers or os.cpu_count() or 1)
  if importlib.util.find_spec('apache_beam') is None:
    raise LmsptError(f'--runner={name}: Apache Beam is not installed; pip install -e \'.[prepare]\' in an '
                     'environment of its own, or use --runner=local')
  from lmspt_jax.data.prepare import beam_runner
  return beam_runner.find(name, num_workers=num_workers, options=beam_options)


def run_local(task: Task, count: int, *, num_workers: int) -> None:
  """Runs a task's numbers in `num_workers` spawned processes; in this one if that is 1.

  The processes end with this one, however it ends. Raises what a task raised, once all have stopped.
  """
  if min(num_workers, count) <= 1:
    for number in range(count):
      task(number)
    return
  context = multiprocessing.get_context('spawn')
  watched, lifeline = context.Pipe(duplex=False)
  executor = concurrent.futures.ProcessPoolExecutor(min(num_workers, count), context, _start, (task, watched))
  try:
    with _closing(executor, lifeline):
      # Ctrl-C reaches them too; this process says what to do. What is blocked here is blocked in them from birth.
      before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      try:
        futures = [executor.submit(_run, number) for number in range(count)]
      finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
      for future in concurrent.futures.as_completed(futures):
        future.result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise LmsptError('a worker process died: if memory ran out, use a smaller --num_workers; a script that calls '
                     'prepare() needs "if __name__ == \'__main__\':"') from error
  finally:
    watched.close()


@contextlib.contextmanager
def _closing(executor: concurrent.futures.Executor, lifeline: Connection) -> Iterator[None]:
  """Waits for the workers on a good end; on any other they stop where they are."""
  try:
    yield
    executor.shutdown()
  finally:
    lifeline.close()
    executor.shutdown(cancel_futures=True)


def _start(task: Task, watched: Connection) -> None:
  global _in_worker
  _in_worker = task
  threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched: Connection) -> None:
  watched.poll(None)  # nothing is ever sent: this ends when the other end is closed, by hand or by death
  os._exit(1)


def _run(number: int) -> None:
  _in_worker(number)


class Progress:
  """A bar on stderr that counts the files that tasks leave behind, so it is the same for every runner."""

  def __init__(self, title: str, count: int, done: Callable[[], tuple[int, float]], *, show: bool):
    self._done, self._stop = done, threading.Event()
    self._thread: threading.Thread | None = None
    self._bar: Any = None
    if show:
      from tqdm import tqdm
      self._bar = tqdm(total=count, desc=title, unit='file', dynamic_ncols=True)
      self._thread = threading.Thread(target=self._watch, daemon=True)

  def _watch(self) -> None:
    while not self._stop.wait(1.0):
      self._update()

  def _update(self) -> None:
    count, seconds = self._done()
    self._bar.n = min(count, self._bar.total)
    self._bar.set_postfix_str(f'{seconds / 3600:.2f} h of audio')

  def __enter__(self) -> Progress:
    if self._thread:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._thread:
      self._stop.set()
      self._thread.join()
      self._update()
      self._bar.close()
