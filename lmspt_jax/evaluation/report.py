"""report.html: an evaluation as one page that needs nothing beside it, to look at and to listen to.

What strangers wrote (ids, transcripts, paths) is escaped, and a content security policy keeps the page from loading
anything.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from lmspt_jax.evaluation import charts
from lmspt_jax.measures.measure import RATE
from lmspt_jax.measures.names import METRICS
from lmspt_jax.measures.words import text_errors

REPORT_FILE = 'report.html'
CHOSEN, WORST = 3, 3  # utterances with players
PLAYED = ('original', 'full', 'semantic', 'resynthesis')
_MAX_CURVES = 18
_MAX_HEARD = 24  # words in a row that are wrong, of what the ASR heard: noise can be heard as the same word 200 times
_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
           'media-src data:')
_KEY = ("Words that were not heard are struck out, those that were heard instead underlined. The line below a "
        "spectrogram is the distance from the original in the teacher's features, over time.")
_TITLES = {'original': 'Original', 'full': 'All codebooks', 'semantic': 'Semantic codebook alone',
           'resynthesis': 'Semantic resynthesis (auxiliary decoder)'}


@dataclass(frozen=True)
class Example:
  """An utterance to listen to: float32 at 16 kHz by system, and its codes int [K, T]."""

  row: dict[str, Any]
  audio: Mapping[str, np.ndarray]
  codes_KT: np.ndarray


def choose(rows: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
  """Numbers of the rows to listen to: evenly spaced ones, and the ones in which most words are wrong after `full` (of
  equals, and where there are no words, those of the largest mel distance)."""
  there = [number for number, row in enumerate(rows) if 'full' in row['systems']
           and 'mel_distance' in row['systems']['full']['values']]
  if not there:
    return [], []
  chosen = [there[place] for place in np.unique(np.linspace(0, len(there) - 1, min(CHOSEN, len(there))).astype(int))]

  def badness(number: int) -> tuple[float, float]:
    values = rows[number]['systems']['full']['values']
    return values.get('wer', -1.0), values['mel_distance']

  worst = sorted((number for number in there if number not in chosen), key=badness, reverse=True)[:WORST]
  return chosen, worst


def page(found: dict[str, Any], rows: Sequence[dict[str, Any]], chosen: Sequence[Example], worst: Sequence[Example],
         curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
  """The whole page; `curves` are (steps, values) of a run by name, empty where the model is none."""
  assets = resources.files('lmspt_jax') / 'assets'
  style, script = ((assets / name).read_text('utf-8') for name in ('report.css', 'report.js'))
  sizes = [entry['size'] for entry in found['tokens']['model']]
  parts = [_head(found), _summary(found), _comparisons(found), _distributions(found, rows), _codebooks(found, rows),
           _curves(curves)]
  parts += [f'<section><h2>{title}</h2><p class="soft">{_KEY}</p>{"".join(_example(one, sizes) for one in examples)}'
            '</section>' for title, examples in (('Utterances', chosen), ('Worst utterances', worst)) if examples]
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
          f'<title>Evaluation of {escape(found["settings"]["model"])}</title><style>{style}</style></head>\n'
          f'<body>{"".join(parts)}<script>{script}</script></body></html>\n')


def run_curves(model: str) -> dict[str, tuple[list[float], list[float]]]:
  """Losses and held-out figures over steps where MODEL is a run's workdir; those that never change are left out."""
  path = Path(model) / 'metrics.jsonl'
  found: dict[str, tuple[list[float], list[float]]] = {}
  if not path.is_file():
    return found
  for line in path.read_text('utf-8').splitlines():
    try:
      row = json.loads(line)
    except ValueError:  # cut short by a kill; the run drops it when it goes on
      continue
    for name, value in row.items():
      if name.startswith(('held_out/', 'loss/')) and isinstance(value, int | float):
        steps, values = found.setdefault(name, ([], []))
        steps.append(row['step'])
        values.append(value)
  moving = {name: curve for name, curve in found.items() if len(set(curve[1])) > 1}
  return dict(sorted(moving.items())[:_MAX_CURVES])


# ---------------------------------------------------------------- sections


