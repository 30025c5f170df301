"""Joining the processes of a run, and parting."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed  # the service's client has no public face

from lmspt_jax.errors import EXIT_FAULT, EXIT_KEYBOARD, EXIT_RESUME, Interrupted, LmsptError
from lmspt_jax.hosts import watch
from lmspt_jax.hosts.agreement import gather
from lmspt_jax.hosts.place import Place, find_place

_joined: watch.Watch  # as JAX's, of which a process has one
PATIENCE = 300.0  # seconds that hosts wait for each other at the start
_MORE = 10.0  # seconds past watch.LOST_AFTER, in which a lost host is certain to be noticed
# How XLA's errors begin that may come from a collective.
_STATUS = re.compile('(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ')


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
          patience: float = PATIENCE) -> contextlib.AbstractContextManager[None]:
  """Joins this process with the others of the run until the end of the `with` that it is used in.

  Where the values are not given, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are read;
  without these, a Slurm step of several tasks and a TPU slice of several hosts are recognised; else the process is
  alone, and nothing is started. To be called before JAX has looked for its devices.

  When another host fails, or nothing is heard from it for watch.LOST_AFTER seconds, this process ends there and then:
  with one line on stderr, and with that host's status or EXIT_RESUME. If it fails itself, it tells the others.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: how many processes train together.
    process_id: which of them this is, from 0.
    patience: seconds to wait for the others; when they are over, the process ends with EXIT_RESUME.

  Raises:
    LmsptError: some of the values are missing or wrong.
  """
  place = find_place(coordinator, num_processes, process_id)
  if place is None:
    return contextlib.nullcontext()
  _join(place, patience)
  return _Joined()


def fail(text: str) -> NoReturn:
  """From any thread of one of several hosts: ends this process and the others with EXIT_FAULT and one line."""
  _joined.tell(EXIT_FAULT, text)
  watch.leave(EXIT_FAULT, text)


class _Joined(contextlib.AbstractContextManager):
  """The time that the hosts spend together."""

  def __enter__(self) -> None:
    global _joined
    self._watch = watch.Watch(distributed.global_state.client, distributed.global_state.coordinator_address)
    self._watch.start()
    _joined = self._watch

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    if kind is None or issubclass(kind, Interrupted):  # all hosts alike
      gather('done', '')  # whoever comes first still listens to the others
      self._watch.stop()
      jax.distributed.shutdown()
    elif issubclass(kind, KeyboardInterrupt):
      self._watch.tell(EXIT_KEYBOARD, 'interrupted from the keyboard')
    else:
      if _STATUS.match(str(error)):  # often for want of a host, of which the watch will be sure soon
        time.sleep(watch.LOST_AFTER + _MORE)
      self._watch.tell(EXIT_FAULT, str(error) if issubclass(kind, LmsptError) else f'{kind.__name__}: {error}')


def _join(place: Place, patience: float) -> None:
  if place.process_id == 0:
    _check_free(place.coordinator)
  # The service's client does not raise: when its own time is over, it aborts the process with a stack trace.
  where = place.coordinator or 'the address that was detected'
  late = threading.Timer(patience, watch.leave, (
      EXIT_RESUME, f'not all processes came together within {patience:g} s; see that process 0 runs and can be reached '
      f'at {where}, and that all others were started'))
  late.daemon = True
  late.start()
  # SIGTERM is dealt with in training alone; JAX's own handler would swallow it.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
        place.coordinator, place.num_processes, place.process_id, cluster_detection_method=place.detection,
        initialization_timeout=round(patience) + 60, shutdown_timeout_seconds=60)
  finally:
    late.cancel()


def _check_free(coordinator: str) -> None:
  """Raises LmsptError where another program listens: JAX may crash there."""
  port = int(coordinator.rpartition(':')[2])
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise LmsptError(f"--coordinator={coordinator}: can't listen at port {port} ({error.strerror}); "
                     'use another') from error
