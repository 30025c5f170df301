"""The release's work per training item, in PyTorch: what `kakao/lmspt` (b6e52d5) does in its dataset and collator.

Facts followed (lmspt/dataset/codec_dataset.py, lmspt/model_codec/teacher/whisper.py, lmspt/conf/data/emilia.yaml):

* the whole file is decoded to float32 for every item, and the channels are averaged (`_get_audio`);
* the whole recording is resampled to the model's 24 kHz, unless it has that rate (`__getitem__`), and once more to the
  teacher's 16 kHz, unless it has that (`get_input`);
* only then are six seconds cut from both, at a random place, or zeros appended (`_sample_segment`);
* the teacher's log-mel of 30 s, 24 of them padding, is made in the loader as well (`feature_extractor`; ours is made
  on the device): `log_mel=False` leaves it out;
* rows are stacked by pad_sequence, and the seconds that are not padding are summed (`AudioSemanticFeatCollator`);
* `DataLoader` with shuffle and worker processes.

What is different: files are read with soundfile, the decoder that our side uses too and torchaudio's own backend until
2.8 (torchaudio.load needs torchcodec and FFmpeg by now), and the resampler is written here after the formula of
torchaudio.functional.resample's defaults (windowed sinc, six zero crossings, roll-off 0.99, one strided convolution);
it gives the same samples to 1e-6 in the same time.
"""

from __future__ import annotations

import math
import random
from typing import Any

import soundfile

MODEL_RATE, TEACHER_RATE = 24_000, 16_000  # Hz


def resample(audio: Any, old: int, new: int) -> Any:
  """Tensor [N] at `old` Hz to [ceil(N * new / old)] at `new` Hz."""
  import torch
  if old == new:
    return audio
  common = math.gcd(old, new)
  old, new = old // common, new // common
  cutoff, crossings = min(old, new) * 0.99, 6
  width = math.ceil(crossings * old / cutoff)
  places = torch.arange(-width, width + old) / old - torch.arange(new)[:, None] / new
  places = (places * cutoff).clamp(-crossings, crossings)
  kernel = torch.sinc(places) * torch.cos(places * math.pi / (2 * crossings)) ** 2 * (cutoff / old)
  padded = torch.nn.functional.pad(audio, (width, width + old))
  out = torch.nn.functional.conv1d(padded[None, None], kernel[:, None], stride=old)[0]
  return out.T.reshape(-1)[:-(-audio.shape[0] * new // old)]


class ReleaseDataset:
  """Paths to items: 'speech' [6 s at 24 kHz], 'teacher' [6 s at 16 kHz] or 'input_features', 'duration' in seconds."""

  def __init__(self, paths: list[str], seconds: float, *, log_mel: bool = False):
    self.paths, self.seconds, self.log_mel = paths, seconds, log_mel

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    import torch
    samples, rate = soundfile.read(self.paths[index], dtype='float32', always_2d=True)
    audio = torch.from_numpy(samples.T).mean(dim=0)
    model_audio, teacher_audio = resample(audio, rate, MODEL_RATE), resample(audio, rate, TEACHER_RATE)
    size = int(MODEL_RATE * self.seconds)
    start = random.randint(0, max(0, model_audio.shape[0] - size))
    item = {'duration': min(model_audio.shape[0], size) / MODEL_RATE, 'speech': _cut(model_audio, start, size)}
    teacher = _cut(teacher_audio, int(start * TEACHER_RATE / MODEL_RATE), int(TEACHER_RATE * self.seconds))
    if self.log_mel:
      import whisper
      item['input_features'] = whisper.log_mel_spectrogram(whisper.pad_or_trim(teacher), n_mels=128)
    else:
      item['teacher'] = teacher
    return item


def _cut(audio: Any, start: int, size: int) -> Any:
  import torch
  part = audio[start:start + size]
  return torch.nn.functional.pad(part, (0, size - part.shape[0]))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
  """Tensors stacked, durations summed."""
  from torch.nn.utils.rnn import pad_sequence
  batch = {key: pad_sequence([item[key] for item in items], batch_first=True) for key in items[0] if key != 'duration'}
  return {**batch, 'duration': sum(item['duration'] for item in items)}


def loader(paths: list[str], seconds: float, batch_size: int, workers: int, *, log_mel: bool) -> Any:
  """A torch DataLoader; each process computes in one thread, as DataLoader's workers do."""
  import torch
  torch.set_num_threads(1)
  return torch.utils.data.DataLoader(
    ReleaseDataset(paths, seconds, log_mel=log_mel), batch_size=batch_size, num_workers=workers, collate_fn=collate,
    shuffle=True, drop_last=True)
