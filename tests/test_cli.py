"""The command line: what it does on good input, and one line with exit status not 0 on bad input."""

import errno
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile

from lmspt_jax.cli.main import main
from lmspt_jax.errors import Interrupted, LmsptError


@pytest.fixture
def lmspt(capsys):
  """Runs the command line here: (exit status, what it printed, the one line of its error)."""

  def run(*argv):
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err

  return run


@pytest.fixture
def fails(lmspt):
  """Runs a command that must fail with one line holding all of `words`."""

  def run(argv, *words, status=1):
    got, _, err = lmspt(*argv)
    assert got == status, err
    assert err.startswith('lmspt: error: ') and err.count('\n') == 1, err
    for word in words:
      assert str(word) in err
    return err

  return run


@pytest.fixture
def speech(speech_folder):
  return speech_folder / 'audio' / 'asterisk-conf-invalid.flac'


# ---------------------------------------------------------------- the command itself


def test_a_real_process_ends_with_one_line_and_status_1(repo, tmp_path):
  for start in (['-m', 'lmspt_jax'], ['-c', 'import sys; from lmspt_jax.cli.main import main; sys.exit(main())']):
    done = subprocess.run([sys.executable, *start, 'encode', '--model=none', f'--out={tmp_path / "out"}', 'absent.wav'],
                          cwd=repo, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'lmspt: error: absent.wav: no such file; check the path\n'
    assert done.stdout == ''
    assert not (tmp_path / 'out').exists()


def test_help_names_every_verb(lmspt):
  status, out, _ = lmspt('--help')
  assert status == 0
  for verb in ('train', 'prepare', 'encode', 'decode', 'tokenize', 'plan', 'export', 'convert', 'info'):
    assert f'\n  {verb} ' in out


@pytest.mark.parametrize('argv, word', [
    (['trian'], "did you mean 'train'"),
    (['encode', '--model=m', 'x.wav'], '--out'),
    (['encode', '--model=m', '--out=o'], 'AUDIO'),
    (['decode', '--model=m', '--out=o', '--path=aux', 'x.npz'], 'aux'),
    (['encode', '--modell=m', '--out=o', '--model=m', 'x.wav'], '--modell'),
    (['encode', '--model=m', '--out=o', '--config.train.seed=1', 'x.wav'], 'takes no --config.train.seed'),
])
def test_usage(fails, argv, word):
  fails(argv, word, status=2)


def test_ctrl_c(lmspt, monkeypatch, speech, tmp_path):
  def interrupted(path):
    raise KeyboardInterrupt

  from lmspt_jax.inference.tokenizer import Tokenizer

  monkeypatch.setattr(Tokenizer, 'from_pretrained', interrupted)
  status, _, err = lmspt('encode', '--model=m', f'--out={tmp_path}', speech)
  assert (status, err) == (130, 'lmspt: interrupted\n')


def test_a_bug_keeps_its_traceback(lmspt, monkeypatch, speech, tmp_path):
  def bug(path):
    raise ZeroDivisionError

  from lmspt_jax.inference.tokenizer import Tokenizer

  monkeypatch.setattr(Tokenizer, 'from_pretrained', bug)
  with pytest.raises(ZeroDivisionError):
    lmspt('encode', '--model=m', f'--out={tmp_path}', speech)


# ---------------------------------------------------------------- train


CONFIG = """
from lmspt_jax.config import ExperimentConfig, to_config_dict

def get_config():
  return to_config_dict(ExperimentConfig(name='mine'))
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG)
  return path


@pytest.fixture
def loop(monkeypatch):
  """Stands in for the training loop: keeps what it was called with, raises `raises`."""
  module = types.ModuleType('lmspt_jax.training.loop')
  module.calls, module.raises = [], None

  def train(config, workdir):
    module.calls.append((config, workdir))
    if module.raises:
      raise module.raises

  module.train = train
  import lmspt_jax.training

  monkeypatch.setitem(sys.modules, 'lmspt_jax.training.loop', module)
  monkeypatch.setattr(lmspt_jax.training, 'loop', module, raising=False)
  return module


def test_train_calls_the_loop_with_the_overridden_config(lmspt, loop, config_file):
  status, _, err = lmspt('train', f'--config={config_file}', '--workdir=runs/x', '--config.train.num_steps=300',
                         '--config.train.eval_seconds', '2', '--config.quirks=release')
  assert (status, err) == (0, '')
  [(config, workdir)] = loop.calls
  assert workdir == 'runs/x'
  assert (config.name, config.train.num_steps, config.train.eval_seconds) == ('mine', 300, 2.0)
  assert config.quirks.drop_tail


def test_a_run_told_to_stop_leaves_with_75(lmspt, loop, config_file):
  loop.raises = Interrupted('saved step 12')
  status, _, err = lmspt('train', f'--config={config_file}', '--workdir=w')
  assert status == 75
  assert err == 'lmspt: saved step 12\n'


def test_a_full_disk_is_one_line(fails, loop, config_file):
  loop.raises = OSError(errno.ENOSPC, 'No space left on device', 'w/metrics.jsonl')
  fails(['train', f'--config={config_file}', '--workdir=w'],
        "w/metrics.jsonl: can't be written (No space left on device); make room there")


def test_a_fault_in_training_is_one_line(fails, loop, config_file):
  loop.raises = LmsptError('data.batch_size = 7:\n  not divisible by 8 devices')
  fails(['train', f'--config={config_file}', '--workdir=w'], 'data.batch_size = 7: not divisible by 8 devices')


@pytest.mark.parametrize('override, words', [
    ('train.num_step=3', ['unknown config field train.num_step', "'train.num_steps'"]),
    ('num_steps=3', ['unknown config field num_steps', "'train.num_steps'"]),
    ('model.xyzzy=3', ['unknown config field model.xyzzy', "'model.causal'"]),
    ('xyzzy.xyzzy=3', ['unknown config field xyzzy.xyzzy', 'teacher']),
    ('train.num_steps.more=3', ['unknown config field train.num_steps.more']),
    ('train.num_steps=many', ["train.num_steps = 'many'", 'a whole number']),
    ('train.num_steps=1.5', ["train.num_steps = '1.5'", 'a whole number']),
    ('loss.mel=loud', ["loss.mel = 'loud'", 'a number']),
    ('model.causal=maybe', ["model.causal = 'maybe'", 'true or false']),
    ('model.encoder_strides=4,x', ["model.encoder_strides = '4,x'", 'numbers separated by commas']),
    ('model.encoder_strides=4,0.5', ['model.encoder_strides', 'must be int']),
    ('model=small', ["model = 'small'", '--config.model.']),
    ('quirks=all', ["quirks = 'all'", "'fixed' or 'release'"]),
    ('train.num_steps=0', ['train.num_steps = 0', 'at least 1']),
    ('train.num_steps', ['has no value']),
])
def test_bad_override(fails, loop, config_file, override, words):
  fails(['train', '--workdir=w', f'--config={config_file}', f'--config.{override}'], *words)
  assert not loop.calls


@pytest.mark.parametrize('text, word', [
    (None, 'no file'),
    ('x = 1\n', 'no function get_config()'),
    ('def get_config(:\n', ':1 is not Python'),
    ('def get_config():\n  return {}\n', 'returned dict'),
    ('def get_config(size):\n  return size\n', 'write FILE:ARG'),
    ('\0', 'is not Python'),
])
def test_bad_config_file(fails, loop, tmp_path, text, word):
  path = tmp_path / 'mine.py'
  if text is not None:
    path.write_text(text)
  fails(['train', f'--config={path}', '--workdir=w'], path, word)


def test_config_argument(lmspt, fails, loop, config_file):
  fails(['train', f'--config={config_file}:small', '--workdir=w'], 'leave out :small')
  config_file.write_text(CONFIG.replace('get_config()', 'get_config(name)').replace("'mine'", 'name'))
  for argument in ('small', 'folder:a:b'):
    assert lmspt('train', f'--config={config_file}:{argument}', '--workdir=w')[0] == 0
    assert loop.calls[-1][0].name == argument


def test_a_misspelt_config_file_is_answered_with_its_neighbour(fails, loop, config_file):
  fails(['train', f'--config={config_file.with_name("mime.py")}', '--workdir=w'], f"did you mean '{config_file}'")


# ---------------------------------------------------------------- encode, decode, info


@pytest.mark.parametrize('name, make, word', [
    ('absent.wav', lambda p: None, 'no such file'),
    ('folder.wav', lambda p: p.mkdir(), 'is a directory'),
    ('text.wav', lambda p: p.write_text('not audio at all'), 'not audio'),
    ('zero.wav', lambda p: p.write_bytes(b''), 'empty'),
    ('empty.wav', lambda p: soundfile.write(p, np.zeros(0), 16000), 'no samples'),
    ('nan.wav', lambda p: soundfile.write(p, np.full(100, np.nan, 'f4'), 16000, subtype='FLOAT'), 'NaN'),
])
def test_bad_audio(fails, tiny_run, tmp_path, name, make, word):
  make(tmp_path / name)
  fails(['encode', f'--model={tiny_run}', f'--out={tmp_path / "out"}', tmp_path / name], tmp_path / name, word)
  assert not list(tmp_path.glob('out/*'))


def test_two_inputs_of_one_name(fails, tiny_run, speech, tmp_path):
  other = tmp_path / f'{speech.stem}.wav'
  soundfile.write(other, np.zeros(10), 16000)
  fails(['encode', f'--model={tiny_run}', f'--out={tmp_path / "out"}', speech, other], speech, other)


def test_unwritable_out(fails, tiny_run, speech, tmp_path):
  (tmp_path / 'file').touch()
  fails(['encode', f'--model={tiny_run}', f'--out={tmp_path / "file" / "out"}', speech], tmp_path / 'file' / 'out')


@pytest.mark.parametrize('model, word', [
    ('absent', 'no such model'), ('x.safetensors', 'no such file'), ('.', 'not a model'),
])
def test_bad_model(fails, speech, tmp_path, monkeypatch, model, word):
  monkeypatch.chdir(tmp_path)
  fails(['encode', f'--model={model}', '--out=out', speech], model, word)
  fails(['info', model], model, word)


def test_encode_then_decode(lmspt, tiny_run, tiny_tokenizer, speech, tmp_path):
  tokenizer = tiny_tokenizer
  assert lmspt('encode', f'--model={tiny_run}', f'--out={tmp_path}', speech)[0] == 0
  path = tmp_path / f'{speech.stem}.npz'
  with np.load(path, allow_pickle=False) as codes:
    assert {name: codes[name].dtype.kind for name in codes} == {
        'ids': 'u', 'num_samples': 'i', 'sample_rate': 'i', 'frame_rate': 'f', 'model_hash': 'U'}
    assert codes['ids'].dtype == np.uint16
    num_samples = int(codes['num_samples'])
    assert codes['ids'].shape == (tokenizer.num_codebooks, -(-num_samples // tokenizer.hop))
    assert str(codes['model_hash']) == tokenizer.model_hash
  seconds = soundfile.info(speech).duration
  for name, rate in (('full', 24000), ('resynthesis', 16000)):
    out = tmp_path / name
    assert lmspt('decode', f'--model={tiny_run}', f'--out={out}', f'--path={name}', path)[0] == 0
    info = soundfile.info(out / f'{speech.stem}.wav')
    assert (info.samplerate, info.frames, info.channels) == (rate, round(seconds * rate), 1)
  assert [p.suffix for p in tmp_path.glob('*.*')] == ['.npz']  # no temporary file stays


def test_good_input_leaves_stderr_empty(repo, tiny_run, speech, tmp_path):
  """In a process of its own: libraries warn through logging, which pytest takes away from stderr."""
  verbs = (['info', tiny_run], ['encode', f'--model={tiny_run}', f'--out={tmp_path}', speech],
           ['decode', f'--model={tiny_run}', f'--out={tmp_path}', tmp_path / f'{speech.stem}.npz'])
  code = f'from lmspt_jax.cli.main import main; print(*(main(v) for v in {[[*map(str, v)] for v in verbs]}))'
  done = subprocess.run([sys.executable, '-c', code], cwd=repo, capture_output=True, text=True)
  assert done.stderr == ''
  assert done.stdout.endswith('\n0 0 0\n')


def rewrite(path, **changes):
  with np.load(path) as archive:
    np.savez(path, allow_pickle=True, **{k: v for k, v in ({**archive} | changes).items() if v is not None})


@pytest.mark.parametrize('damage, word', [
    (lambda p: p.write_bytes(p.read_bytes()[:200]), 'damaged'),
    (lambda p: p.write_text('text'), 'not a codes file'),
    (lambda p: p.write_bytes(b''), 'not a codes file'),
    (lambda p: np.save(p.open('wb'), np.zeros(3)), 'not a codes file'),
    (lambda p: rewrite(p, num_samples=None), 'has no num_samples'),
    (lambda p: rewrite(p, ids=np.array([{}], object)), 'ids is not a plain array'),
    (lambda p: rewrite(p, ids=np.zeros(3, np.uint16)), 'shape (3,)'),
    (lambda p: rewrite(p, ids=np.zeros((4, 3))), 'float64'),
    (lambda p: rewrite(p, ids=np.full((4, 8), 60000, np.uint16)), 'codebook 0'),
    (lambda p: rewrite(p, ids=np.full((4, 8), 2**40)), 'no codebook'),
    (lambda p: rewrite(p, ids=np.zeros((9, 8), np.uint16)), '4 codebooks'),
    (lambda p: rewrite(p, num_samples=10**6), 'num_samples 1000000'),
    (lambda p: rewrite(p, sample_rate=8000), '8000 Hz'),
    (lambda p: rewrite(p, model_hash='0' * 16), '--any-model'),
])
def test_bad_codes(fails, tiny_run, loaded, codes_file, tmp_path, damage, word):
  damage(codes_file)
  fails(['decode', f'--model={tiny_run}', f'--out={tmp_path / "out"}', codes_file], codes_file, word)
  assert not list(tmp_path.glob('out/*'))


def test_any_model(lmspt, tiny_run, loaded, codes_file, tmp_path):
  rewrite(codes_file, model_hash='0' * 16)
  argv = ['decode', f'--model={tiny_run}', f'--out={tmp_path / "out"}', codes_file]
  assert lmspt(*argv)[0] == 1
  assert lmspt(*argv, '--any-model')[0] == 0
  assert soundfile.info(tmp_path / 'out' / 'a.wav').frames == 3500


@pytest.fixture
def loaded(monkeypatch, tiny_tokenizer):
  """Spares a command the loading of tiny_run's model."""
  from lmspt_jax.inference.tokenizer import Tokenizer

  monkeypatch.setattr(Tokenizer, 'from_pretrained', lambda path: tiny_tokenizer)


@pytest.fixture
def codes_file(tiny_tokenizer, tmp_path):
  """Codes of 3500 samples: 8 frames of 480."""
  from lmspt_jax import Codes
  from lmspt_jax.inference.codes import write_codes

  ids = np.arange(32).reshape(4, 8) % 16
  write_codes(tmp_path / 'a.npz', Codes(ids, 3500, 24000, 50.0, tiny_tokenizer.model_hash), 32)
  return tmp_path / 'a.npz'


def test_info(lmspt, tiny_run):
  status, out, _ = lmspt('info')
  assert status == 0 and 'jax ' in out and 'cpu' in out
  status, out, _ = lmspt('info', tiny_run)
  assert status == 0
  for words in ('tiny, step 3', '50 Hz (hop 480', '4: 32 16 16 16', f'{50 * (5 + 4 * 3)} bit/s', 'teacher-id',
                'semantic_encoder', 'names no training data'):
    assert words in out
