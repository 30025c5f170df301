"""`lmspt prepare` on Apache Beam: the same bytes as without. `make test-prepare` runs this where Beam is installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import soundfile
from _small_corpus import children, files, signalled_prepare, small_folder

from lmspt_jax.cli.main import main
from lmspt_jax.data.prepare import prepare
from lmspt_jax.errors import LmsptError

SPEECH = 'package:speech_sample'
OPTIONS = ('--num_shards=9', '--sample_rate=96000')  # a rate that keeps the encoder busy for a while


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """What the runner that needs no Beam makes."""
  out = tmp_path_factory.mktemp('local')
  prepare(SPEECH, out, num_shards=9, sample_rate=96_000, num_workers=1, runner='local', progress=False)
  return files(out)


@pytest.mark.parametrize('workers', [1, 2])
def test_direct_runner_makes_the_same_bytes(tmp_path, local, monkeypatch, workers):
  looked_up, getaddrinfo = [], socket.getaddrinfo

  def recorded(host, *arguments, **options):
    looked_up.append(host)
    return getaddrinfo(host, *arguments, **options)
  monkeypatch.setattr(socket, 'getaddrinfo', recorded)
  prepare(SPEECH, tmp_path, num_shards=9, sample_rate=96_000, num_workers=workers, runner='direct', progress=False)
  assert files(tmp_path) == local
  assert not set(looked_up) - {'localhost', '127.0.0.1'}  # what Beam calls DirectRunner would fetch another runner


def test_command_line_takes_the_direct_runner_by_itself(tmp_path, local, capsys):
  argv = ['prepare', f'--source={SPEECH}', f'--out={tmp_path}', *OPTIONS, '--num_workers=1', '--',
          '--direct_runner_bundle_repeat=0']
  assert main(argv) == 0
  assert 'train: 54 utterances' in capsys.readouterr().out
  assert files(tmp_path) == local


def test_faults_and_long_recordings_are_the_same(tmp_path):
  rows = small_folder(tmp_path / 'in')
  sound = [soundfile.read(tmp_path / 'in' / row['path'], dtype='int16')[0] for row in rows]
  soundfile.write(tmp_path / 'in' / 'audio' / 'silent.wav', 0 * sound[0], 16_000)
  with open(tmp_path / 'in' / 'manifest.jsonl', 'a') as file:
    file.writelines(json.dumps({'path': f'audio/{name}.wav', 'split': 'train'}) + '\n' for name in ('silent', 'absent'))
  for runner in ('local', 'direct'):
    info = prepare(f'folder:{tmp_path / "in"}', tmp_path / runner, max_seconds=3, num_workers=1, runner=runner,
                   progress=False)
    assert info.utterances > 12 and {'silent', 'missing'} == set(info.faults)
  assert files(tmp_path / 'local') == files(tmp_path / 'direct')


@pytest.mark.parametrize(('workers', 'after'), [(1, 'shards/*.arrow'), (2, 'parts/*.arrow')])
def test_a_killed_run_is_finished_by_the_next(tmp_path, local, workers, after):
  status, _ = signalled_prepare(tmp_path, f'--source={SPEECH}', *OPTIONS, f'--num_workers={workers}',
                              after=after, count=5, how=signal.SIGKILL)
  assert status == -signal.SIGKILL and not (tmp_path / 'dataset.json').exists()
  state = tmp_path / '.prepare'
  if workers == 1:
    assert len(list(state.glob(after))) < 18  # in the middle of the second stage
  else:  # worker processes may have ended the bundles they had, but nobody began the second stage
    assert not any((state / 'shards').glob('*.arrow'))
  kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.arrayrecord')
          if (state / 'shards' / f'{path.name}.arrow').exists()}
  assert main(['prepare', f'--source={SPEECH}', f'--out={tmp_path}', *OPTIONS, '--num_workers=1']) == 0
  assert files(tmp_path) == local
  assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize('workers', [1, 2])
def test_interrupted_from_the_keyboard(tmp_path, workers):
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', *OPTIONS, f'--num_workers={workers}',
                                   after='parts/*.arrow', count=5, how=signal.SIGINT)
  assert status == 130 and errors.splitlines()[-1] == 'lmspt: interrupted'


def test_workers_leave_an_interrupt_to_the_process_that_started_them(tmp_path, local):
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', *OPTIONS, '--num_workers=2', after='parts/*.arrow',
                                     count=3, how=signal.SIGINT, whom=children)
  assert status == 0, errors
  assert files(tmp_path) == local


def test_a_worker_that_dies_is_one_line(tmp_path):
  """Beam by itself would wait for it for ever."""
  status, errors = signalled_prepare(tmp_path, f'--source={SPEECH}', *OPTIONS, '--num_workers=2', after='parts/*.arrow',
                                     count=3, how=signal.SIGKILL, whom=lambda pid: children(pid)[-1:])
  assert status == 1 and errors.splitlines()[-1].startswith('lmspt: error: a worker process died')


@pytest.mark.parametrize('workers', [1, 2])
def test_what_a_worker_could_not_do_is_one_line(tmp_path, workers):
  (tmp_path / 'train-00000-of-00001.arrayrecord').mkdir()
  with pytest.raises(LmsptError, match=r"/train-00000-of-00001\.arrayrecord: can't be written") as error:
    prepare(SPEECH, tmp_path, num_shards=1, num_workers=workers, runner='direct', progress=False)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('arguments', 'message'), [
  (['--runner=DataflowRuner'], "--runner=DataflowRuner: did you mean 'DataflowRunner'"),
  (['--runner=nonsense'], '--runner=nonsense: known: '),
  (['--runner=FlinkRunner', '--num_workers=2'], '--num_workers=2: is for --runner=local and direct; give FlinkRunner'),
  (['--runner=direct', 'stray'], "'stray': not an option; Beam's come after"),
])
def test_runners_that_are_not_there(tmp_path, capsys, arguments, message):
  assert main(['prepare', f'--source={SPEECH}', f'--out={tmp_path / "out"}', *arguments]) == 1
  errors = capsys.readouterr().err
  assert message in errors and errors.count('\n') == 1
  assert not (tmp_path / 'out').exists()


@pytest.fixture
def job_service(tmp_path):
  """The address of a job service of Beam's own: what Flink's and Spark's runners talk to speaks the same protocol."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'apache_beam.runners.portability.local_job_service_main', f'--port={port}']
  with open(tmp_path / 'service.log', 'wb') as log:
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
  end = time.monotonic() + 60
  while socket.socket().connect_ex(('127.0.0.1', port)):
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.1)
  yield f'localhost:{port}'
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def test_a_runner_of_beams_by_name_with_its_options(tmp_path, local, job_service, capsys):
  out = tmp_path / 'out'
  argv = ['prepare', f'--source={SPEECH}', f'--out={out}', *OPTIONS, '--runner=PortableRunner', '--',
          f'--job_endpoint={job_service}', '--environment_type=LOOPBACK']
  assert main(argv) == 0, capsys.readouterr().err
  assert files(out) == local
  (out / 'train-00000-of-00001.arrayrecord').mkdir()
  argv[3] = '--num_shards=1'
  assert main(argv) == 1
  assert "/train-00000-of-00001.arrayrecord: can't be written" in capsys.readouterr().err.splitlines()[-1]
