"""Notices that another host failed or is lost, and ends the process then."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the service's client has no public face

from lmspt_jax.errors import EXIT_FAULT, EXIT_RESUME

LOST_AFTER = 45.0  # seconds of silence after which a host is taken for lost: no call holds the interpreter so long
BEAT = 3.0  # seconds between signs of life
_GRACE = 5.0  # seconds for the main thread to end by itself, as when all hosts raise the same
_GOODBYE = 2 * _GRACE  # seconds that host 0, which carries all messages, stays for the others to end
_ENDED = 'lmspt/ended'
_GO_ON = 'start the same command again on all hosts to go on from the last checkpoint'
_handlers: list[Any] = []  # C calls them until the process has ended


def leave(status: int, line: str) -> NoReturn:
  """Ends the process from any thread: nothing is waited for, as the main thread may wait for a lost host."""
  sys.stdout.flush()
  os.write(2, f'\nlmspt: stopped: {" ".join(line.split())}\n'.encode())  # a progress bar leaves its line open
  os._exit(status)


class Watch(threading.Thread):
  """Shows the other hosts that this one lives, and ends the process when one of them has failed or is lost."""

  def __init__(self, client: Any, coordinator: str):
    super().__init__(name='lmspt-hosts', daemon=True)
    self._client, self._coordinator = client, coordinator
    self._me, self._count = distributed.global_state.process_id, distributed.global_state.num_processes
    self._stopping, self._failing = threading.Event(), threading.Event()
    self._heard = {}  # host -> (its last sign, when it came)
    self._status = EXIT_FAULT
    if self._me:
      _on_abort(self._aborted)

  def run(self) -> None:
    for beat in itertools.count():
      if self._stopping.is_set():
        return
      try:
        self._client.key_value_set(f'lmspt/beat/{self._me}', str(beat), allow_overwrite=True)
        if self._me == 0:
          self._look_for_lost()
        end = json.loads(self._client.blocking_key_value_get(_ENDED, round(BEAT * 1000)))
      except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' in str(error) or self._stopping.is_set():
          continue
        leave(EXIT_RESUME, self._lost_0)
      if end['host'] != self._me and end['status'] and not self._failing.wait(_GRACE):
        self._wave()
        leave(end['status'], end['text'])
      return

  def tell(self, status: int, text: str) -> None:
    """Has the other hosts end with `status` too, unless they end for something else already.

    This process then ends by itself, within _GRACE seconds: not with JAX's shutdown, nor with the threads of a save,
    all of which would wait for those that have just gone.
    """
    self._status = status
    self._failing.set()
    self._post(status, f'host {self._me} failed: {text}', lost=0)
    self._wave()
    atexit.register(self._end_quietly)
    late = threading.Timer(_GRACE, self._end_quietly)
    late.daemon = True
    late.start()

  def _end_quietly(self) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(self._status)

  def stop(self) -> None:
    """All is well: returns when the thread has ended."""
    self._stopping.set()
    if self._me == 0:
      self._client.key_value_set(_ENDED, json.dumps({'host': 0, 'status': 0, 'text': ''}))  # wakes all
    self.join()

  def _wave(self) -> None:
    """Lets host 0 know that it need not stay for this host."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # it may be gone
      self._client.key_value_set(f'lmspt/gone/{self._me}', '')

  def _post(self, status: int, text: str, lost: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or host 0 is gone: they know
      self._client.key_value_set(_ENDED, json.dumps({'host': self._me, 'status': status, 'text': text}))
    end = time.monotonic() + _GOODBYE
    while self._me == 0 and time.monotonic() < end:
      if len(self._client.key_value_dir_get('lmspt/gone/')) >= self._count - 1 - lost:
        return
      time.sleep(0.05)

  def _look_for_lost(self) -> None:
    now = time.monotonic()
    beats = dict(self._client.key_value_dir_get('lmspt/beat/'))
    for host in range(1, self._count):
      beat = beats.get(f'lmspt/beat/{host}')
      if host not in self._heard or self._heard[host][0] != beat:
        self._heard[host] = beat, now
      elif now - self._heard[host][1] > LOST_AFTER:
        text = f'host {host} of {self._count} is lost: no sign of it for {LOST_AFTER:g} s; {_GO_ON}'
        self._post(EXIT_RESUME, text, lost=1)
        leave(EXIT_RESUME, text)

  @property
  def _lost_0(self) -> str:
    return f'host 0 of {self._count} is lost: {self._coordinator} does not answer; {_GO_ON}'

  def _aborted(self) -> None:
    """JAX aborts the process at once when host 0 is gone; whatever else it aborts for is left to it."""
    if self._failing.is_set():
      time.sleep(_GRACE)  # the main thread is about to end, and has something to say
      self._end_quietly()
    host, _, port = self._coordinator.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    except OSError:
      leave(EXIT_RESUME, self._lost_0)


def _on_abort(action: Callable[[], None]) -> None:
  """Has `action` called by the thread that calls abort(); if it returns, the process ends by SIGABRT as it would.

  Python's own handlers run in the main thread between two bytecodes, which abort() does not wait for.
  """
  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handler(_: int) -> None:
    action()

  _handlers.append(handler)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
