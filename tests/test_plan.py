"""`lmspt plan`: the real TPU compiler, what is read from its programs, the arithmetic on top, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import pytest
from _small_tower import TOWER, write_tower
from make_golden_step import DIMS, TINY, replaced, write_teacher

from lmspt_jax.chips import CHIPS, chip_of, parse_topology
from lmspt_jax.cli.main import main
from lmspt_jax.config import TeacherConfig
from lmspt_jax.errors import LmsptError
from lmspt_jax.models.teachers import TEACHER_SIZES
from lmspt_jax.planning import plan as planning
from lmspt_jax.planning.hlo import Program, shape_bytes
from lmspt_jax.planning.roofline import Roofline

CONFIG = replaced(
    TINY, compute__dtype='bfloat16', data__crop_seconds=0.2, discriminator__fft_sizes=(), loss__mel_bins=(20,),
    loss__mel_windows=(256,), model__shared_encoder=True, model__encoder_strides=(320,), model__decoder_rates=(320,),
    model__resynthesis_rates=(320,), teacher__strategy='none')
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(f'from lmspt_jax.config import *\ndef get_config():\n  return to_config_dict({CONFIG!r})\n')
  return path


@pytest.fixture(scope='module')
def compiled(tmp_path_factory, config_file, repo) -> Path:
  """The folder with what `_plan_programs.py` compiled."""
  out = tmp_path_factory.mktemp('compiled')
  done = subprocess.run([sys.executable, TESTS / '_plan_programs.py', out, config_file], capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(repo)})
  assert done.returncode == 0, done.stderr
  return out


@pytest.fixture(scope='module')
def planned(tmp_path_factory, config_file, repo) -> SimpleNamespace:
  """`lmspt plan` of the real train step for four chips, parameters split over two of them."""
  out = tmp_path_factory.mktemp('planned')
  done = subprocess.run(
      [sys.executable, '-m', 'lmspt_jax', 'plan', f'--config={config_file}', '--topology=v5e:2x2', f'--out={out}',
       '--config.mesh.fsdp=2', '--config.data.batch_size=8'], cwd=repo, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return SimpleNamespace(table=done.stdout, stderr=done.stderr, plan=json.loads((out / 'plan.json').read_text()),
                         picture=(out / 'plan.svg').read_text())


# ---------------------------------------------------------------- chips and slices


def test_a_slice_by_its_name():
  for text in ('v5e:4x4', 'v5e 4x4', 'V5E-4x4'):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.hosts) == ('v5e:4x4', 16, 4)
  assert parse_topology('v5p:2x2x4').chips == 16


@pytest.mark.parametrize('text, words', [
    ('v7:2x2', 'known are v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4'), ('v5e', 'use CHIP:SHAPE'),
    ('v5e:4x4x4', 'v5e slices have 2 sizes, e.g. v5e:4x4'), ('v4:4x4', 'v4 slices have 3 sizes'),
    ('v6e:0x4', 'v6e slices have 2 sizes')])
def test_what_is_no_slice(text, words, config_file, capsys):
  assert main(['plan', f'--config={config_file}', f'--topology={text}']) == 1
  error = capsys.readouterr().err
  assert error.startswith(f'lmspt: error: topology {text!r}: ') and words in error and error.count('\n') == 1


def test_every_chip_has_its_source_and_its_device():
  for chip in CHIPS.values():
    assert chip.source == f'https://cloud.google.com/tpu/docs/{chip.name}'
    assert parse_topology(chip.example).chip is chip_of(chip.device_kind) is chip
    assert 0.9 * chip.hbm_bytes < chip.usable_bytes < 1.01 * chip.hbm_bytes
  assert chip_of('cpu') is None


def test_slices_as_the_compiler_has_them(compiled):
  """One device a chip, of the kind that a run would find there."""
  found = json.loads((compiled / 'slices.json').read_text())
  refused = found.pop('v5e:3x5')
  assert refused.startswith('topology v5e:3x5: ') and refused.endswith('use a shape such as v5e:4x4')
  for name, (devices, kind) in found.items():
    assert devices == parse_topology(name).chips and kind == parse_topology(name).chip.device_kind


# ---------------------------------------------------------------- reading compiled programs


def test_collectives_and_loops_of_a_known_program(compiled):
  """In each of three rounds weights are gathered twice, gradients scattered over 'b' and summed over 'a'."""
  program = Program((compiled / 'known.txt').read_text())
  costs, once = program.costs(), program.costs(loops=False)
  weights = 512 * 512
  assert program.devices == 4
  assert costs.count == {'all-gather': 6, 'reduce-scatter': 3, 'all-reduce': 4}
  assert costs.payload == {'all-gather': 6 * 2 * weights,  # the product takes bfloat16, so that is what is gathered
                           'reduce-scatter': 3 * 4 * weights, 'all-reduce': 3 * 4 * weights // 2 + 4}
  assert costs.wire['all-gather'] == costs.payload['all-gather'] // 2
  assert costs.wire['reduce-scatter'] == costs.payload['reduce-scatter'] // 2
  assert costs.wire['all-reduce'] == 3 * 4 * weights // 2 + 2 * 4 * 3 // 4  # over two; the loss over four
  assert costs.flops == 3 * 3 * 2 * 1024 * weights / 4
  assert (once.count, once.flops) == ({'all-gather': 2, 'reduce-scatter': 1, 'all-reduce': 2}, costs.flops / 3)
  assert 2 < costs.bytes / once.bytes < 3  # what is before and after the loops is small
  assert costs.cycles['codec'] == 3 * once.cycles['codec'] > 0 and costs.cycles['teacher'] > 0


def test_exchanges_of_a_known_program(compiled):
  costs = Program((compiled / 'exchange.txt').read_text()).costs()
  here = 16 * 1024 * 4
  assert costs.count == {'all-to-all': 1, 'collective-permute': 2}
  assert costs.payload == {'all-to-all': here, 'collective-permute': 2 * here}
  assert costs.wire == {'all-to-all': here * 3 // 4, 'collective-permute': 2 * here}


def test_only_the_teachers_kernels_move(compiled):
  """Every block's are gathered where they are used, forward and backward, and no activation is sent."""
  costs = Program((compiled / 'teacher.txt').read_text()).costs()
  width, mels, layers = 256, 80, 3
  block = 4 * width**2 + 2 * 4 * width**2
  assert costs.payload == {'all-gather': 2 * (2 * layers * block + 3 * (mels + width) * width)}


