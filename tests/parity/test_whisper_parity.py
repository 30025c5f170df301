"""Whisper and its front end against openai-whisper, librosa and descript-audiotools, live, with tiny.en's weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jiwer
import librosa
import numpy as np
import pytest
import soundfile
import torch
import whisper as openai_whisper
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

import lmspt_jax
from lmspt_jax.audio import mel, stft
from lmspt_jax.cli.main import main
from lmspt_jax.convert import whisper as convert
from lmspt_jax.convert.torch_zip import TorchFile
from lmspt_jax.convert.whisper_names import HUGGING_FACE_NAMES
from lmspt_jax.models import whisper
from lmspt_jax.models.whisper_decoding import WhisperVocabulary, transcribe

sys.path.insert(0, str(Path(__file__).parent))
from _torch_reference import load_audiotools
from _torch_whisper import openai_model, state_dict

BOTH = ('encoder', 'decoder')
SAMPLE = Path(lmspt_jax.__file__).parent / 'assets' / 'speech_sample'


@pytest.fixture(scope='module')
def tiny():
  return convert.load_whisper('package:tiny.en', BOTH)


@pytest.fixture(scope='module')
def reference(tiny):
  """openai-whisper's model with the same weights; strict: every name must be its own."""
  return openai_model(tiny)


@pytest.mark.parametrize('n_mels', [80, 128])
def test_log_mel(padded_speech, n_mels):
  for floor, rows in (('item', [padded_speech[:1], padded_speech[1:]]), ('batch', [padded_speech])):
    ours = np.asarray(mel.log_mel_spectrogram(padded_speech, n_mels, floor=floor))
    theirs = [openai_whisper.log_mel_spectrogram(torch.from_numpy(row), n_mels).numpy() for row in rows]
    np.testing.assert_allclose(ours, np.concatenate(theirs).swapaxes(1, 2), atol=1e-4)


def test_encoder_and_decoder(tiny, reference, padded_speech):
  mel_BTF = np.asarray(mel.log_mel_spectrogram(padded_speech, 80))
  ours = jax.jit(lambda p, x: whisper.bind(whisper.WhisperEncoder, tiny.dims, p)(x))(tiny.params['encoder'], mel_BTF)
  with torch.no_grad():
    theirs = reference.encoder(torch.from_numpy(mel_BTF.swapaxes(1, 2).copy()))
  error_BTD = np.abs(np.asarray(ours) - theirs.numpy())
  rms, worst = np.sqrt(np.mean(error_BTD**2)), error_BTD.max(axis=-1)
  print(f'encoder: rms error {rms:.2e}, max {worst.max():.2e}, at rms {theirs.square().mean().sqrt():.2f}')
  # Relative to the largest value, as in the other parity tests. One position of these 3000 is ill conditioned: the
  # two sum float32 products in different orders and differ by 1.3e-3 there; in float64 by 1e-12 (the next test).
  assert rms <= 1e-5 and worst.max() / theirs.abs().max() <= 1e-3

  tokens = np.random.default_rng(0).integers(0, 50_000, (2, 20)).astype(np.int32)
  logits = jax.jit(lambda p, t, x: whisper.bind(whisper.WhisperDecoder, tiny.dims, p)(t, x))(
    tiny.params['decoder'], tokens, theirs.numpy()
  )
  with torch.no_grad():
    expected = reference.decoder(torch.from_numpy(tokens).long(), theirs).numpy()
  error = np.abs(np.asarray(logits) - expected).max()
  print(f'decoder: max error {error:.2e} at rms {np.sqrt((expected**2).mean()):.2f}')
  assert error <= 1e-3


