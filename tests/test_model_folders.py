"""Models as folders to pass on: exported, read again, from the hub's protocol and its cache, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import yaml
from _object_store import Server
from _tiny_run import write_run
from test_release_file import released

from lmspt_jax import LmsptError, Tokenizer
from lmspt_jax.cli.main import main
from lmspt_jax.config import CorpusConfig, DataConfig, QuirksConfig
from lmspt_jax.convert import hub
from lmspt_jax.data.audio_io import to_mono_at
from lmspt_jax.pretrained.loading import load

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
  """A run that names its data and has figures."""
  data = DataConfig(train=(CorpusConfig('package:speech_sample', where='seconds > 1'),))
  workdir = write_run(tmp_path_factory.mktemp('run'), data=data, quirks=QuirksConfig(drop_tail=True))
  rows = [{'step': 2, 'loss/mel': 9.0}, {'step': 3, 'held_out/mel': 2.5, 'held_out/distillation': None},
          {'step': 4, 'held_out/mel': 0.1}]
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"step": 5, "held')
  return workdir


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp('exports') / 'model'
  assert main(['export', f'--model={run}', '--format=safetensors', f'--out={out}']) == 0
  return out


@pytest.fixture
def copy(exported, tmp_path) -> Path:
  return Path(shutil.copytree(exported, tmp_path / 'copy'))


@pytest.fixture(scope='module')
def speech(speech_folder) -> np.ndarray:
  return soundfile.read(speech_folder / 'audio' / 'asterisk-conf-invalid.flac', dtype='float32')[0]


# ---------------------------------------------------------------- there and back


def test_an_export_is_the_same_model(run, exported, speech):
  ours, theirs = Tokenizer.from_pretrained(run), Tokenizer.from_pretrained(exported)
  codes, again = (t.encode(speech, sample_rate=16_000) for t in (ours, theirs))
  np.testing.assert_array_equal(codes.ids, again.ids)
  assert len(np.unique(codes.ids)) > 5
  assert (codes.model_hash, codes.num_samples) == (again.model_hash, again.num_samples)  # the quirk travels too
  np.testing.assert_array_equal(ours.decode(codes), theirs.decode(again))
  for name in ('step', 'teacher_id', 'weights', 'provenance'):
    assert getattr(ours.model, name) == getattr(theirs.model, name), name


def test_average_or_last(run, exported, tmp_path):
  assert main(['export', f'--model={run}', '--format=safetensors', '--weights=last', f'--out={tmp_path / "raw"}']) == 0
  raw, average = load(tmp_path / 'raw'), load(exported)
  assert (raw.weights, average.weights) == ('last', 'average') and raw.hash != average.hash
  assert raw.hash == load(run, average=False).hash


def test_what_the_folder_says(exported, capsys):
  config = json.loads((exported / 'config.json').read_text())
  assert config['data'] == [{'uri': 'package:speech_sample', 'split': 'train', 'where': 'seconds > 1', 'utterances': 54,
                             'hours': config['data'][0]['hours'], 'licenses': ['BSD-2-Clause', 'CC-BY-SA-3.0']}]
  assert 0.05 < config['data'][0]['hours'] < 0.09 and config['metrics'] == {'held_out/mel': 2.5}
  assert (config['sample_rate'], config['hop'], config['codebook_sizes']) == (24_000, 480, [32, 16, 16, 16])
  card = (exported / 'README.md').read_text()
  head = yaml.safe_load(card.split('---\n')[1])
  assert head['license'] == 'other' and 'CC-BY-SA-3.0' in head['license_name']
  for words in ('| mel | 2.5 |', 'BSD-2-Clause, CC-BY-SA-3.0', 'moving average, step 3', config['hash'], 'seconds > 1'):
    assert words in card
  subprocess.run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], cwd=exported, check=True, capture_output=True)
  assert main(['info', str(exported)]) == 0
  assert 'that of the training data: BSD-2-Clause, CC-BY-SA-3.0\n' in capsys.readouterr().out


def test_between_folders_files_and_runs(exported, tmp_path):
  file, again = tmp_path / 'a.safetensors', tmp_path / 'again'
  assert main(['convert', f'--from=folder:{exported}', f'--to=release:{file}']) == 0
  assert main(['convert', f'--from=release:{file}', f'--to=folder:{again}']) == 0
  assert load(again).hash == load(file).hash == load(exported).hash
  tensors = [safetensors.numpy.load_file(path / 'model.safetensors') for path in (exported, again)]
  assert tensors[0].keys() == tensors[1].keys()
  for name, value in tensors[0].items():
    np.testing.assert_array_equal(value, tensors[1][name], err_msg=name)
  assert 'BSD-2-Clause' in load(again).provenance.license  # by way of the file's metadata


@pytest.mark.parametrize('uri, text', [
    ('package:speech_sample', 'that of the training data: BSD-2-Clause, CC-BY-SA-3.0'),
    ('arrayrecord:absent', 'that of the training data, arrayrecord:absent (not on this machine)')])
def test_info_names_the_datas_licence(uri, text, tmp_path, capsys):
  write_run(tmp_path, data=DataConfig(train=uri))
  assert main(['info', str(tmp_path)]) == 0
  assert text in capsys.readouterr().out


@pytest.mark.parametrize('kind, absent', [('onnx', 'jax'), ('stablehlo', 'lmspt_jax')])
def test_the_lines_of_a_graphs_card(kind, absent, tiny_run, tiny_tokenizer, speech, tmp_path):
  """They run where the package is absent that the format does without, and give the model's codes and audio."""
  out = tmp_path / 'graphs'
  assert main(['export', f'--model={tiny_run}', f'--format={kind}', '--resynthesis', f'--out={out}']) == 0
  config = json.loads((out / 'config.json').read_text())
  assert config['hash'] == tiny_tokenizer.model_hash and config['graphs']['format'] == 1
  subprocess.run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], cwd=out, check=True, capture_output=True)
  lines = (out / 'README.md').read_text().split('```')[1].removeprefix('python\n').replace('DIR', str(out))
  speech = to_mono_at(speech, 16_000, 24_000)
  codes = tiny_tokenizer.encode(speech, sample_rate=24_000)
  audio = tiny_tokenizer.decode(codes)
  np.save(tmp_path / 'audio.npy', speech[None])
  script = (f'import sys, numpy\nsys.modules[{absent!r}] = None\naudio = numpy.load("audio.npy")\n{lines}\n'
            'numpy.savez("out.npz", ids=ids, again=again)\n')
  subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
  with np.load(tmp_path / 'out.npz') as found:
    np.testing.assert_array_equal(found['ids'][0], codes.ids)
    np.testing.assert_allclose(found['again'][0, :len(audio)], audio, atol=1e-5)
    assert found['again'].shape == (1, codes.ids.shape[1] * 480) and np.abs(audio).max() > 1e-3
  assert (out / 'resynthesis.onnx').exists() or (out / 'resynthesis.stablehlo').exists()
  with pytest.raises(LmsptError, match=f'an export to {kind}, which other programs run'):
    load(out)


