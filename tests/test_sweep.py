"""`lmspt sweep`: what a sweep file may say, what is made of its runs' figures, how they are handed to clusters."""

from __future__ import annotations

import math
import random
import shlex
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from _sweep_place import Place

from lmspt_jax import sweeps
from lmspt_jax.cli import flags
from lmspt_jax.cli.main import main
from lmspt_jax.errors import LmsptError
from lmspt_jax.sweeps import Run, Sweep, clusters, grid, members, named, plot, product, seeds, summary, zipped
from lmspt_jax.sweeps.runs import as_text, short_names


@pytest.fixture
def place(tmp_path):
  place = Place(tmp_path)
  place.sweep("product(named({'a': {}, 'b': {'model.latent_dim': 128}}), seeds(2))")
  return place


@pytest.fixture
def lmspt(place, capsys):
  """Runs `lmspt sweep` here with the stub: (exit status, what it printed, its stderr)."""
  return lambda *options: (place.lmspt(*options), *capsys.readouterr())


# ---------------------------------------------------------------- runs


def test_grid_and_zipped():
  fields = {'generator_optimizer.learning_rate': (1e-3, 5e-5), 'discriminator_optimizer.learning_rate': (2, 3)}
  runs = zipped(fields)
  assert [run.name for run in runs] == [
      'generator_optimizer.learning_rate_0.001-discriminator_optimizer.learning_rate_2',
      'generator_optimizer.learning_rate_5e-05-discriminator_optimizer.learning_rate_3']
  assert [tuple(run.overrides.values()) for run in runs] == [(1e-3, 2), (5e-5, 3)]
  assert [tuple(run.overrides.values()) for run in grid(fields)] == [(1e-3, 2), (1e-3, 3), (5e-5, 2), (5e-5, 3)]
  runs = grid({'model.encoder_strides': ((4, 5), (4, -5)), 'train.seed': (0, 1)})
  assert [(run.name, run.group) for run in runs] == [
      ('encoder_strides_4_5-seed_0', 'encoder_strides_4_5'), ('encoder_strides_4_5-seed_1', 'encoder_strides_4_5'),
      ('encoder_strides_4_-5-seed_0', 'encoder_strides_4_-5'), ('encoder_strides_4_-5-seed_1', 'encoder_strides_4_-5')]


def test_product_and_seeds():
  runs = product(named({'25hz': {'x': 1}, '12.5hz': {'x': 2}}), seeds(2))
  assert [(run.name, run.group, run.overrides) for run in runs] == [
      ('25hz-seed0', '25hz', {'x': 1, 'train.seed': 0}), ('25hz-seed1', '25hz', {'x': 1, 'train.seed': 1}),
      ('12.5hz-seed0', '12.5hz', {'x': 2, 'train.seed': 0}), ('12.5hz-seed1', '12.5hz', {'x': 2, 'train.seed': 1})]
  assert [(run.name, run.group) for run in seeds(2)] == [('seed0', ''), ('seed1', '')]


def test_random_draws_are_the_seeds_alone():
  fields = {'a': sweeps.log_uniform(1e-4, 1e-2), 'b': sweeps.choice(('x', 'y')), 'c': sweeps.uniform(-1, 1)}
  runs = sweeps.random(60, fields, seed=3)
  assert runs[:5] == sweeps.random(5, fields, seed=3)  # more draws add to fewer
  assert [run.overrides['c'] for run in runs] == [
      run.overrides['c'] for run in sweeps.random(60, {'c': fields['c']}, seed=3)]  # other fields change nothing
  assert runs != sweeps.random(60, fields, seed=4)
  a = [run.overrides['a'] for run in runs]
  assert 1e-4 <= min(a) < 2e-4 and 5e-3 < max(a) <= 1e-2 and 15 < sum(x < 1e-3 for x in a) < 45
  assert all(x == float(f'{x:.4g}') for x in a)
  assert {run.overrides['b'] for run in runs} == {'x', 'y'} and min(run.overrides['c'] for run in runs) < 0
  expected = random.Random('3 c')  # written down: every machine is to draw the same
  assert runs[0].overrides['c'] == float(f'{expected.uniform(-1, 1):.4g}')
  assert (runs[1].name, runs[1].group) == ('random1', 'random1')