def test_encoder_in_double_precision(tiny, reference, padded_speech, monkeypatch):
  """Rounding out of the way, what is computed is the same."""
  mel_BTF = np.asarray(mel.log_mel_spectrogram(padded_speech[1:], 80)).astype(np.float64)
  params = jax.tree.map(lambda value: value.astype(np.float64), tiny.params['encoder'])
  with jax.enable_x64(True):
    ours = jax.jit(lambda p, x: whisper.bind(whisper.WhisperEncoder, tiny.dims, p, dtype=jnp.float64)(x))(
      params, mel_BTF
    )
  # The reference's layer norm casts to float32.
  monkeypatch.setattr(openai_whisper.model.LayerNorm, 'forward', torch.nn.LayerNorm.forward)
  encoder = copy.deepcopy(reference.encoder).double()
  with torch.no_grad():
    theirs = encoder(torch.from_numpy(mel_BTF.swapaxes(1, 2).copy())).numpy()
  assert ours.dtype == np.float64
  error = np.abs(np.asarray(ours) - theirs).max()
  print(f'encoder in float64: max error {error:.2e}')
  assert error <= 1e-10


@pytest.fixture(scope='module')
def openai_file(reference, tmp_path_factory) -> Path:
  """tiny.en as openai-whisper saves its models."""
  path = tmp_path_factory.mktemp('openai') / 'tiny.en.pt'
  torch.save({'dims': dataclasses.asdict(reference.dims), 'model_state_dict': reference.state_dict()}, path)
  return path


@pytest.fixture(scope='module')
def hugging_face_folder(tiny, tmp_path_factory) -> Path:
  """tiny.en as `transformers` saves it."""
  folder = tmp_path_factory.mktemp('transformers')
  config = WhisperConfig(
      num_mel_bins=80, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
      decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, vocab_size=51864)
  model = WhisperForConditionalGeneration(config)
  tensors = {f'model.{name}': torch.from_numpy(value) for name, value in state_dict(tiny, HUGGING_FACE_NAMES).items()}
  model.load_state_dict(tensors | {'proj_out.weight': tensors['model.decoder.embed_tokens.weight']}, strict=True)
  model.save_pretrained(folder)
  return folder


def test_three_formats_give_identical_parameters_and_transcripts(
    tiny, openai_file, hugging_face_folder, padded_speech, tmp_path):
  """CTranslate2, OpenAI and Hugging Face, and what `lmspt convert` makes of the first two."""
  vocabulary = WhisperVocabulary.from_file(tiny.tokenizer_path)
  expected = transcribe(tiny.dims, tiny.params, vocabulary, list(padded_speech), batch_size=2)
  assert all(len(text.split()) > 3 for text in expected), expected
  uris = [f'openai:{openai_file}', f'hf:{hugging_face_folder}']
  for source in ('package:tiny.en', uris[0]):
    uris.append(f'hf:{tmp_path / str(len(uris))}')
    assert main(['convert', f'--from={source}', f'--to={uris[-1]}']) == 0
  for uri in uris:
    other = convert.load_whisper(uri, BOTH)
    assert other.dims == tiny.dims
    assert jax.tree.structure(other.params) == jax.tree.structure(tiny.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, other.params, tiny.params)), uri
    assert transcribe(other.dims, other.params, vocabulary, list(padded_speech), batch_size=2) == expected


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_transformers_loads_what_convert_writes(tiny, openai_file, padded_speech, tmp_path, dtype):
  assert main(['convert', f'--from=openai:{openai_file}', f'--to=hf:{tmp_path}/hf', f'--dtype={dtype}']) == 0
  model, report = WhisperForConditionalGeneration.from_pretrained(
      tmp_path / 'hf', output_loading_info=True, dtype=torch.float32)
  assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
  assert model.config.dtype == torch.float32 and model.config.torch_dtype == torch.float32
  ours = convert.load_whisper(f'hf:{tmp_path}/hf', BOTH)
  mel_BTF = np.asarray(mel.log_mel_spectrogram(padded_speech[:1], 80))
  tokens = np.array([[50257, 50362, 770, 318, 257, 1332]], np.int32)
  logits = jax.jit(lambda p, x, t: whisper.bind(whisper.Whisper, ours.dims, p)(x, t))(ours.params, mel_BTF, tokens)
  inputs = torch.from_numpy(mel_BTF.swapaxes(1, 2).copy())
  with torch.no_grad():
    encoder = WhisperModel.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval().encoder
    assert torch.equal(encoder(inputs).last_hidden_state, model.eval().model.encoder(inputs).last_hidden_state)
    # transformers adds the positions of the file, in float16 rounded ones; here they are computed.
    positions = torch.from_numpy(np.array(whisper.sinusoids(1500, 384)))
    torch.testing.assert_close(model.model.encoder.embed_positions.weight, positions.to(getattr(torch, dtype)).float(),
                               rtol=0, atol=0)
    model.model.encoder.embed_positions.weight.copy_(positions)
    expected = model(inputs, decoder_input_ids=torch.from_numpy(tokens).long()).logits.numpy()
  error = np.abs(np.asarray(logits) - expected).max()
  print(f'{dtype}: logits differ by {error:.1e} at most, at rms {np.sqrt((expected**2).mean()):.2f}')
  assert error <= 1e-3


