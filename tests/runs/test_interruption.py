"""What stops a run from outside or within: signals and notices, numbers that are not finite, a store that is full."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden_step import DIMS, TINY, replaced, write_teacher

from lmspt_jax.checkpoint import CheckpointStore, read
from lmspt_jax.cli.main import main
from lmspt_jax.data import pipeline
from lmspt_jax.errors import LmsptError
from lmspt_jax.metrics import mean
from lmspt_jax.training import interruption, loop, nonfinite, setup
from lmspt_jax.training.interruption import StopRequest
from lmspt_jax.training.state import Experiment

CONFIG = replaced(
    TINY, train__num_steps=6, train__checkpoint_every=2, data__crop_seconds=0.2, data__batch_size=2,
    discriminator__fft_sizes=(), loss__mel_bins=(20,), loss__mel_windows=(256,), model__shared_encoder=True,
    model__encoder_strides=(320,), model__decoder_rates=(320,), model__resynthesis_rates=(320,),
    model__semantic__data_init=False, model__acoustic__data_init=False)
ENOUGH = 30.0  # seconds


def wait_for(condition) -> None:
  end = time.monotonic() + ENOUGH
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


# ---------------------------------------------------------------- requests to stop


class MetadataServer:
  """A metadata server on loopback: values with etags, and requests that wait until their etag is an old one."""

  def __init__(self):
    self.values = {'preempted': 'FALSE', 'maintenance-event': 'NONE'}
    self.status = 200  # of every answer
    self.waiting, self.asked = set(), 0
    self._changed = threading.Condition()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):

      def do_GET(self):
        outer.answer(self)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.daemon_threads = True
    self.address = f'127.0.0.1:{self._server.server_address[1]}'
    threading.Thread(target=self._server.serve_forever, name='metadata-server', daemon=True).start()

  def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
    url = urlsplit(request.path)
    query, key = parse_qs(url.query), url.path.removeprefix('/computeMetadata/v1/instance/')
    with self._changed:
      self.asked += 1
      allowed = request.headers.get('Metadata-Flavor') == 'Google' and query['wait_for_change'] == ['true']
      if self.status == 200 and allowed and key in self.values:
        self.waiting.add(key)
        self._changed.wait_for(lambda: query['last_etag'] != [self._etag(key)], timeout=float(query['timeout_sec'][0]))
        self.waiting.discard(key)
      status = self.status if allowed else 403
      if status == 200 and key not in self.values:
        status = 404
      body = self.values.get(key, '').encode() if status == 200 else b'TRUE'  # what an error page says is no value
    with contextlib.suppress(OSError):
      request.send_response(status)
      request.send_header('ETag', self._etag(key))
      request.end_headers()
      request.wfile.write(body)

  def set(self, key: str, value: str) -> None:
    with self._changed:
      self.values[key] = value
      self._changed.notify_all()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def _etag(self, key: str) -> str:
    return hashlib.sha256(self.values.get(key, '').encode()).hexdigest()[:16]


@pytest.fixture
def server(monkeypatch):
  server = MetadataServer()
  monkeypatch.setenv('GCE_METADATA_HOST', server.address)
  monkeypatch.setattr(interruption, '_PAUSE', 0.01)
  yield server
  server.close()


def watches() -> list[str]:
  return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith('lmspt-'))


@pytest.mark.parametrize('key, value', [
    ('preempted', 'TRUE'), ('maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE')])
def test_a_notice_is_seen_and_no_thread_is_left(server, key, value):
  with StopRequest() as stop:
    wait_for(lambda: server.waiting == {'preempted', 'maintenance-event'})
    assert not stop.requested and stop.reason == ''
    server.set('maintenance-event', 'MIGRATE_ON_HOST_MAINTENANCE')  # the machine lives through that
    time.sleep(0.1)
    assert not stop.requested
    server.set(key, value)
    wait_for(lambda: stop.requested)
    assert stop.reason == f'{key} = {value}, says the metadata server'
    assert len(watches()) == 1  # the other one waits on
    start = time.monotonic()
  assert watches() == [] and time.monotonic() - start < 2


def test_a_metadata_server_that_fails_is_asked_again(server):
  server.status = 503
  with StopRequest() as stop:
    wait_for(lambda: server.asked > 6)
    assert not stop.requested
    server.status = 200
    server.set('preempted', 'TRUE')
    wait_for(lambda: stop.requested)
  assert watches() == []


def test_a_metadata_server_that_is_not_there(monkeypatch, caplog):
  monkeypatch.setenv('GCE_METADATA_HOST', '127.0.0.1:1')
  monkeypatch.setattr(interruption, '_PAUSE', 0.01)
  with StopRequest() as stop:
    wait_for(lambda: len(caplog.records) >= 2)
    time.sleep(0.2)
    assert len(caplog.records) == 2  # one for each key, however often it is tried
    assert 'metadata server 127.0.0.1:1: no answer for ' in caplog.text
  assert watches() == [] and not stop.requested


def test_an_unknown_key_is_asked_for_once(server):
  del server.values['preempted']
  with StopRequest():
    wait_for(lambda: server.waiting == {'maintenance-event'} and watches() == ['lmspt-maintenance-event'])


@pytest.mark.parametrize('product, found', [
    ('Google Compute Engine\n', '169.254.169.254'), ('Google\n', '169.254.169.254'), ('KVM\n', None), (None, None)])
def test_only_machines_of_google_cloud_are_asked(monkeypatch, tmp_path, product, found):
  monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
  monkeypatch.setattr(interruption, '_PRODUCT_NAME', tmp_path / 'product_name')
  if product is not None:
    (tmp_path / 'product_name').write_text(product)
  assert interruption.metadata_server() == found
  if found is None:
    with StopRequest():
      assert watches() == []


def test_sigterm_is_noted_however_often_it_comes(monkeypatch):
  monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as stop:
    assert not stop.requested
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and stop.reason == 'SIGTERM'
  assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- the tiny experiment


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('config')
  config = replaced(CONFIG, teacher__checkpoint=write_teacher(folder / 'teacher'))
  path = folder / 'tiny.py'
  path.write_text(f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({config!r})\n')
  return path


@pytest.fixture
def train(config_file, tmp_path, capsys):
  """(*arguments, workdir) -> (exit status, stdout, stderr)."""

  def run(*arguments, workdir=tmp_path / 'run'):
    status = main(['train', f'--config={config_file}', f'--workdir={workdir}', *arguments])
    return status, *capsys.readouterr()

  return run


def rows(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


@pytest.fixture
def stub_step(monkeypatch):
  """Has the loop run a step that compiles at once. It counts in the generator's place what it has learnt, and skips
  the steps that are in the set it returns; `make_train_step` promises the same."""
  bad = set()

  def make_train_step(experiment, shardings):
    def step(state, teacher_params, batch):
      number = state.step + 1
      skipped = jnp.any(number == jnp.asarray(sorted(bad) or [0]))
      weight = jnp.where(skipped, 0.0, 1.0)
      found = {name: mean(jnp.ones(()), weight) for name in ('loss/mel', 'loss/distillation', 'loss/discriminator')}
      found |= {f'nonfinite/{name}': mean(jnp.where(skipped, 1.0, 0.0)) for name in ('loss/mel', 'gradient/generator')}
      found |= {'nonfinite/loss/distillation': mean(jnp.zeros(())), 'skipped': mean(jnp.where(skipped, 1.0, 0.0)),
                'audio_seconds': mean(jnp.ones(()))}
      learnt = jax.tree.map(lambda x: x + weight.astype(x.dtype), state.generator)
      return state.replace(step=number, generator=learnt,
                           skipped_in_row=jnp.where(skipped, state.skipped_in_row + 1, 0)), found
    return step

  monkeypatch.setattr(loop, 'make_train_step', make_train_step)
  return bad


def test_a_notice_stops_the_run_and_saves(train, stub_step, server, tmp_path):
  metrics = tmp_path / 'run' / 'metrics.jsonl'

  def later() -> None:
    wait_for(lambda: metrics.exists() and metrics.read_text().count('\n') >= 2)
    server.set('preempted', 'TRUE')

  thread = threading.Thread(target=later)
  thread.start()
  status, _, err = train('--config.train.num_steps=5000', '--config.train.checkpoint_every=5000')
  thread.join()
  assert status == 75, err
  assert 'preempted = TRUE, says the metadata server: stopped at step' in err.replace('\n', ' ')
  assert watches() == []


# ---------------------------------------------------------------- steps that are not finite


def test_skipped_steps_are_counted_and_listed(train, stub_step, tmp_path, caplog):
  stub_step |= {2, 3, 5}
  with caplog.at_level(logging.WARNING):
    status, _, err = train('--config.train.max_skipped_steps=3')
  assert status == 0, err
  workdir = tmp_path / 'run'
  first, second, third = listed = rows(workdir / 'skipped.jsonl')
  assert [row['step'] for row in listed] == [2, 3, 5]
  assert (first['examples'], second['examples'], third['examples']) == ([2, 3], [4, 5], [8, 9])
  assert first['what'] == ['gradient/generator', 'loss/mel']
  with pipeline.training_batches(CONFIG.data, sample_rate=16_000, crop_samples=CONFIG.crop_samples, seed=0,
                                 start_batch=1) as batches:
    batch = next(batches)
  source = pipeline.Mixture(CONFIG.data).sources[0]
  assert batch['index'].tolist() == [2, 3]
  assert first['records'] == [source.name(int(record)) for record in batch['record']]
  warnings = [record.getMessage() for record in caplog.records if 'skipped' in record.getMessage()]
  assert len(warnings) == 3 and warnings[0].startswith('step 2 skipped, not finite: gradient/generator, loss/mel;')
  logged = rows(workdir / 'metrics.jsonl')
  assert [row['skipped_steps'] for row in logged] == [0, 1, 2, 2, 3, 3]
  assert [row['loss/mel'] for row in logged] == [1.0, None, None, 1.0, None, 1.0]
  assert not any(name.startswith('nonfinite') or name == 'skipped' for name in logged[1])
  assert not (workdir / 'nonfinite').exists()


@pytest.mark.parametrize('limit, bad, stops_at, learnt', [
    (1, {3}, 3, 2), (2, {3, 4, 5, 6}, 4, 2), (2, {2, 3}, 3, 1), (3, {1, 2, 4, 5, 6}, 6, 1)])
def test_the_limit_stops_the_run(train, stub_step, tmp_path, limit, bad, stops_at, learnt):
  stub_step |= bad
  status, _, err = train(f'--config.train.max_skipped_steps={limit}', '--config.train.log_every=100')
  last = err.rstrip('\n').splitlines()[-1]
  begins = f'lmspt: error: {limit} steps in a row, the last one step {stops_at}, had losses or gradients'
  assert status == 1 and last.startswith(begins), err
  assert '(gradient/generator, loss/mel)' in last and f'--replay={stops_at}' in last
  workdir = tmp_path / 'run'
  dump = workdir / 'nonfinite' / f'step_{stops_at:08d}'
  assert str(dump) in last
  record = json.loads((dump / 'record.json').read_text())
  assert record['step'] == stops_at and record['what'] == ['gradient/generator', 'loss/mel']
  assert record['config']['name'] == 'tiny' and record['examples'] == [2 * stops_at - 2, 2 * stops_at - 1]
  state, _ = read(dump / 'state', abstract_state())
  assert (int(state['step']), int(state['skipped_in_row'])) == (stops_at - 1, limit - 1)
  # Exactly the steps before the first of the row were learnt, not one more that was under way.
  fresh = jax.tree.leaves(Experiment(CONFIG, DIMS).init().generator)
  for before, now in zip(fresh, jax.tree.leaves(state['generator']), strict=True):
    np.testing.assert_allclose(now, before + learnt, rtol=1e-5, atol=1e-5)


def test_a_run_that_resumes_goes_on_counting(train, stub_step, tmp_path):
  workdir = tmp_path / 'run'
  stub_step |= {1, 4, 5, 6}
  status, _, _ = train('--config.train.max_skipped_steps=3')
  assert status == 1 and checkpoints(workdir) == ['2', '4']
  assert [row['step'] for row in rows(workdir / 'skipped.jsonl')] == [1, 4, 5, 6]
  # The checkpoint of step 4 knows that this step was skipped; the rows after it come again.
  status, out, err = train('--config.train.max_skipped_steps=3')
  assert status == 1 and 'resuming at step 4\n' in out
  assert '3 steps in a row, the last one step 6' in err
  assert [row['step'] for row in rows(workdir / 'skipped.jsonl')] == [1, 4, 5, 6]
  status, _, err = train('--config.train.max_skipped_steps=4')
  assert status == 0, err
  assert [row['step'] for row in rows(workdir / 'skipped.jsonl')] == [1, 4, 5, 6]
  assert [row['skipped_steps'] for row in rows(workdir / 'metrics.jsonl')] == [1, 1, 1, 2, 3, 4]


def abstract_state() -> dict:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                      vars(Experiment(CONFIG, DIMS).abstract_state()))


def everything(folder: Path) -> dict[str, tuple[int, str]]:
  return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
          for path in folder.rglob('*') if path.is_file()}


def test_a_dumped_step_is_replayed(train, monkeypatch, tmp_path):
  class Spoilt:
    """The run's batches; one recording turns up with a broken sample from the third on."""

    def __init__(self, *arguments, start_batch, **options):
      self.batches, self.next = pipeline.training_batches(*arguments, start_batch=start_batch, **options), start_batch

    def __next__(self):
      batch = next(self.batches)
      if self.next >= 2:
        batch['audio'][1, 100] = np.nan
      self.next += 1
      return batch

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.batches.close()

  monkeypatch.setattr(setup, 'training_batches', Spoilt)
  monkeypatch.setattr(nonfinite, 'training_batches', Spoilt)
  workdir, limit = tmp_path / 'run', '--config.train.max_skipped_steps=2'
  status, _, err = train(limit)
  assert status == 1 and '2 steps in a row, the last one step 4, had losses or gradients' in err, err
  assert checkpoints(workdir) == ['2']
  # The real step skipped: what the dump holds is the state that step 2 left, but for the counts.
  dump = workdir / 'nonfinite' / 'step_00000004'
  state, _ = read(dump / 'state', abstract_state())
  store = CheckpointStore(workdir)
  saved, _ = store.restore(2, abstract_state())
  store.close()
  assert int(state.pop('step')) == 3 and int(saved.pop('step')) == 2
  assert int(state.pop('skipped_in_row')) == 1 and int(saved.pop('skipped_in_row')) == 0
  jax.tree.map(np.testing.assert_array_equal, state, saved)

  before = everything(workdir)
  status, out, err = train(limit, '--replay=4')
  assert status == 0, err
  shown = dict(line.strip().split(': ', 1) for line in out.splitlines() if ': ' in line)
  name = json.loads((dump / 'record.json').read_text())['records'][1]
  assert shown['inputs, examples'] == f'7 ({name})'
  assert shown['state before it'] == 'none'
  for loss in ('loss/mel', 'loss/generator', 'gradient/generator', 'gradient/discriminator'):
    assert loss in shown['losses']
  assert 'generator/tokenizer/' in shown['gradients'] and ' more' in shown['gradients']
  # The same with another field, and the broken sample mended: nothing is left of it.
  with np.load(dump / 'batch.npz') as file:
    batch = dict(file)
  assert np.isnan(batch['audio']).sum() == 1 and batch['audio'].shape == (2, CONFIG.crop_samples)
  assert train(limit, '--replay=4')[1] == out
  assert everything(workdir) == before
  np.savez(dump / 'batch.npz', **{**batch, 'audio': np.nan_to_num(batch['audio'])})
  status, out, err = train('--config.train.max_skipped_steps=5', '--replay=4')
  assert status == 0, err
  assert 'another config: train.max_skipped_steps: 2 there, 5 now' in out
  assert [line.split(': ')[1] for line in out.splitlines()[-4:]] == ['none'] * 4

  status, _, err = train(limit, '--replay=5')
  assert status == 1 and err.startswith('lmspt: error: --replay=5: no ') and 'there are step_00000004' in err