def test_short_names():
  assert short_names(['a.x.rate', 'b.x.rate', 'c.size', 'size']) == {
      'a.x.rate': 'a.x.rate', 'b.x.rate': 'b.x.rate', 'c.size': 'c.size', 'size': 'size'}
  assert short_names(['model.latent_dim', 'train.seed']) == {'model.latent_dim': 'latent_dim', 'train.seed': 'seed'}
  assert short_names(['g.rate', 'd.rate']) == {'g.rate': 'g.rate', 'd.rate': 'd.rate'}


def test_values_reach_the_config_as_they_are(place):
  values = {'generator_optimizer.learning_rate': 1 / 3, 'model.encoder_strides': (4, 5, 6, 8, 2), 'model.causal': True,
            'model.dilations': (7,), 'discriminator.rates': (), 'discriminator.band_edges': (0.0, 0.1, 1.0),
            'teacher.checkpoint': 'package:tiny.en', 'data.batch_size': 8, 'mesh.rules': ("a'b = -", 'c = fsdp')}
  config = flags.load(str(place.config), [(name, as_text(name, value)) for name, value in values.items()])
  for name, value in values.items():
    found = config
    for part in name.split('.'):
      found = getattr(found, part)
    assert found == value and type(found) is type(value), name


@pytest.mark.parametrize('make, words', [
    (lambda: Sweep('c.py', ()), 'has no runs'),
    (lambda: Sweep('c.py', [{}]), "such as Sweep('configs/demo.py', seeds(2))"),
    (lambda: Sweep('c.py', [Run('a/b')]), "run 'a/b': is to be a folder's name"),
    (lambda: Sweep('c.py', [Run('..')]), "run '..': "),
    (lambda: Sweep('c.py', [Run('sweep.csv')]), "run 'sweep.csv': "),
    (lambda: Sweep('c.py', [Run('a'), Run('A')]), "run 'A' is there twice"),
    (lambda: Sweep('c.py', [*named({'a': {'x': 1}}), Run('b', {'x': 2}, 'a')]), "'a' and 'b' are of one group, 'a'"),
    (lambda: product(seeds(2), seeds(2)), 'train.seed is set by two factors'),
    (lambda: zipped({'a': (1, 2), 'b': (1,)}), 'a has 2 values, b has 1 values'),
    (lambda: grid({'a': 'text'}), "grid: a = 'text': give a tuple"),
    (lambda: grid({}), 'grid({})'),
    (lambda: seeds(0), 'seeds(0)'),
    (lambda: sweeps.random(1.5, {}), 'random(1.5)'),
    (lambda: sweeps.uniform(2, 1), 'uniform(2, 1)'),
    (lambda: sweeps.log_uniform(0, 1), 'log_uniform(0, 1): both must be positive'),
    (lambda: sweeps.choice(()), 'nothing to draw'),
    (lambda: as_text('a.b', math.nan), 'config field a.b = nan: give a finite number'),
    (lambda: as_text('a.b', {'c': 1}), "config field a.b = {'c': 1}"),
])
def test_what_cannot_be_meant(make, words):
  with pytest.raises(LmsptError) as error:
    make()
  assert words in str(error.value)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize('text, words', [
    ("def get_sweep():\n  return Sweep('CONFIG', named({'a': {'model.latent_dims': 1}}))",
     ("run 'a': unknown config field model.latent_dims", "'model.latent_dim'")),
    ("def get_sweep():\n  return Sweep('CONFIG', named({'a': {}, 'b': {'model.decoder_rates': (2, 2)}}))",
     ("run 'b': config field model.decoder_rates",)),
    ("def get_sweep():\n  return Sweep('CONFIG', named({'a': {'data.held_out': ''}}))",
     ("run 'a': ", 'data.held_out')),
    ("def get_sweep():\n  return Sweep('absent.py', seeds(1))", ("run 'seed0': --config=absent.py: no file",)),
    ("def get_sweep():\n  return Sweep('CONFIG', seeds(2) + seeds(1))", ("run 'seed0' is there twice",)),
    ('def get_sweep():\n  return 3', ('get_sweep returned 3',)),
    ('def get_sweep(x):\n  return 3', ('get_sweep in', 'write FILE:ARG')),
    ('get_config = 3', ('no function get_sweep()',)),
    ('def (', ('sweep.py:2 is not Python',)),
])
def test_a_bad_sweep_file_is_one_line_before_anything_starts(place, lmspt, text, words):
  (place.root / 'sweep.py').write_text('from lmspt_jax.sweeps import *\n' + text.replace('CONFIG', str(place.config)))
  for options in ((), ('--dry-run',), ('--table',)):
    status, out, err = lmspt(*options)
    assert (status, out, err.count('\n')) == (1, '', 1), err
    assert err.startswith('lmspt: error: ') and all(word in err for word in words), err
  assert [path.name for path in place.workdir.iterdir()] == ['plan']


