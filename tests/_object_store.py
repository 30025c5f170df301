"""Servers on loopback for the tests of stores: files over http, as Google's storage, and moto's S3 behind a relay.

All count requests and bytes, and fail on demand.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CREDENTIALS = {'AWS_ACCESS_KEY_ID': 'testing', 'AWS_SECRET_ACCESS_KEY': 'testing', 'AWS_DEFAULT_REGION': 'us-east-1'}


class Server(ThreadingHTTPServer):
  """Answers with `answer(method, path, headers, body)` -> (status, headers, body)."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, answer):
    self.answer, self.failures, self.failure, self.gone, self.requests, self.sent = answer, 0, 503, False, [], 0
    self.lock = threading.Lock()
    super().__init__(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server_address[1]}'
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  def forget(self):
    """Counts from here."""
    self.requests, self.sent = [], 0

  def close(self):
    self.gone = True  # for the connections that are kept alive
    self.shutdown()
    self.server_close()


class Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def handle_any(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    server = self.server
    with server.lock:
      server.requests.append((self.command, unquote(self.path), self.headers.get('Range', '')))
      if server.gone:
        self.close_connection = True
        return
      failing = server.failures > 0
      server.failures -= failing
    status, headers, content = (server.failure, {}, b'') if failing else server.answer(
      self.command, self.path, self.headers, body)
    self.send_response(status)
    headers = {name.lower(): value for name, value in headers.items()}
    for name, value in {'content-length': len(content), **headers}.items():
      if name not in ('connection', 'transfer-encoding', 'server', 'date'):
        self.send_header(name, str(value))
    self.end_headers()
    if self.command != 'HEAD':
      server.sent += len(content)
      with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
        self.wfile.write(content)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

  def log_message(self, *_):
    pass


def part_of(file: Path, headers) -> tuple[int, dict[str, str], bytes]:
  """The answer with the bytes that a request's headers ask for."""
  wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', headers.get('Range', ''))
  if not wanted:
    return 200, {}, file.read_bytes()
  first, last = map(int, wanted.groups())
  with open(file, 'rb') as opened:
    opened.seek(first)
    return 206, {'content-range': f'bytes {first}-{last}/{file.stat().st_size}'}, opened.read(last + 1 - first)


def serve_folder(folder: Path, ranges: bool = True) -> Server:
  """The files of a folder; with `ranges` False whole ones only, as python -m http.server does."""

  def answer(method, path, headers, _):
    file = folder / unquote(urlsplit(path).path).lstrip('/')
    if not file.is_file():
      return 404, {}, b''
    found = file.stat()
    tag = {'ETag': f'"{found.st_size}-{found.st_mtime_ns}"'}
    if method == 'HEAD':
      return 200, {**tag, 'content-length': found.st_size}, b''
    status, more, content = part_of(file, headers if ranges else {})
    return status, {**tag, **more}, content

  return Server(answer)


def serve_gcs(folder: Path) -> Server:
  """The folders in a folder as buckets, by the part of Google's JSON interface that reads."""

  def described(file: Path, bucket: str) -> dict[str, str]:
    found = file.stat()
    return {'kind': 'storage#object', 'name': file.relative_to(folder / bucket).as_posix(), 'bucket': bucket,
            'size': str(found.st_size), 'etag': f'e{found.st_mtime_ns}'}

  def answer(method, path, headers, _):
    parts = urlsplit(path)
    matched = re.fullmatch(r'/(download/)?storage/v1/b/([^/]+)/o(?:/(.+))?', parts.path)
    if not matched:
      return 404, {}, b'{}'
    download, bucket, name = matched.groups()
    if name is None:
      prefix = parse_qs(parts.query).get('prefix', [''])[0]
      items = [described(file, bucket) for file in sorted((folder / bucket).rglob('*')) if file.is_file()]
      items = [item for item in items if item['name'].startswith(prefix)]
      return 200, {'content-type': 'application/json'}, json.dumps({'items': items}).encode()
    file = folder / bucket / unquote(name)
    if not file.is_file():
      return 404, {}, b'{}'
    if not download:
      return 200, {'content-type': 'application/json'}, json.dumps(described(file, bucket)).encode()
    return part_of(file, headers)

  return Server(answer)


@functools.cache
def s3() -> Server:
  """The relay to a moto server of this process; sets the environment that s3fs and boto3 take it from."""
  from moto.server import ThreadedMotoServer
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  moto = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  moto.start()
  host, port = moto.get_host_and_port()

  def answer(method, path, headers, body):
    with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
      connection.request(method, path, body, dict(headers))
      response = connection.getresponse()
      return response.status, dict(response.getheaders()), response.read()

  relay = Server(answer)
  os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=relay.url)
  return relay


def upload(folder: Path, bucket: str) -> str:
  """Puts the files of a folder into a new bucket; returns its URL."""
  import boto3
  s3().failures = 0  # an earlier test may have left it failing
  client = boto3.client('s3')
  client.create_bucket(Bucket=bucket)
  for file in sorted(folder.rglob('*')):
    if file.is_file():
      client.put_object(Bucket=bucket, Key=file.relative_to(folder).as_posix(), Body=file.read_bytes())
  return f's3://{bucket}'