# ---------------------------------------------------------------- a store that takes no more

DRIVER = """
import ctypes, os, resource, shutil, sys
from pathlib import Path

import jax, jax.numpy as jnp

from lmspt_jax.checkpoint import CheckpointStore
from lmspt_jax.errors import LmsptError

workdir, how = Path(sys.argv[1]), sys.argv[2]
folder = workdir / 'checkpoints'
store = CheckpointStore(workdir, keep=2)
print('from', store.latest_step, flush=True)
state = {'a': jax.random.normal(jax.random.key(0), (300, 300)), 'b': jnp.zeros(())}
store.save(1, state, {})
store.wait()
if how == 'full':
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
elif how == 'read-only':
  folder.chmod(0o555)
elif how == 'gone':
  folder.rename(workdir / 'elsewhere')
  folder.touch()
try:
  store.save(2, state, {})
  store.wait()
except LmsptError as error:
  print('error:', error, file=sys.stderr)
  sys.exit(1)
finally:
  store.close()
"""


def without_override() -> None:
  """Runs in a child before its program: root, too, keeps to the permissions of files."""
  import ctypes
  libc = ctypes.CDLL(None)
  for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize('how, words', [
    (['full', '20000'], 'File too large'), (['full', '100'], 'File too large'), (['read-only'], 'Permission denied'),
    (['gone'], 'Not a directory')], ids=lambda value: '-'.join(value) if isinstance(value, list) else '')