def test_torch_files_of_other_layouts(tmp_path):
  """Half and bfloat16 storages, a transposed view, a slice of a shared storage, an empty tensor, and OrderedDict."""
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  tensors = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with _metadata
  tensors |= {'t': base.T, 's': base[1:3, 2:5], 'h': base.half(), 'b': base.bfloat16(), 'e': base[:0]}
  torch.save(tensors, tmp_path / 'x.pt')
  file = TorchFile(tmp_path / 'x.pt')
  assert file.content.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(file.read(file.content[name]).astype(np.float32), tensor.float().numpy())


@pytest.mark.parametrize('setting', [(24_000, 256, 40), (24_000, 512, 80), (24_000, 1024, 160), (24_000, 2048, 320)])
def test_stft_and_mel_of_audiotools(padded_speech, setting):
  rate, size, n_mels = setting
  audiotools = load_audiotools()
  x_BN = padded_speech[:, : 2 * rate + 11]
  for padding in ('center', 'match_stride'):
    params = audiotools.STFTParams(size, size // 4, 'hann', match_stride=padding == 'match_stride')
    signal = audiotools.AudioSignal(torch.from_numpy(x_BN)[:, None], rate, stft_params=params)
    theirs = signal.stft()[:, 0].numpy().swapaxes(1, 2)
    ours = np.asarray(stft.stft(x_BN, size, size // 4, padding))
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())
  theirs = signal.mel_spectrogram(n_mels)[:, 0].numpy().swapaxes(1, 2)
  np.testing.assert_allclose(np.abs(ours) @ mel.mel_filters(*setting), theirs, atol=1e-5)


@pytest.mark.parametrize('bounds', [(0.0, None), (50.0, 8000.0)])
@pytest.mark.parametrize('setting', [(16_000, 400, 80), (16_000, 400, 128), (24_000, 2048, 320), (44_100, 512, 80)])
def test_mel_filters_of_librosa(setting, bounds):
  rate, size, n_mels = setting
  theirs = librosa.filters.mel(sr=rate, n_fft=size, n_mels=n_mels, fmin=bounds[0], fmax=bounds[1]).T
  np.testing.assert_allclose(mel.mel_filters(*setting, *bounds), theirs, atol=1e-7)


@pytest.mark.parametrize(('beams', 'every'), [(1, 1), (5, 4)])
def test_transcripts_of_openai_whisper(tiny, reference, beams, every):
  """At least 98 % of the words of the bundled sample, greedy and by beam search."""
  rows = [json.loads(line) for line in (SAMPLE / 'manifest.jsonl').read_text('utf-8').splitlines()][::every]
  audios = [soundfile.read(SAMPLE / row['path'], dtype='float32')[0] for row in rows]
  vocabulary = WhisperVocabulary.from_file(tiny.tokenizer_path)
  ours = transcribe(tiny.dims, tiny.params, vocabulary, audios, beams=beams)
  options = openai_whisper.DecodingOptions(language='en', without_timestamps=True, fp16=False, temperature=0.0,
                                           beam_size=beams if beams > 1 else None)
  theirs = []
  for audio in audios:
    mel_FT = openai_whisper.log_mel_spectrogram(openai_whisper.pad_or_trim(torch.from_numpy(audio)))
    theirs.append(openai_whisper.decode(reference, mel_FT, options).text)
  found = jiwer.process_words(theirs, ours)
  words = sum(map(len, found.references))
  print(f'{beams} beams: {found.hits} of {words} words as openai-whisper hears them, in {len(rows)} utterances')
  assert words > 600 // every and found.hits >= 0.98 * words and found.insertions <= 0.02 * words
