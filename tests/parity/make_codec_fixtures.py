"""Writes tests/fixtures/codec.npz from descript-audio-codec. Run: PYTHONPATH=.:tests python THIS_FILE."""

from pathlib import Path

import numpy as np
import torch
from _codec_fixture import KEPT, SMALL, speech, summary, weight
from _torch_tokenizer import Tokenizer


def margins(reference: Tokenizer, audio: torch.Tensor) -> np.ndarray:
  """How much more similar every drawn code is than the next one."""
  found = []

  def compare(quantizer):
    def hook(_, __, latents):
      z_BTD = torch.nn.functional.normalize(latents.transpose(1, 2), dim=-1)
      top = (z_BTD @ torch.nn.functional.normalize(quantizer.codebook.weight).T).topk(2, dim=-1).values
      found.append((top[..., 0] - top[..., 1]).flatten())
    return hook

  handles = [q.in_proj.register_forward_hook(compare(q)) for stack in reference.quantizer.values()
             for q in stack.quantizers]
  with torch.no_grad():
    reference(audio)
  for handle in handles:
    handle.remove()
  return torch.cat(found).numpy()


def main() -> None:
  reference = Tokenizer(SMALL).eval()
  weights = {name: weight(name, tuple(value.shape)) for name, value in reference.state_dict().items()}
  reference.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
  audio = torch.from_numpy(speech())
  margin = margins(reference, audio).min()
  assert margin > 1e-4, f'two codes are as near as {margin}: rounding could pick either, use another seed'

  out = reference(audio)
  losses = torch.stack([out[f'{part}_{term}'].mean() for part in ('semantic', 'acoustic')
                        for term in ('commitment', 'codebook')])
  (out['audio'].square().mean() + out['resynthesis'].square().mean() + losses.sum()).backward()
  with torch.no_grad():
    semantic = reference.decoder(out['z_semantic'])[:, 0]
  arrays = {key: out[key].detach().numpy() for key in ('latent', 'z_semantic', 'z_acoustic')}
  arrays['codes'] = out['codes'].numpy().astype(np.uint8)
  for name, wave in (('audio', out['audio']), ('semantic', semantic), ('resynthesis', out['resynthesis'])):
    arrays[name], arrays[f'{name}_length'] = wave.detach().numpy()[:, ::KEPT], np.array(wave.shape[1])
    print(name, tuple(wave.shape), 'largest', wave.abs().max().item())
  arrays['losses'] = losses.detach().numpy()
  gradients = dict(reference.named_parameters())
  arrays['gradients'] = np.array([summary(gradients[name].grad.numpy()) for name in weights], np.float32)
  arrays['names'] = np.array([*weights])
  arrays['shapes'] = np.array([(*v.shape, 0, 0)[:3] for v in weights.values()], np.int32)
  path = Path(__file__).resolve().parent.parent / 'fixtures' / 'codec.npz'
  np.savez_compressed(path, **arrays)
  used = [len(np.unique(row)) for row in arrays['codes'].swapaxes(0, 1)]
  print(f'{path}: {path.stat().st_size} bytes; smallest margin {margin:.1e}; codes used {used}; '
        f'losses {arrays["losses"]}')


if __name__ == '__main__':
  main()