def test_a_bad_command_line(place, lmspt):
  assert lmspt('--parallel=0')[::2] == (1, 'lmspt: error: --parallel=0: give a number from 1 on\n')
  assert lmspt('--parallel=2', '--launcher=x')[0] == 2
  assert lmspt('--config.train.seed=1')[0] == 2


def test_dry_run(place, lmspt):
  place.sweep("product(named({'a': {}, 'b': {'model.latent_dim': 128}}), seeds(1))", ", overrides={'mesh.data': 1}")
  status, out, err = lmspt('--dry-run')
  command = [sys.executable, '-S', str(place.root / 'stub.py'), f'--config={place.config}']
  assert (status, err) == (0, '')
  assert out.splitlines() == [
      '# a-seed0: waiting, step 0 of 4', '# b-seed0: waiting, step 0 of 4',
      shlex.join([*command, f'--workdir={place.workdir}/a-seed0', '--config.mesh.data=1', '--config.train.seed=0']),
      shlex.join([*command, f'--workdir={place.workdir}/b-seed0', '--config.mesh.data=1',
                  '--config.model.latent_dim=128', '--config.train.seed=0'])]
  assert [path.name for path in place.workdir.iterdir()] == ['plan']


@pytest.mark.parametrize('name, runs', [('frame_rates', 6), ('learning_rates', 12)])
def test_the_sweeps_of_the_checkout(repo, monkeypatch, capsys, tmp_path, name, runs):
  monkeypatch.chdir(repo)
  assert {path.stem for path in Path('configs/sweeps').glob('*.py')} == {'frame_rates', 'learning_rates'}
  assert main(['sweep', f'--sweep=configs/sweeps/{name}.py', f'--workdir={tmp_path / "w"}', '--dry-run']) == 0
  assert capsys.readouterr().out.count(' train --config=configs/demo.py ') == runs
  assert not (tmp_path / 'w').exists()


def test_the_frame_rates_of_the_example(repo, monkeypatch, tmp_path):
  import jax

  from lmspt_jax.models.tokenizer import abstract_tokenizer, merge_tokenizer

  monkeypatch.chdir(repo)
  every = members.resolve(flags.call_file('sweep', 'configs/sweeps/frame_rates.py'), tmp_path, flags.load)
  assert [(member.name, member.config.model.frame_rate, member.seed) for member in every] == [
      (f'{rate:g}hz-seed{seed}', rate, seed) for rate in (25, 12.5, 6.25) for seed in (0, 1)]
  for member in every[::2]:
    assert member.config.crop_samples == 1.6 * 16_000  # whole frames at every rate: all see the same audio
    model, (_, params, codebooks) = member.config.model, abstract_tokenizer(member.config.model)
  audio = jax.ShapeDtypeStruct((2, 4 * model.hop), 'float32')

  def decoded(params, codebooks, audio):
    tokenizer = merge_tokenizer(model, params, codebooks)
    codes = tokenizer.encode(audio)
    return codes, tokenizer.decode(codes), tokenizer.resynthesize(codes)

  shapes = [x.shape for x in jax.eval_shape(decoded, params, codebooks, audio)]
  assert shapes == [(2, 4, 4), audio.shape, audio.shape]