def _head(found: dict[str, Any]) -> str:
  settings, data = found['settings'], found['data']
  faults = f', {len(data["faults"])} of them not readable' if data['faults'] else ''
  split = f', split {settings["split"]}' if settings['split'] else ''
  search = 'greedy' if settings['beams'] == 1 else f'{settings["beams"]} beams'
  return (f'<h1>Evaluation of {escape(settings["model"])}</h1>'
          f'<p>{data["utterances"]} utterances of {escape(settings["data"] + split)}{faults}, {data["seconds"]:.0f} s. '
          f'Words by {escape(settings["asr"])}, {search}; features of {escape(settings["teacher"])}.</p>'
          f'<p class="soft">model <code>{found["hashes"]["model"]}</code>, data <code>{found["hashes"]["data"][:16]}'
          f'</code>, lmspt_jax {escape(found["versions"]["lmspt_jax"])}. Everything is measured at 16 kHz. '
          'Brackets are 95 % bootstrap intervals over utterances.</p>')


def _summary(found: dict[str, Any]) -> str:
  arrows = {'lower': '↓', 'higher': '↑'}
  head = ''.join(f'<th scope="col">{escape(metric.label)}<small class="soft"> {arrows[metric.better]} '
                 f'{escape(metric.unit)}</small></th>' for metric in METRICS.values())
  body = ''
  for system, entry in found['systems'].items():
    rate = '' if entry['bitrate'] is None else f'<small>{entry["bitrate"]:.0f} bit/s</small>'
    cells = ''.join(_cell(entry['metrics'].get(name)) for name in METRICS)
    body += f'<tr><td>{escape(system)}{rate}</td>{cells}</tr>'
  return (f'<section><h2>Summary</h2>{_table("Summary", f"<tr><th scope=col>system</th>{head}</tr>", body)}'
          '<p class="soft">↓ lower is better, ↑ higher. n: utterances that have the number, where not all do.</p>'
          '</section>')


def _cell(figure: dict[str, Any] | None) -> str:
  if figure is None:
    return '<td>&ndash;</td>'
  if figure['value'] is None:
    return f'<td>&ndash;<small>n = 0 of {figure["missing"]}</small></td>'
  interval = '' if figure['low'] is None else f'<small>[{figure["low"]:.3g}, {figure["high"]:.3g}]</small>'
  count = f'<small>n = {figure["count"]} of {figure["count"] + figure["missing"]}</small>' if figure['missing'] else ''
  return f'<td>{figure["value"]:.3g}{interval}{count}</td>'


def _comparisons(found: dict[str, Any]) -> str:
  names = [name for name in METRICS if any(name in entry['metrics'] for entry in found['comparisons'])]
  head = ''.join(f'<th scope="col">{escape(METRICS[name].label)}</th>' for name in names)
  body = ''
  for entry in found['comparisons']:
    cells = ''
    for name in names:
      figure = entry['metrics'].get(name)
      p = '' if not figure or figure['p'] is None else f'<small>p = {figure["p"]:.2g}</small>'
      cells += _cell(figure).replace('</td>', f'{p}</td>')
    body += f'<tr><td>{escape(entry["first"])} &minus; {escape(entry["second"])}</td>{cells}</tr>'
  table = _table('Differences', f'<tr><th scope=col>pair</th>{head}</tr>', body)
  return ('<section><h2>Differences</h2><p class="soft">First minus second over the utterances that have both, with '
          f'the p of a two-sided paired permutation test.</p>{table}</section>')


def _table(label: str, head: str, body: str) -> str:
  return (f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead>{head}</thead>'
          f'<tbody>{body}</tbody></table></div>')


