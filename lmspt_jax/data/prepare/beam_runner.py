"""Stages as Beam pipelines. Imported only where Beam is installed and wanted."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import PipelineRunner, create_runner
from apache_beam.transforms.environments import EmbeddedPythonEnvironment, SubprocessSDKEnvironment

from lmspt_jax.errors import LmsptError, nearest

Task = Callable[[int], None]
_DIRECT = ('direct', 'directrunner')
_MARK = re.compile(r'lmspt-error:("(?:[^"\\]|\\.)*")')


def find(name: str, *, num_workers: int | None, options: Sequence[str]) -> Callable[[Task, int], None]:
  """The runner of that name; raises LmsptError if Beam has none, or lacks what it needs."""
  if name.lower() in _DIRECT:
    return functools.partial(_run_direct, num_workers=num_workers or os.cpu_count() or 1, options=options)
  known = {runner.lower(): runner for runner in StandardOptions.KNOWN_RUNNER_NAMES}
  found = known.get(name.lower()) or known.get(f'{name.lower()}runner')
  if found is None:
    raise LmsptError(f'--runner={name}: {nearest(name, ["local", "direct", *known.values()])}')
  if num_workers is not None:
    raise LmsptError(f'--num_workers={num_workers}: is for --runner=local and direct; give {found} its own option '
                     'after "--"')
  try:
    create_runner(found)
  except ImportError as error:
    raise LmsptError(f'--runner={name}: {" ".join(str(error).split())}') from error
  return functools.partial(_run_elsewhere, name=found, options=options)


def _run_elsewhere(task: Task, count: int, *, name: str, options: Sequence[str]) -> None:
  try:
    _run(task, count, create_runner(name), PipelineOptions(list(options)))
  except (RuntimeError, ValueError) as error:  # options it lacks, a service that is not there
    raise LmsptError(f'--runner={name}: {" ".join(str(error).split())[:1000]}') from error


class _DoTask(beam.DoFn):
  def __init__(self, task: Task):
    self._task = task

  def process(self, number: int) -> Iterable[int]:
    try:
      self._task(number)
    except LmsptError as error:  # runners keep an exception's text and lose its type
      raise RuntimeError(f'lmspt-error:{json.dumps(str(error))}') from error
    return ()


def _run(task: Task, count: int, runner: PipelineRunner, options: PipelineOptions) -> None:
  """Runs a task's numbers. Raises LmsptError if one did."""
  try:
    with beam.Pipeline(runner=runner, options=options) as pipeline:
      _ = (pipeline | 'Numbers' >> beam.Create(range(count)) | beam.Reshuffle() | 'Task' >> beam.ParDo(_DoTask(task)))
  except RuntimeError as error:
    found = _MARK.search(str(error))
    if found:
      raise LmsptError(json.loads(found[1])) from error
    if 'KeyboardInterrupt' in str(error):  # in a task of this process
      raise KeyboardInterrupt from error
    raise


# ---------------------------------------------------------------- the direct runner


def _run_direct(task: Task, count: int, *, num_workers: int, options: Sequence[str]) -> None:
  """On Beam's in-process portable runner; the one it calls DirectRunner would first fetch another from the network."""
  logging.getLogger('apache_beam').setLevel(logging.CRITICAL)  # of this process: faults come as exceptions
  parsed = PipelineOptions([f'--direct_num_workers={num_workers}', '--default_sdk_harness_log_level=ERROR', *options])
  encoded = JobServiceHandle.encode_pipeline_options(parsed.get_all_options())
  with tempfile.TemporaryDirectory() as folder, _stopping_workers(Path(folder)):
    # A Ctrl-C reaches a whole terminal; the workers leave it to this process, which finds them by their ids.
    command = (f'trap "" INT; echo > {shlex.quote(folder)}/$$; '
               f'exec {shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main')
    environment = EmbeddedPythonEnvironment.default() if num_workers == 1 else SubprocessSDKEnvironment(command)
    provision = fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    _run(task, count, fn_runner.FnApiRunner(default_environment=environment, provision_info=provision), parsed)


@contextlib.contextmanager
def _stopping_workers(folder: Path) -> Iterator[None]:
  """Ends the run at once on Ctrl-C, and when a worker process dies: Beam would wait for it for ever.

  Args:
    folder: holds a file per worker, named by its process id.
  """
  deaths: list[str] = []
  stopped = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
    yield
    return

  def stop(number: int, frame: FrameType | None) -> None:
    stopped.set()
    for path in folder.iterdir():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(path.name), signal.SIGKILL)
    raise KeyboardInterrupt

  def thread_failed(args: threading.ExceptHookArgs) -> None:
    if stopped.is_set():  # what fails now, fails because of that
      return
    if args.thread is None or args.thread.name != 'run_worker':
      usual_hook(args)
      return
    deaths.append(str(args.exc_value))
    stopped.set()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it, where a raised exception would wait

  usual_hook, threading.excepthook = threading.excepthook, thread_failed
  usual_handler = signal.signal(signal.SIGINT, stop)
  try:
    yield
  except KeyboardInterrupt as interrupt:
    if deaths:
      raise LmsptError(f'a worker process died ({deaths[0]}); if memory ran out, use a smaller '
                       '--num_workers') from interrupt
    raise
  finally:
    signal.signal(signal.SIGINT, usual_handler)
    threading.excepthook = usual_hook
