"""`make demo` without its training: which verbs it runs, in which order, on what; and when it fails."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest

from lmspt_jax import demo
from lmspt_jax.cli import flags, main
from lmspt_jax.data.sources import open_source
from lmspt_jax.errors import LmsptError
from lmspt_jax.evaluation.report import REPORT_FILE

STEP_0 = {'mel': 3.4, 'distillation': 1.7, 'distinct_semantic': 500, 'perplexity_semantic': 400,
          'distinct_acoustic': 500, 'perplexity_acoustic': 400}
LAST = {**STEP_0, 'mel': 2.0, 'distillation': 1.2}


@pytest.fixture
def verbs(monkeypatch):
  """What was called, with arguments as its own parser reads them. `train` leaves `figures` of two evaluations."""

  class Verbs(list):
    def __init__(self):
      self.figures, self.statuses = ((0, STEP_0), (200, LAST)), {}

    def __call__(self, argv):
      verb, *rest = argv
      parser = main.Parser()
      importlib.import_module(f'lmspt_jax.cli.{verb}').add_arguments(parser)
      self.append((verb, parser.parse_args(flags.split_overrides(rest)[1])))
      if verb == 'train':
        workdir = Path(self[-1][1].workdir)
        workdir.mkdir(parents=True)
        rows = [{'step': step, **{f'held_out/{name}': value for name, value in row.items()}}
                for step, row in self.figures]
        (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [*rows, {'step': 201}]))
      return self.statuses.get(verb, 0)

  found = Verbs()
  monkeypatch.setattr(main, 'main', found)
  return found


def test_every_verb_and_the_report_at_the_end(verbs, tmp_path, capsys):
  assert demo.main(['--out', str(tmp_path)]) == 0
  assert [verb for verb, _ in verbs] == ['prepare', 'train', 'encode', 'decode', 'evaluate']
  prepare, train, encode, decode, evaluate = (arguments for _, arguments in verbs)
  held_out = open_source('package:speech_sample', 'valid')
  names = {held_out[i].id for i in range(len(held_out))}
  assert {Path(path).stem for path in encode.audio} < names and all(Path(path).is_file() for path in encode.audio)
  assert [Path(path).stem for path in decode.codes] == [Path(path).stem for path in encode.audio]
  assert Path(decode.codes[0]).parent == Path(encode.out)
  assert {encode.model, decode.model, evaluate.model} == {train.workdir}
  assert evaluate.data == f'arrayrecord:{prepare.out}' and evaluate.split == 'valid'
  assert 0 < evaluate.limit <= len(names)
  printed = capsys.readouterr().out
  assert printed.endswith(f'{evaluate.out}/{REPORT_FILE}\n') and '58.8%   <= 65% of step 0: yes' in printed


def test_a_verb_that_fails_ends_it(verbs, tmp_path):
  verbs.statuses = {'train': 75}
  with pytest.raises(SystemExit) as left:
    demo.main(['--out', str(tmp_path)])
  assert left.value.code == 75 and [verb for verb, _ in verbs] == ['prepare', 'train']


def test_figures_that_are_not_reached_and_none_of_step_0(verbs, tmp_path, capsys):
  verbs.figures = ((0, STEP_0), (200, {**LAST, 'distinct_semantic': 63}))
  assert demo.main(['--out', str(tmp_path / 'a')]) == 1
  assert capsys.readouterr().out.count('NO\n') == 1
  verbs.figures = ((100, LAST), (200, LAST))
  with pytest.raises(LmsptError, match='no held-out figures of step 0; remove the folder'):
    demo.main(['--out', str(tmp_path / 'b')])


def test_make_demo_installs_what_evaluate_needs(tmp_path):
  """From a clean clone: the commands of `make -n` where there is no .venv."""
  said = subprocess.run(['make', '-n', 'demo', f'VENV={tmp_path}/venv'], cwd=Path(__file__).parents[1],
                        capture_output=True, text=True, check=True).stdout
  steps = [said.index(part) for part in ("-e '.[demo]'", '--no-deps -r requirements/evaluate-no-deps.txt',
                                         '-m lmspt_jax.demo --out runs/demo')]
  assert steps == sorted(steps)