# ---------------------------------------------------------------- the hub


class Hub(Server):
  """The part of the hub's protocol that huggingface_hub fetches a snapshot with."""

  def __init__(self, folder: Path, repository: str):
    self.folder, self.repository = folder, repository
    super().__init__(self.serve)

  def serve(self, method, path, headers, body):
    path = path.partition('?')[0]
    listing = [{'type': 'file', 'path': file.name, 'rfilename': file.name, 'size': file.stat().st_size, 'oid': 'x'}
               for file in sorted(self.folder.iterdir())]
    if path in (f'/api/models/{self.repository}/revision/{name}' for name in ('main', 'v1', COMMIT)):
      return 200, {'Content-Type': 'application/json'}, json.dumps(
          {'id': self.repository, 'sha': COMMIT, 'siblings': listing}).encode()
    if path == f'/api/models/{self.repository}/tree/{COMMIT}':
      return 200, {'Content-Type': 'application/json'}, json.dumps(listing).encode()
    prefix = f'/{self.repository}/resolve/{COMMIT}/'
    if path.startswith(prefix) and (self.folder / path.removeprefix(prefix)).is_file():
      content = (self.folder / path.removeprefix(prefix)).read_bytes()
      return 200, {'ETag': f'"{hashlib.sha1(content).hexdigest()}"', 'X-Repo-Commit': COMMIT,
                   'Content-Length': str(len(content))}, b'' if method == 'HEAD' else content
    return 404, {'X-Error-Code': 'RevisionNotFound' if '/revision/' in path else 'EntryNotFound'}, b''


