"""How well a model keeps what is said and how it sounds: intelligibility, signal and tokens, beside baselines.

Writes DIR/metrics.json, every number with its count and 95 % interval, DIR/utterances.jsonl, a row an utterance, and
DIR/report.html, a page to look at and to listen to. docs/evaluation.md says what each number is.
"""

from __future__ import annotations

import argparse

from lmspt_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, metavar='MODEL', help=flags.MODEL)
  parser.add_argument('--data', required=True, metavar='KIND:URI', help='recordings with transcripts')
  parser.add_argument('--out', required=True, metavar='DIR')
  parser.add_argument('--split', default='', help='of the data (default: all of it)')
  parser.add_argument('--limit', type=int, default=0, metavar='N', help='utterances, drawn with a fixed seed')
  parser.add_argument('--baseline', action='append', default=[], metavar='MODEL',
                      help='another model, compared utterance by utterance; may be given again')
  parser.add_argument('--asr', default='package:tiny.en', metavar='WHISPER',
                      help='package:NAME, openai:FILE, hf:DIR, hf://org/name or ctranslate2:DIR (default: %(default)s)')
  parser.add_argument('--beams', type=int, default=1, metavar='N', help='of its search (default: 1, greedy)')
  parser.add_argument('--teacher', default='', metavar='WHISPER',
                      help="speech encoder for distances in features (default: the run's own, else the ASR)")
  parser.add_argument('--batch-size', type=int, default=8, metavar='N',
                      help='recordings held at a time; changes no number (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
  from lmspt_jax.evaluation.report import REPORT_FILE
  from lmspt_jax.evaluation.run import METRICS_FILE, Settings, evaluate
  from lmspt_jax.measures.names import METRICS

  settings = Settings(model=args.model, data=args.data, split=args.split, limit=args.limit,
                      baselines=tuple(args.baseline), asr=args.asr, teacher=args.teacher, beams=args.beams,
                      batch_size=args.batch_size)
  found = evaluate(settings, args.out)
  shown = ('wer', 'stoi', 'mel_distance', 'dnsmos', 'teacher_distance')
  width = max(map(len, found['systems']))
  print(f'{"":<{width}}', *(f'{name:>17}' for name in shown))
  for system, entry in found['systems'].items():
    print(f'{system:<{width}}', *(_cell(entry['metrics'].get(name)) for name in shown))
  data = found['data']
  print(f'{data["utterances"]} utterances, {data["seconds"]:.1f} s, {len(data["faults"])} not readable; '
        f'{len(METRICS)} metrics with 95 % intervals: {args.out}/{METRICS_FILE}\nto look at and to listen to: '
        f'{args.out}/{REPORT_FILE}')
  return 0


def _cell(figure: dict | None) -> str:
  if not figure or figure['value'] is None:
    return f'{"-":>17}'
  text = f'{figure["value"]:.3f}'
  if figure['low'] is not None:
    text += f' {figure["low"]:.2f}-{figure["high"]:.2f}'
  return f'{text:>17}'
