"""Learning rates of both networks and the weight of the distillation drawn at random, six draws of two seeds each.

    lmspt sweep --sweep=configs/sweeps/learning_rates.py --workdir=runs/learning_rates
    lmspt sweep --sweep=configs/sweeps/learning_rates.py:arrayrecord:/shared/data --workdir=/shared/runs/rates \
      --launcher='launch/slurm.sh --time=60 --gpus-per-node=1'
"""

from lmspt_jax.sweeps import Sweep, choice, log_uniform, product, random, seeds


def get_sweep(arg: str = '') -> Sweep:
  """`arg` is a data URI to use in place of the bundled sample, as for configs/demo.py."""
  draws = random(6, {
      'generator_optimizer.learning_rate': log_uniform(1e-4, 2e-3),
      'discriminator_optimizer.learning_rate': log_uniform(5e-5, 1e-3),
      'loss.distillation': choice((100, 500))})
  return Sweep(f'configs/demo.py:{arg}' if arg else 'configs/demo.py', product(draws, seeds(2)))
