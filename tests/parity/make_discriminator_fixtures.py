"""Writes tests/fixtures/discriminator.npz from descript-audio-codec. Run: PYTHONPATH=. python THIS_FILE."""

import numpy as np
import torch
from _torch_discriminator import ROOT, channels_last, gan_loss, mel_loss, torch_discriminator

from _discriminator_fixture import SAMPLES, SMALL, speech  # isort: skip (found by the line above)


def main() -> None:
  reference = torch_discriminator(SMALL, 16_000)
  real, fake = speech(2, SAMPLES)
  real_t, fake_t = torch.from_numpy(real), torch.from_numpy(fake).requires_grad_()
  gan, signal = gan_loss(reference)
  discriminator = gan.discriminator_loss(signal(fake_t), signal(real_t))
  adversarial, feature = gan.generator_loss(signal(fake_t), signal(real_t))
  mel = mel_loss(fake_t, real_t, 16_000)
  arrays = {f'weight/{k}': v.numpy() for k, v in reference.state_dict().items()}
  for i, part in enumerate(channels_last(reference(real_t[:, None]), SMALL)):
    arrays[f'logits/{i}'] = part[-1]
    # A map as two numbers each: the root mean square, and the mean weighted by a ramp, which sees a swapped axis.
    arrays[f'maps/{i}'] = np.array([[np.sqrt(np.mean(m**2)), np.mean(m.ravel() * np.linspace(-1, 1, m.size))]
                                    for m in part], np.float32)
  arrays['losses'] = np.array([x.item() for x in (discriminator, adversarial, feature, mel)], np.float32)
  arrays['audio_grad'] = torch.autograd.grad(adversarial + 2 * feature, fake_t)[0].numpy()
  path = ROOT / 'tests' / 'fixtures' / 'discriminator.npz'
  path.parent.mkdir(exist_ok=True)
  np.savez_compressed(path, **arrays)
  print(path, path.stat().st_size, 'bytes; losses', arrays['losses'])


if __name__ == '__main__':
  main()
