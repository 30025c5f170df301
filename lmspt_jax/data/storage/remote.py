"""Requests to object stores through fsspec: one filesystem a process, retries with back-off, errors in one line.

Credentials, endpoints and regions come from the environment, as the backends (s3fs, gcsfs, aiohttp) take them.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lmspt_jax.data.faults import AudioError
from lmspt_jax.errors import LmsptError

T = TypeVar('T')
ATTEMPTS = 4
_WAIT = 0.25  # seconds before the second attempt; doubles
_EXTRAS = {  # scheme -> package it needs, extra of this package
  's3': ('s3fs', 's3'), 's3a': ('s3fs', 's3'), 'gs': ('gcsfs', 'gcs'), 'gcs': ('gcsfs', 'gcs'),
  'http': ('aiohttp', 'http'), 'https': ('aiohttp', 'http'), 'memory': ('fsspec', 'http'), 'file': ('fsspec', 'http'),
}
_ERRORS = (('aiohttp', 'ClientError'), ('botocore.exceptions', 'BotoCoreError'),
           ('botocore.exceptions', 'ClientError'), ('gcsfs.retry', 'HttpError'),
           ('google.auth.exceptions', 'GoogleAuthError'))
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the cache folder, not of the store

_filesystems: dict[tuple[int, str], Any] = {}
_lock = threading.Lock()


def filesystem(url: str) -> tuple[Any, str]:
  """(the process's fsspec filesystem for the URL's scheme, the path in it).

  Raises LmsptError: an unknown scheme, a backend that is not installed.
  """
  scheme = scheme_of(url)
  if scheme not in _EXTRAS:
    raise LmsptError(f'{url}: unknown scheme {scheme!r}; use a local path, gs://, s3://, http:// or https://')
  key = os.getpid(), scheme
  with _lock:
    if key not in _filesystems:
      _filesystems[key] = _make(scheme, url)
    made = _filesystems[key]
  return made, made._strip_protocol(url)


def scheme_of(url: str) -> str:
  return url.partition('://')[0].lower()


def _make(scheme: str, url: str) -> Any:
  package, extra = _EXTRAS[scheme]
  try:
    import fsspec
    backend = fsspec.get_filesystem_class(scheme)
  except ImportError as error:
    raise LmsptError(f'{url}: needs {package}; pip install {package}, or "lmspt_jax[{extra}]"') from error
  options: dict[str, Any] = {}
  if extra == 's3':
    options['config_kwargs'] = {'retries': {'max_attempts': 0}, 'max_pool_connections': 64}
  elif extra == 'gcs':
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs a traceback for what `call` says in a line
  elif scheme in ('http', 'https'):
    import aiohttp
    options['client_kwargs'] = {'timeout': aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}
  made = backend(skip_instance_cache=True, use_listings_cache=False, **options)
  if extra == 's3':
    made.retries = 1  # `call` is the one that retries: three layers of five attempts would take minutes to give up
  return made


def call(url: str, request: Callable[[Any, str], T], *, name: str) -> T:
  """`request(filesystem, path)`, tried again when it fails for a while. `name` is what errors call the file.

  Raises:
    AudioError: missing; unreachable (also: access denied).
    LmsptError: the disk that `request` writes to is full; a backend that is not installed.
  """
  fs, path = filesystem(url)
  attempts = 1 if scheme_of(url) in ('gs', 'gcs') else ATTEMPTS  # gcsfs retries by itself, for half a minute
  for attempt in range(attempts):
    if attempt:
      time.sleep(_WAIT * 2 ** (attempt - 1) * (0.75 + random.random() / 2))
    try:
      return request(fs, path)
    except _backend_errors() as error:
      if isinstance(error, OSError) and error.errno in _LOCAL:
        raise LmsptError(f'{url}: no room to cache it ({error.strerror}); set LMSPT_CACHE to another folder') from error
      last, status = error, _status(error)
    if status == 404:
      raise AudioError(f'{name}: no such file; check the path', 'missing') from last
    if status in (401, 403):
      break
  cause = ' '.join(str(last.__cause__ or last).split())[:160] or type(last).__name__
  raise AudioError(f'{name}: can\'t be reached ({cause}); check the network, the address and the credentials',
                   'unreachable') from last


def _backend_errors() -> tuple[type[BaseException], ...]:
  """What the backends loaded so far raise for a request that failed."""
  found = [getattr(sys.modules[module], name) for module, name in _ERRORS if module in sys.modules]
  return OSError, ValueError, *found


def _status(error: BaseException) -> int:
  """The HTTP status that an error stands for, 0 where it stands for none."""
  cause = error.__cause__  # fsspec says "not found" of every URL whose headers it could not get
  if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
    found = getattr(cause, 'response', None)
    if not isinstance(found, dict):
      return getattr(cause, 'status', 0)
    return 404
  if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
    return 404
  if isinstance(error, PermissionError) or type(error).__name__ in ('NoCredentialsError', 'DefaultCredentialsError'):
    return 403
  return getattr(error, 'status', 0)
