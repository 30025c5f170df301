"""Writes tests/fixtures/audio_reference.npz: small excerpts of what PyTorch references compute on real speech.

Needs the parity environment (torch, openai-whisper, librosa, descript-audiotools):

    python tests/parity/make_whisper_fixtures.py

Rewrite the file only when a reference or the bundled speech changes, never to make a test pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
import whisper

sys.path.insert(0, str(Path(__file__).parent))
from _torch_reference import load_audiotools

ROOT = Path(__file__).parents[2]
UTTERANCE = 'asterisk-agent-incorrect'
FRAMES = slice(40, 46)  # speech, away from the borders; borders are kept apart
MEL_SETTINGS = ((16_000, 400, 80), (16_000, 400, 128), (24_000, 256, 40), (24_000, 2048, 320))
STFT_SIZES = (256, 1024)


def main() -> None:
  audio, rate = soundfile.read(ROOT / f'lmspt_jax/assets/speech_sample/audio/{UTTERANCE}.flac', dtype='float32')
  audio = audio[: 2 * rate + 37]  # no whole number of hops
  out = {'length': np.int64(len(audio))}

  for n_mels in (80, 128):
    log_mel = whisper.log_mel_spectrogram(torch.from_numpy(audio), n_mels).numpy().T
    out[f'log_mel_{n_mels}'] = np.concatenate([log_mel[:2], log_mel[FRAMES], log_mel[-2:]])

  for setting in MEL_SETTINGS:
    rate_, fft_size, n_mels = setting
    filters = librosa.filters.mel(sr=rate_, n_fft=fft_size, n_mels=n_mels).T
    bands = [0, 1, n_mels // 3, n_mels // 2, n_mels - 1]
    out['filters_{}_{}_{}'.format(*setting)] = filters[:, bands]
    out['filter_sums_{}_{}_{}'.format(*setting)] = filters.sum(axis=0)

  audiotools = load_audiotools()
  for size in STFT_SIZES:
    for match_stride in (False, True):
      params = audiotools.STFTParams(size, size // 4, 'hann', match_stride=match_stride)
      signal = audiotools.AudioSignal(torch.from_numpy(audio)[None, None], rate, stft_params=params)
      frames = signal.stft()[0, 0].numpy().T
      kept = np.concatenate([frames[:2], frames[40:42], frames[-2:]])
      out[f'stft_{size}_{"match_stride" if match_stride else "center"}'] = kept[:, :: size // 64]
      out[f'stft_count_{size}_{"match_stride" if match_stride else "center"}'] = np.int64(len(frames))

  np.savez_compressed(ROOT / 'tests/fixtures/audio_reference.npz', **out)


if __name__ == '__main__':
  main()
