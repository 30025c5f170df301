"""How fast `lmspt evaluate` is, where its time goes, and that batch size and processes change no number.

    python benchmarks/evaluate_throughput.py --model=runs/demo/run --work=runs/evaluate_throughput

Bundled held-out speech through the model's three paths and all baselines, everything measured. The settings take turns
in one process, so that compiling is in the first turn alone, which is not timed. Processor seconds, of children
too, say more than a clock where other work shares the machine. Afterwards one more evaluation without processes of its
own is profiled.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import time
from pathlib import Path

from common import by_turns, report

SETTINGS = {'batch 1, 2 processes': (1, 2), 'batch 8, 1 process': (8, 1), 'batch 8, 2 processes': (8, 2)}
PARTS = {'ASR': [('whisper_decoding.py', 'listen')], 'DNSMOS': [('quality.py', 'dnsmos_scores')],
         'PESQ': [('signal.py', 'pesq_wide_band')], 'STOI': [('signal.py', 'short_time_intelligibility')],
         'pitch': [('pitch.py', 'pitch_track')], 'speaker encoder': [('speaker.py', 'speaker_embedding')],
         'mel and STFT distance': [('spectral.py', 'spectral_distances')],
         'tokenizer': [('systems.py', 'encode'), ('systems.py', 'decode')],
         'baselines': [('systems.py', 'baseline_audio')], 'loading models': [('run.py', '__init__'),
                                                                            ('systems.py', 'load_models')],
         'intervals and tests': [('run.py', '_table')], 'report.html': [('report.py', 'page')]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--work', type=Path, required=True)
  parser.add_argument('--utterances', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  from lmspt_jax.evaluation.run import METRICS_FILE, ROWS_FILE, Settings, evaluate

  processor_seconds: dict[str, float] = {}  # of the last turn

  def run(name: str, batch_size: int, processes: int) -> None:
    settings = Settings(args.model, 'package:speech_sample', 'valid', args.utterances, batch_size=batch_size)
    before = os.times()
    evaluate(settings, args.work / name, processes)
    processor_seconds[name] = sum(os.times()[:4]) - sum(before[:4])

  seconds = by_turns({name: lambda name=name: run(name, *SETTINGS[name]) for name in SETTINGS}, args.rounds)
  names = list(SETTINGS)
  found = json.loads((args.work / names[0] / METRICS_FILE).read_text())
  audio_seconds = found['data']['seconds']
  report(f'{args.utterances} utterances, {audio_seconds:.1f} s of speech, {len(found["systems"])} systems:', seconds,
         audio_seconds, names[2], names[0])
  for name in names:
    print(f'  {name}: {processor_seconds[name]:.1f} s of processor time')
  report('processes:', {name: seconds[name] for name in names[1:]}, audio_seconds, names[2], names[1])

  lines = {name: {file: (args.work / name / file).read_text().splitlines() for file in (METRICS_FILE, ROWS_FILE)}
           for name in names}
  for name in names[1:]:
    for file, ours in lines[name].items():
      differing = [a.strip() for a, b in zip(lines[names[0]][file], ours, strict=True) if a != b]
      print(f'{name} against {names[0]}: {len(differing)} of {len(ours)} lines of {file} differ: {differing}')

  profile, start = cProfile.Profile(), time.perf_counter()
  profile.runcall(run, 'profiled', 8, 0)
  total = time.perf_counter() - start
  print(f'one process alone, profiled: {total:.1f} s')
  stats = pstats.Stats(profile).stats
  rest = total
  for part, functions in PARTS.items():
    taken = sum(entry[3] for (file, _, function), entry in stats.items()
                if (Path(file).name, function) in functions and 'lmspt_jax' in file)
    rest -= taken
    print(f'  {part:<22} {taken:6.2f} s {taken / total:6.1%}')
  print(f'  {"the rest":<22} {rest:6.2f} s {rest / total:6.1%}', flush=True)


if __name__ == '__main__':
  main()
