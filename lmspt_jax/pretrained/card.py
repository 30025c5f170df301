"""The model card of an exported folder: Markdown with the YAML head that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# Licences that the hub knows by the same name in lower case; another one is 'other', with its words.
_HUB_LICENSES = ('apache-2.0', 'mit', 'cc0-1.0', 'cc-by-3.0', 'cc-by-4.0', 'cc-by-sa-3.0', 'cc-by-sa-4.0',
                 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0', 'bsd-2-clause', 'bsd-3-clause', 'gpl-2.0', 'gpl-3.0')

_USAGE = {
    'safetensors': '''```python
from lmspt_jax import Tokenizer

tokenizer = Tokenizer.from_pretrained('DIR')             # this folder; or hf://org/name
codes = tokenizer.encode(audio, sample_rate=16_000)      # Codes: ids [K, T], num_samples
audio = tokenizer.decode(codes)                          # float32 [num_samples] at {sample_rate} Hz
```

    lmspt encode --model=DIR --out=codes recordings/*.wav
    lmspt decode --model=DIR --out=audio codes/*.npz

`model.safetensors` is in the layout of the authors' release: their PyTorch model loads it strictly.''',
    'onnx': '''```python
import onnxruntime

encode = onnxruntime.InferenceSession('DIR/encode.onnx')
decode = onnxruntime.InferenceSession('DIR/decode.onnx')
# float32 [batch, samples] at {sample_rate} Hz -> int32 [batch, {codebooks}, frames]
(ids,) = encode.run(None, {'audio': audio})
(again,) = decode.run(None, {'ids': ids})                # ids[:, :1]: what is said, without how it sounds
```''',
    'stablehlo': '''```python
import jax
import safetensors.numpy
from pathlib import Path

def load(name):
  graph = jax.export.deserialize(bytearray(Path(f'DIR/{name}.stablehlo').read_bytes()))
  return jax.jit(graph.call), jax.device_put(safetensors.numpy.load_file(f'DIR/{name}.safetensors'))

# float32 [batch, samples] at {sample_rate} Hz -> int32 [batch, {codebooks}, frames]
encode, weights = load('encode')
ids = encode(weights, audio)
decode, weights = load('decode')
again = decode(weights, ids)                             # ids[:, :1]: what is said, without how it sounds
```''',
}


def model_card(fields: dict[str, Any], files: Sequence[str]) -> str:
  """The card.

  Args:
    fields: of the folder's config.json.
    files: names of the folder's other files.
  """
  license, sizes = fields['license'], fields['codebook_sizes']
  known = license.lower() in _HUB_LICENSES
  head = ['---', f'license: {license.lower() if known else "other"}']
  if not known:
    head.append(f'license_name: {json.dumps(license, ensure_ascii=False)}')
  head += ['library_name: lmspt_jax', 'pipeline_tag: audio-to-audio', 'tags: [speech, speech-tokenizer, audio-codec]',
           '---']
  step = f'step {fields["step"]:,}' if fields['step'] else 'not known'
  weights = {'average': f'moving average, {step}', 'last': step}.get(fields['weights'], step)
  rows = [
      ('sample rate', f'{fields["sample_rate"]} Hz ({fields["resynthesis_sample_rate"]} Hz for the resynthesis)'),
      ('frame rate', f'{fields["frame_rate"]:g} Hz ({fields["hop"]} samples a frame)'),
      ('codebooks', f'semantic {sizes[0]}; acoustic {", ".join(map(str, sizes[1:]))}'),
      ('causal', 'yes' if fields['model']['causal'] else 'no'),
      ('weights', weights),
      ('teacher', fields['teacher_id'] or 'none'),
      ('hash', f'`{fields["hash"]}`'),
      ('files', ', '.join(f'`{name}`' for name in files)),
  ]
  parts = [
      '\n'.join(head), f'# {fields["name"]}',
      'A speech tokenizer: LM-SPT ([arXiv 2506.16738](https://arxiv.org/abs/2506.16738)). Codebook 0 is semantic, what '
      'is said; the others are acoustic, how it sounds.',
      _table(('', ''), rows), '## Use', _usage(fields), '## Licence', f'{license}.'.replace('..', '.'), '## Data',
      _data(fields['data'])]
  if fields['metrics']:
    parts += ['## Held-out figures', _table(('figure', 'value'), [
        (name.partition('/')[2], f'{value:.4g}') for name, value in sorted(fields['metrics'].items())])]
  return '\n\n'.join(parts) + '\n'


def _usage(fields: dict[str, Any]) -> str:
  text = _USAGE[fields['export']].replace('{sample_rate}', str(fields['sample_rate']))
  return text.replace('{codebooks}', str(len(fields['codebook_sizes'])))


def _data(data: Sequence[dict[str, Any]]) -> str:
  if not data:
    return 'Not named by what this was exported from.'
  rows = []
  for corpus in data:
    chosen = ' '.join(part for part in (corpus['split'], corpus['where']) if part)
    hours, licenses = corpus.get('hours'), ', '.join(corpus.get('licenses', ()))
    rows.append((f'`{corpus["uri"]}`', chosen, corpus.get('utterances', 'not known'),
                 'not known' if hours is None else f'{hours:,.1f}', licenses or 'not known'))
  return _table(('corpus', 'chosen', 'utterances', 'hours', 'licences'), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