ASYNC = """HloModule step, num_partitions=8

%gather (p: bf16[2,8]) -> bf16[16,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %x = f32[4,6]{1,0} constant({...})
  %start = (f32[4,6]{1,0}, f32[4,6]{1,0}) all-reduce-start(%x, %x), channel_id=1, replica_groups={{0,1},{2,3}}
  %done = (f32[4,6]{1,0}, f32[4,6]{1,0}) all-reduce-done(%start)
  ROOT %out = (s32[]) tuple(%x)
}

ENTRY %main (a: bf16[2,8]) -> bf16[16,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %zero = (s32[]) constant({...})
  %loop = (s32[]) while(%zero), condition=%condition, body=%body
  %begin = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%gather
  ROOT %end = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%gather
}
"""


def test_what_runs_beside_other_work_counts_once():
  """start and done are one, fusions of one channel are one, tuples are summed, loops multiply."""
  costs = Program(ASYNC).costs()
  assert costs.count == {'all-reduce': 5, 'all-gather': 1}
  assert costs.payload == {'all-reduce': 5 * 2 * 4 * 6 * 4, 'all-gather': 16 * 8 * 2}
  assert costs.wire == {'all-reduce': 5 * 2 * 4 * 6 * 4, 'all-gather': 14 * 8 * 2}


def test_a_loop_of_unknown_length_is_an_error():
  text = ASYNC.replace('%limit = s32[] constant(5)', '%limit = s32[] get-tuple-element(%s), index=0')
  with pytest.raises(LmsptError, match='loop: how often it runs is not in the compiled program'):
    Program(text).costs()
  known = text.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert Program(known).costs().count['all-reduce'] == 7


@pytest.mark.parametrize('shape, size', [
    ('f32[4,8]{1,0:T(8,128)S(1)}', 128), ('bf16[3]', 6), ('pred[]', 1), ('(f32[2], u8[5]{0}, s32[]{:T(128)})', 17),
    ('f8e4m3fn[4]', 4), ('c64[2]', 16), ('token[]', 0)])
def test_sizes(shape, size):
  assert shape_bytes(shape) == size


# ---------------------------------------------------------------- the roofline


def test_the_longest_of_the_three_bounds_the_step():
  chip = CHIPS['v5e']
  figures = Roofline(chip, chips=4, flops=197e9, passes=6, bytes_moved=819e6, bytes_sent=200e6, model_flops=4 * 100e9,
                     audio_seconds=24).figures()
  assert {name: round(figures[f'{name}_seconds'], 9) for name in ('compute', 'memory', 'network')} == {
      'compute': 0.006, 'memory': 0.001, 'network': 0.001}
  assert (figures['bound'], figures['step_seconds']) == ('compute', pytest.approx(0.006))
  assert figures['utilisation'] == pytest.approx(100e9 / (197e12 * 0.006))
  assert figures['audio_hours_per_day'] == pytest.approx(24 / 0.006 * 86_400 / 3600)


# ---------------------------------------------------------------- the plan