def _distributions(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
  figures = []
  for name, metric in METRICS.items():
    values = {system: [row['systems'][system]['values'][name] for row in rows
                       if name in row['systems'].get(system, {}).get('values', {})] for system in found['systems']}
    if svg := charts.distributions(values, metric.label):
      figures.append(_figure(f'{metric.label}{f" ({metric.unit})" if metric.unit else ""}', svg))
  return f'<section><h2>Distributions over utterances</h2><div class="grid">{"".join(figures)}</div></section>'


def _codebooks(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
  labels = {'usage': 'usage', 'perplexity': 'perplexity', 'entropy': 'entropy, bits', 'bitrate': 'entropy, bit/s',
            'repeat_rate': 'repeats', 'entropy_2': 'bits after one code', 'entropy_3': 'bits after two codes'}
  head = ''.join(f'<th scope="col">{label}</th>' for label in ('size', *labels.values()))
  out = ''
  for label, entries in found['tokens'].items():
    body, series = '', {}
    for number, entry in enumerate(entries):
      kind = 'semantic' if number == 0 else 'acoustic'
      body += (f'<tr><td>{number} {kind}</td><td>{entry["size"]}</td>'
               f'{"".join(_cell(entry[name]) for name in labels)}</tr>')
      codes = [row['codes']['' if label == 'model' else label][number] for row in rows
               if ('' if label == 'model' else label) in row.get('codes', {})]
      counts = np.sort(np.bincount(np.concatenate(codes), minlength=entry['size']))[::-1] if codes else np.zeros(0)
      series[f'codebook {number}'] = (np.arange(len(counts)), counts / max(1, counts.sum()))
    svg = charts.lines(series, f'Share of frames of each code of {label}, most frequent first')
    table = _table(f'Codebooks of {escape(label)}', f'<tr><th scope=col>codebook</th>{head}</tr>', body)
    figure = _figure('Share of frames of each code, most frequent first', svg)
    out += f'<h3>{escape(label)}</h3>{table}<div class="grid">{figure}</div>'
  return f'<section><h2>Codebooks</h2>{out}</section>'


def _curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
  if not curves:
    return ''
  figures = [_figure(f'{name}: {values[0]:.3g} to {values[-1]:.3g}', charts.lines({name: (steps, values)}, name))
             for name, (steps, values) in curves.items()]
  return f'<section><h2>Training, over steps</h2><div class="grid">{"".join(figures)}</div></section>'


def _figure(caption: str, content: str) -> str:
  return f'<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>'


# ---------------------------------------------------------------- utterances


def _example(example: Example, sizes: Sequence[int]) -> str:
  row = example.row
  parts = [_system(example, system) for system in PLAYED if system in example.audio]
  grid = charts.token_grid(example.codes_KT, sizes)
  picture = f'<img class="tokens" src="{grid}" alt="Codes of {escape(row["id"])} over time">'
  parts.append('<div class="system"><p class="soft">Codes over time, the semantic codebook on top</p>'
               f'<div class="track">{picture}</div></div>')
  text = escape(row['text']) or '<span class="soft">no transcript</span>'
  return (f'<article><h3>{escape(row["id"])}</h3><p>{text} <span class="soft">{row["seconds"]:.1f} s'
          f'</span></p>{"".join(parts)}</article>')


def _system(example: Example, system: str) -> str:
  row, title = example.row, _TITLES[system]
  measured = row['systems'][system]
  name = escape(f'{title} of {row["id"]}')
  sound = charts.data_uri(_wav(example.audio[system]), 'audio/wav')
  values = ' · '.join(f'{METRICS[key].label} {value:.3g}' for key, value in measured['values'].items()
                     if key in ('wer', 'pesq', 'stoi', 'mel_distance', 'dnsmos', 'teacher_distance'))
  distance = ''
  if measured['along_time']:
    series = {'distance': (np.arange(len(measured['along_time'])), measured['along_time'])}
    svg = charts.lines(series, f'Distance in the teacher over time, {title} of {row["id"]}', 48, stretch=True)
    distance = f'<div class="track">{svg}<span class="cursor"></span></div>'
  return (f'<div class="system"><h4>{title}</h4><p>{_marked(row, measured)}</p>'
          f'<audio controls preload="metadata" aria-label="{name}" src="{sound}"></audio>'
          f'<div class="track"><img src="{charts.spectrogram(example.audio[system])}" alt="Spectrogram: {name}">'
          f'<span class="cursor"></span></div>{distance}<p class="soft">{escape(values)}</p></div>')


def _wav(audio_N: np.ndarray) -> bytes:
  """16-bit PCM: what every browser plays (Chromium refuses a FLAC of a single frame)."""
  buffer = io.BytesIO()
  soundfile.write(buffer, np.clip(audio_N, -1, 1), RATE, format='WAV', subtype='PCM_16')
  return buffer.getvalue()


def _marked(row: dict[str, Any], measured: dict[str, Any]) -> str:
  """What the ASR heard with its word errors: what is missing struck out, what is there instead underlined."""
  if 'wer' in measured['missing']:
    return escape(measured['heard']) + f' <span class="soft">{escape(measured["missing"]["wer"])}</span>'
  parts = []
  for kind, wanted, heard in text_errors(row['text'], measured['heard'], row['language']).aligned:
    if kind == 'equal':
      parts.append(escape(wanted))
    else:
      parts += [f'<del title="not heard">{escape(wanted)}</del>'] if wanted else []
      parts += [f'<ins title="heard instead">{escape(_shortened(heard))}</ins>'] if heard else []
  return 'Heard: ' + ' '.join(parts)


def _shortened(heard: str) -> str:
  words = heard.split()
  more = len(words) - _MAX_HEARD
  return heard if more <= 0 else f'{" ".join(words[:_MAX_HEARD])} … ({more} more words)'