def test_a_save_that_fails_says_so_once_and_keeps_the_one_before(repo, tmp_path, how, words):
  folder = tmp_path / 'checkpoints'

  def run(*how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', DRIVER, str(tmp_path), *how], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(repo)}, preexec_fn=without_override, timeout=120)

  done = run(*how)
  assert done.returncode == 1, done.stderr
  assert done.stderr.count('\n') == 1, done.stderr
  assert done.stderr.startswith(f'error: {folder / "2"}: this checkpoint could not be written (')
  assert words in done.stderr and 'earlier ones are whole; make room there' in done.stderr
  if how == ['read-only']:
    folder.chmod(0o755)
  elif how == ['gone']:
    folder.unlink()
    (tmp_path / 'elsewhere').rename(folder)
  assert '1' in checkpoints(tmp_path) and '2' not in checkpoints(tmp_path)

  done = run('well')
  assert (done.returncode, done.stdout, done.stderr) == (0, 'from 1\n', '')
  assert checkpoints(tmp_path) == ['1', '2']


def test_a_save_that_fails_in_the_background_stops_the_run(train, stub_step, monkeypatch, tmp_path):
  save, limits = CheckpointStore.save, resource.getrlimit(resource.RLIMIT_FSIZE)

  def save_on_a_full_disk(self, step, *arguments):
    if step < 4:
      return save(self, step, *arguments)
    self.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
      save(self, step, *arguments)
      wait_for(lambda: not self._checkpointer.is_saving_in_progress())
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

  monkeypatch.setattr(CheckpointStore, 'save', save_on_a_full_disk)
  status, _, err = train()
  assert status == 1 and 'Traceback' not in err, err
  assert f'lmspt: error: {tmp_path / "run" / "checkpoints" / "4"}: this checkpoint could not be written (' in err
  assert [row['step'] for row in rows(tmp_path / 'run' / 'metrics.jsonl')] == [1, 2, 3, 4]  # not later than that
  monkeypatch.setattr(CheckpointStore, 'save', save)
  status, out, err = train()
  assert status == 0 and 'resuming at step 2\n' in out, err
  assert checkpoints(tmp_path / 'run') == ['2', '4', '6']


def test_checkpoints_that_cannot_be_made(train, stub_step, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'checkpoints').touch()
  status, _, err = train()
  assert status == 1 and err.startswith(f'lmspt: error: {tmp_path / "run" / "checkpoints"}: can\'t be used ('), err
  assert not issubclass(LmsptError, OSError) and err.count('\n') == 1