@pytest.fixture
def hub_lmspt(tmp_path):
  """(serve, lmspt): `serve(folder)` makes it org/model of a hub; `lmspt(*argv, offline=...)` runs against that."""
  servers = []

  def serve(folder: Path) -> Hub:
    servers.append(Hub(folder, 'org/model'))
    return servers[-1]

  def lmspt(*argv, offline=False):
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'hub'), 'HF_ENDPOINT': servers[-1].url, 'HF_HUB_DISABLE_XET': '1'}
    done = subprocess.run([sys.executable, '-m', 'lmspt_jax', *map(str, argv)], capture_output=True, text=True,
                          env=env | ({'HF_HUB_OFFLINE': '1'} if offline else {}))
    return done.returncode, done.stdout, done.stderr

  yield serve, lmspt
  for server in servers:
    server.close()


def test_a_folder_on_the_hub(hub_lmspt, exported, speech_folder, tmp_path):
  serve, lmspt = hub_lmspt
  (tmp_path / 'repository').mkdir()
  for path in exported.iterdir():
    shutil.copy(path, tmp_path / 'repository')
  (tmp_path / 'repository' / 'optimizer.bin').write_bytes(bytes(1000))
  server = serve(tmp_path / 'repository')
  status, out, error = lmspt('info', 'hf://org/model@v1')
  assert status == 0, error
  assert f'hf://org/model@{COMMIT}' in out and load(exported).hash in out
  assert not any('optimizer' in path for _, path, _ in server.requests)  # only what a model is made of
  server.close()
  audio = speech_folder / 'audio' / 'asterisk-conf-invalid.flac'
  status, _, error = lmspt('encode', '--model=hf://org/model@v1', f'--out={tmp_path / "codes"}', audio, offline=True)
  assert status == 0, error
  with np.load(tmp_path / 'codes' / f'{audio.stem}.npz') as codes:
    assert str(codes['model_hash']) == load(exported).hash
  status, _, error = lmspt('info', 'hf://org/model@v2', offline=True)
  assert status == 1 and error.count('\n') == 1 and 'error: hf://org/model@v2: cannot be fetched' in error


def test_the_authors_repository(tmp_path, monkeypatch):
  """A file and a card; the card names the licence."""
  snapshot = tmp_path / 'snapshots' / COMMIT
  snapshot.mkdir(parents=True)
  released(snapshot / 'lmspt_12d5hz_16384_4096.safetensors')
  (snapshot / 'README.md').write_text('---\nlanguage: en\nlicense: cc-by-nc-4.0\n---\n# LM-SPT\n')
  monkeypatch.setattr(hub, 'fetch', lambda uri, wanted, way_out: snapshot)
  model = load('hf://kakaocorp/lmspt')
  assert (model.provenance.license, model.source) == ('cc-by-nc-4.0', f'hf://kakaocorp/lmspt@{COMMIT}')
  assert main(['export', '--model=hf://kakaocorp/lmspt', '--format=safetensors', f'--out={tmp_path / "out"}']) == 0
  assert (tmp_path / 'out' / 'README.md').read_text().startswith('---\nlicense: cc-by-nc-4.0\n')
  assert load(tmp_path / 'out').provenance.license == 'cc-by-nc-4.0'
  shutil.copy(snapshot / 'lmspt_12d5hz_16384_4096.safetensors', snapshot / 'b.safetensors')
  with pytest.raises(LmsptError, match=f'hf://kakaocorp/lmspt: .*{COMMIT}: not a model .2 .safetensors files in it'):
    load('hf://kakaocorp/lmspt')


