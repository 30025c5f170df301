"""Requests to stop that come from outside: SIGTERM, and the notices of Google Cloud's machines.

A machine is taken for one of Google Cloud's if GCE_METADATA_HOST names a metadata server (the variable of Google's own
client libraries), or if the firmware's product name begins with "Google", as it does on TPU VMs and GKE's nodes; no
other machine is asked anything over the network. There, two keys of the metadata server are watched:

* `preempted` turns TRUE when a spot machine is about to be taken away
  (https://cloud.google.com/compute/docs/instances/create-use-preemptible#detecting_if_a_vm_was_preempted);
* `maintenance-event` turns TERMINATE_ON_HOST_MAINTENANCE ahead of a maintenance that the machine does not survive. The
  warning is given only to those who ask (https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice).
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

_NOTICES = {'preempted': 'TRUE', 'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE'}
_DEFAULT_SERVER = '169.254.169.254'  # an address, so that no name server has a say
_PRODUCT_NAME = Path('/sys/class/dmi/id/product_name')
_LONGEST_POLL = 60  # seconds that the server may hold a request when nothing changes
_CONNECT = 5.0  # seconds
_PAUSE = 1.0  # seconds between two requests, for servers that fail or don't wait
_log = logging.getLogger(__name__)


def metadata_server() -> str | None:
  """HOST or HOST:PORT of this machine's metadata server; None where it is no machine of Google Cloud."""
  if os.environ.get('GCE_METADATA_HOST'):
    return os.environ['GCE_METADATA_HOST']
  try:
    product = _PRODUCT_NAME.read_text()
  except OSError:
    return None
  return _DEFAULT_SERVER if product.startswith('Google') else None


class StopRequest:
  """Notes, within its `with`, that this process is to stop: from then on `reason` says why, and it is true.

  SIGTERM is only noted, however often it comes, so that nothing cuts a save short. To be used in the main thread.
  """

  def __init__(self):
    self.reason = ''
    self._watches: list[_Watch] = []

  @property
  def requested(self) -> bool:
    return bool(self.reason)

  def __enter__(self) -> StopRequest:
    self._previous = signal.signal(signal.SIGTERM, lambda *_: self._note('SIGTERM'))
    server = metadata_server()
    if server:
      self._watches = [_Watch(server, key, value, self._note) for key, value in _NOTICES.items()]
    for watch in self._watches:
      watch.start()
    return self

  def __exit__(self, *_: object) -> None:
    for watch in self._watches:
      watch.stop()
    signal.signal(signal.SIGTERM, self._previous)

  def _note(self, reason: str) -> None:
    self.reason = self.reason or reason


class _Watch(threading.Thread):
  """Waits until a key of the metadata server has a value, then calls `note`."""

  def __init__(self, server: str, key: str, value: str, note: Callable[[str], None]):
    super().__init__(name=f'lmspt-{key}', daemon=True)
    self._server, self._key, self._value, self._note = server, key, value, note
    self._stopping = threading.Event()
    self._lock = threading.Lock()
    self._socket: socket.socket | None = None  # that a request waits on

  def run(self) -> None:
    etag, warned = 'NONE', False  # no etag that the server has given: it answers at once
    while not self._stopping.is_set():
      try:
        status, value, etag = self._ask(etag)
      except (OSError, http.client.HTTPException) as error:
        if not warned and not self._stopping.is_set():
          _log.warning('metadata server %s: no answer for %s (%r), asking on', self._server, self._key, error)
        warned = True
      else:
        if status == HTTPStatus.OK and value == self._value:
          self._note(f'{self._key} = {value}, says the metadata server')
          return
        if status == HTTPStatus.NOT_FOUND:  # GKE's own metadata server does not know every key
          return
      self._stopping.wait(_PAUSE)

  def stop(self) -> None:
    """Returns when the thread has ended, whatever it waits for."""
    with self._lock:
      self._stopping.set()
      if self._socket is not None:
        with contextlib.suppress(OSError):  # it may be closed from the other side already
          self._socket.shutdown(socket.SHUT_RDWR)
    self.join()

  def _ask(self, etag: str) -> tuple[int, str, str]:
    """(status, value, its etag), as soon as the value is another than that of `etag`, or after a while."""
    connection = http.client.HTTPConnection(self._server, timeout=_CONNECT)
    with contextlib.closing(connection):
      connection.connect()
      with self._lock:
        if self._stopping.is_set():
          raise ConnectionAbortedError
        self._socket = connection.sock
      self._socket.settimeout(_LONGEST_POLL + _CONNECT)
      try:
        connection.request(
            'GET', f'/computeMetadata/v1/instance/{self._key}?wait_for_change=true&timeout_sec={_LONGEST_POLL}'
            f'&last_etag={quote(etag)}', headers={'Metadata-Flavor': 'Google'})
        response = connection.getresponse()
        return response.status, response.read().decode(errors='replace').strip(), response.headers.get('ETag', 'NONE')
      finally:
        with self._lock:
          self._socket = None