def test_the_real_step(planned):
  plan = planned.plan['topologies']['v5e:2x2']
  assert plan['fits'] and plan['setup']['mesh'] == {'data': 2, 'fsdp': 2, 'tensor': 1}
  memory, resident = plan['memory'], plan['resident']
  state = sum(resident[part] for part in ('parameters', 'optimizer', 'average'))
  # Adam has two moments; the rest of each is small. The compiler pads, so it needs no less than the shards' sum.
  assert 1.9 < resident['optimizer'] / resident['parameters'] < 2.1
  assert state + resident['batch'] <= memory['arguments'] <= memory['peak'] < memory['available'] == 15.75 * 2**30
  assert memory['aliased'] > 0.9 * state  # the state is donated
  assert resident['batch'] == 2 * (3200 * 4 + 4)  # of eight crops, two are a chip's

  # Gradients are summed over all chips, and parameters that are split are gathered; activations stay where they are.
  found = plan['collectives']
  assert 0 < found['all-gather']['payload_bytes'] <= 2 * resident['parameters']
  assert 'all-to-all' not in found
  assert sum(found[kind]['payload_bytes'] for kind in ('all-reduce', 'reduce-scatter') if kind in found) > 0
  parts = plan['model_flops']
  assert {'codec', 'discriminators'} <= parts.keys() and 'teacher' not in parts
  assert plan['flops'] > 0.9 * sum(parts.values()) / 4  # the compiler counts more: elementwise work, padding
  assert plan['cycles']['codec'] > 0 and plan['cycles']['discriminators'] > 0
  assert plan['projected']['bound'] in ('compute', 'memory', 'network')
  assert planned.plan['versions'].keys() == {'lmspt_jax', 'jax', 'libtpu'}


def test_the_table_and_the_picture(planned):
  assert 'Traceback' not in planned.stderr and 'WARNING' not in planned.stderr, planned.stderr
  for words in ('by the compiler', 'counted in the program', 'projected by the roofline, not measured', 'v5e:2x2',
                '2 data x 2 fsdp x 1 tensor', 'of 15.75'):
    assert words in planned.table
  assert ElementTree.fromstring(planned.picture).tag.endswith('svg')


def test_what_does_not_fit_is_said_so(compiled):
  plan = json.loads((compiled / 'does_not_fit.json').read_text())
  assert not plan['fits'] and plan['projected'] == {}
  memory = plan['compiler']['memory']
  assert memory['available'] == pytest.approx(15.75 * 2**30) and memory['peak'] > 100_000**2 * 4
  table = (compiled / 'table.txt').read_text()
  assert f'no: needs {memory["peak"] / 2**30:.2f}' in table and 'yes' in table
  assert ElementTree.fromstring((compiled / 'picture.svg').read_text()) is not None


def test_other_faults_of_the_compiler_are_not_taken_for_it():
  with pytest.raises(jax.errors.JaxRuntimeError, match='VMEM'):
    planning._exhausted(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: VMEM: 20.0M of 16.0M'))


def test_a_batch_that_the_chips_do_not_divide(config_file, capsys, monkeypatch):
  monkeypatch.setattr(planning, 'slice_devices', lambda topology: jax.devices() * 4)
  assert main(['plan', f'--config={config_file}', '--topology=v5e:2x2', '--config.data.batch_size=6']) == 1
  assert 'data.batch_size = 6: not divisible by the 4 devices' in capsys.readouterr().err


def test_without_the_compiler(config_file, capsys, monkeypatch):
  monkeypatch.setattr(planning.importlib.util, 'find_spec', lambda name: None)
  assert main(['plan', f'--config={config_file}', '--topology=v5e:2x2']) == 1
  assert capsys.readouterr().err == (
      "lmspt: error: lmspt plan needs the TPU compiler, libtpu: pip install 'lmspt_jax[plan]'\n")


def test_another_compiler_than_jax_takes(config_file, capsys, monkeypatch):
  monkeypatch.setattr(planning.metadata, 'version', lambda name: '0.9.9')
  assert main(['plan', f'--config={config_file}', '--topology=v5e:2x2']) == 1
  error = capsys.readouterr().err
  assert re.fullmatch(r"lmspt: error: libtpu 0.9.9: jax [\d.]+ takes [\d.]+\.\*, and .* 'lmspt_jax\[plan\]'\n", error)


# ---------------------------------------------------------------- the teacher's sizes


@pytest.mark.parametrize('checkpoint, size', [
    ('hf://openai/whisper-large-v3', 'large-v3'), ('hf://openai/whisper-large-v3-turbo@main', 'large-v3-turbo'),
    ('package:tiny.en', 'tiny.en'), ('hf://Qwen/Qwen2-Audio-7B@main', 'Qwen2-Audio-7B'),
    ('hf://Qwen/Qwen2-Audio-7B-Instruct', 'Qwen2-Audio-7B')])
def test_a_well_known_teacher_by_its_name(checkpoint, size):
  config = replaced(TINY, teacher=TeacherConfig(checkpoint=checkpoint))
  assert planning.teacher_dims(config) == TEACHER_SIZES[size]


def test_a_local_teacher_by_its_header(tmp_path):
  tower = write_tower(tmp_path / 'tower')
  for checkpoint, dims in ((write_teacher(tmp_path / 'teacher'), DIMS), (f'hf:{tower}', TOWER)):
    assert planning.teacher_dims(replaced(TINY, teacher__checkpoint=checkpoint)) == dims


def test_a_teacher_nobody_knows():
  config = replaced(TINY, teacher__checkpoint='hf://somebody/whisper-enormous')
  with pytest.raises(LmsptError, match='nothing is downloaded for a plan'):
    planning.teacher_dims(config)