# ---------------------------------------------------------------- what is refused


def change(field, value):
  def apply(folder: Path) -> None:
    config = json.loads((folder / 'config.json').read_text())
    config[field] = value
    (folder / 'config.json').write_text(json.dumps(config))
  return apply


@pytest.mark.parametrize('damage, words', [
    (change('version', 2), 'version = 2: this lmspt_jax reads 1'), (change('export', 'onnx'), 'an export to onnx'),
    (change('license', None), 'license = None'), (change('step', True), 'step = True'),
    (change('model', {'hops': 1}), 'unknown config field hops'), (lambda folder: change('model', json.loads(
        (folder / 'config.json').read_text())['model'] | {'latent_dim': -8})(folder), 'model.latent_dim = -8'),
    (change('quirks', []), r'quirks = \[\]'),
    (change('data', [{'uri': 'a'}]), 'where a corpus has uri'), (change('data', [3]), 'data has 3'),
    (change('data', [{'uri': 'a', 'split': '', 'where': '', 'hours': 'x'}]), 'hours are numbers'),
    (change('metrics', {'held_out/mel': '1'}), "metrics has 'held_out/mel' = '1'"),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json: not JSON'),
    (lambda folder: (folder / 'config.json').write_bytes(b'\xff'), 'config.json: not JSON'),
    (lambda folder: (folder / 'config.json').write_text(' ' * (1 << 20) + '{}'), 'more than 1048576 bytes'),
    (lambda folder: (folder / 'SHA256SUMS').unlink(), 'SHA256SUMS: no such file'),
    (lambda folder: (folder / 'SHA256SUMS').write_text('\n\n'), 'SHA256SUMS says None'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors: no such file'),
    (lambda folder: os.truncate(folder / 'model.safetensors', 1 << 40), 'cannot be read as safetensors'),
    (lambda folder: os.truncate(folder / 'model.safetensors', 5000), 'cannot be read as safetensors')])
def test_a_damaged_folder_is_one_line(copy, damage, words):
  damage(copy)
  with pytest.raises(LmsptError, match=words) as error:
    load(copy)
  assert str(copy) in str(error.value) and '\n' not in str(error.value)


def test_one_flipped_bit_is_seen(copy):
  content = bytearray((copy / 'model.safetensors').read_bytes())
  content[-7] ^= 1
  (copy / 'model.safetensors').write_bytes(content)
  with pytest.raises(LmsptError, match='sha256'):
    load(copy)


def test_nothing_is_overwritten(run, copy, tmp_path, capsys):
  before = sorted(tmp_path.rglob('*'))
  for out in (copy, copy / 'config.json'):
    assert main(['export', f'--model={run}', '--format=safetensors', f'--out={out}']) == 1
    assert 'not an empty folder' in capsys.readouterr().err
  assert sorted(tmp_path.rglob('*')) == before
  (tmp_path / 'empty').mkdir()
  assert main(['export', f'--model={run}', '--format=safetensors', f'--out={tmp_path / "empty"}']) == 0


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
  def full(folder, *_):
    (folder.parent / folder.name).write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('lmspt_jax.pretrained.folder.write_release', full)
  assert main(['export', f'--model={run}', '--format=safetensors', f'--out={tmp_path / "out"}']) == 1
  assert 'No space left' in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_config_for_what_has_its_own(run, exported, repo, tmp_path, capsys):
  for source in (f'run:{run}', f'folder:{exported}'):
    assert main(['convert', f'--from={source}', f'--to=release:{tmp_path / "a.safetensors"}',
                 f'--model-config={repo / "configs" / "demo.py"}']) == 1
    assert 'has a config of its own' in capsys.readouterr().err


@pytest.mark.parametrize('model', ['hf://', 'hf://org/model/extra/parts', 'hf://org/model@'])
def test_names_that_are_none(model):
  with pytest.raises(LmsptError, match=f'{model}: cannot be fetched') as error:
    load(model)
  assert '\n' not in str(error.value)