# ---------------------------------------------------------------- statistics


def results_of(place, states: dict[str, tuple[str, dict]]) -> list[summary.Result]:
  every = place.members()
  return [summary.Result(every[name], members.Progress(state, max(rows, default=0), rows))
          for name, (state, rows) in states.items()]


def test_statistics_by_hand():
  assert summary.statistic([1.0, 2.0, 6.0]) == summary.Statistic(3.0, math.sqrt(7), 3)
  one = summary.statistic([5.0])
  assert (one.mean, one.count) == (5.0, 1) and math.isnan(one.deviation)
  broken = summary.statistic([1.0, math.nan])
  assert broken.count == 2 and math.isnan(broken.mean) and math.isnan(broken.deviation)


def test_curves_and_the_table_of_runs_that_are_not_all_finished(place):
  place.sweep("product(named({'a': {}, 'b.c': {}}), seeds(3))")
  results = results_of(place, {
      'a-seed0': ('finished', {0: {'x': 1.0}, 4: {'x': 3.0, 'y': 1.0}}),
      'a-seed1': ('finished', {0: {'x': 2.0}, 4: {'x': 5.0}}),
      'a-seed2': ('unfinished', {0: {'x': 6.0}, 2: {'x': 9.0}}), 'b.c-seed0': ('waiting', {})})
  curve = summary.curve(results[:3], 'x')
  assert curve[0] == summary.Statistic(3.0, statistics.stdev([1, 2, 6]), 3)
  assert (curve[2].mean, curve[2].count) == (9.0, 1)
  assert curve[4] == summary.Statistic(4.0, math.sqrt(2), 2)
  assert list(summary.by_group(results)) == ['a', 'b.c'] and summary.curve(results[3:], 'x') == {}
  assert summary.as_markdown(results, 'title').splitlines() == [
      '# title', '',
      '| group | finished | x       | y     |',
      '|-------|----------|---------|-------|',
      '| a     | 2 of 3   | 4 ± 1.4 | 1 (1) |',
      '| b.c   | 0 of 1   |         |       |', '',
      'Held-out figures at step 4: mean ± standard deviation over the finished runs of a group (their number in '
      'brackets where a figure has fewer).', '',
      'Not finished:', '', '* a-seed2: unfinished, step 2', '* b.c-seed0: waiting, step 0']
  assert ElementTree.fromstring(plot.as_svg(results, 'title')).tag.endswith('svg')
  assert ElementTree.fromstring(plot.as_svg(results[3:], 'nothing yet')).tag.endswith('svg')


def test_without_matplotlib_nothing_starts(place, lmspt, monkeypatch):
  place.plan()
  monkeypatch.setattr(plot.importlib.util, 'find_spec', lambda name: None)
  assert lmspt('--dry-run')[0] == 0
  status, _, err = lmspt()
  assert status == 1 and "pip install -e '.[sweep]'" in err and not place.starts('a-seed0')


# ---------------------------------------------------------------- clusters


def test_slurm_takes_one_array(place, lmspt, repo):
  slurm = str(repo / 'launch' / 'slurm.sh')
  runs = [word for member in place.members().values() for word in ('--', *member.arguments)]
  status, out, _ = lmspt('--dry-run', f'--launcher={slurm} --time=9')
  assert status == 0 and out.splitlines()[4:] == [shlex.join([slurm, '--time=9', *runs])]
  # What it would submit: an array with every run in it.
  done = subprocess.run([slurm, '--dry-run', '--time=9', *runs], capture_output=True, text=True, check=True)
  assert done.stdout.startswith('sbatch ') and ' --array=0-3 --time=9 <<JOB\n' in done.stdout
  assert [line.split(')')[0] for line in done.stdout.splitlines() if ' train=(' in line] == ['0', '1', '2', '3']


def test_runs_are_handed_over_once(place, lmspt):
  launcher = place.root / 'slurm.sh'
  launcher.write_text('''#!/bin/sh
    cd "$(dirname "$0")" && echo "$@" >>calls
    [ ! -e refuses ] || exit 3
    [ "$1" = --dry-run ] || [ ! -e breaks ] || exit 4
  ''')
  launcher.chmod(0o755)
  calls = lambda: (place.root / 'calls').read_text().splitlines()
  place.plan()
  option = f"--launcher='{launcher}' --time=9"
  for how, ended, count in (('refuses', 3, 1), ('breaks', 4, 3)):
    (place.root / how).touch()
    status, _, err = lmspt(option)
    assert status == 1 and f'ended with status {ended}; it says above why' in err and len(calls()) == count
    assert [place.state(name) for name in place.members()] == ['waiting'] * 4
    (place.root / how).unlink()
  status, out, err = lmspt(option)
  assert status == 0, err
  assert [call[:17] for call in calls()[3:]] == ['--dry-run --time=', '--time=9 -- --con']
  assert '* a-seed0: launched, step 0 (2' in out and f'remove {place.workdir}/a-seed0/launched.json' in out
  # Not again, neither there nor here, until somebody says that the job has ended.
  assert lmspt(option)[0] == 0 and len(calls()) == 5
  assert lmspt()[0] == 1 and not place.starts('a-seed0')
  (place.workdir / 'a-seed0' / 'launched.json').unlink()
  assert lmspt(option)[0] == 0
  assert calls()[-1].count('--workdir=') == 1 and f'--workdir={place.workdir}/a-seed0' in calls()[-1]


def test_gke_takes_a_job_set_for_each_run(place, lmspt, repo):
  gke = str(repo / 'launch' / 'gke.py')
  place.sweep("product(named({'12.5hz': {}, 'B': {}}), seeds(1))")
  option = f'--launcher={gke} --name=rates --image=i --topology=v5e:4x4 --volume=claim:{place.root}'
  status, out, _ = lmspt('--dry-run', option)
  every = place.members()
  rest = ['--image=i', '--topology=v5e:4x4', f'--volume=claim:{place.root}', '--']
  commands = [[gke, '--name=rates-12-5hz-seed0', *rest, *every['12.5hz-seed0'].arguments],
              [gke, '--name=rates-b-seed0', *rest, *every['B-seed0'].arguments]]
  assert status == 0 and out.splitlines()[2:] == [shlex.join(command) for command in commands]
  done = subprocess.run([sys.executable, gke, '--dry-run', *commands[0][1:]], capture_output=True, text=True,
                        check=True)
  assert '  name: "rates-12-5hz-seed0"\n' in done.stdout
  for launcher, words in (
      (f'{gke} --image=i', 'has no --name=NAME'),
      ('launch/tpu_vm.sh --tpu=t', 'give launch/slurm.sh or launch/gke.py'),
      ('launch/slurm.sh "', 'not a command'), ('', 'not a command'), (f'{place.root}/slurm.sh', "can't be run")):
    status, _, err = lmspt(f'--launcher={launcher}')
    assert status == 1 and words in err and err.count('\n') == 1, err
  place.sweep("named({'a.b': {}, 'a_b': {}})")
  assert 'would both be JobSet rates-a-b' in lmspt('--dry-run', option)[2]
  assert clusters.handovers([], 'launch/slurm.sh') == []
