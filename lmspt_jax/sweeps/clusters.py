"""Runs of a sweep on a cluster, by the launchers in launch/: on Slurm one array, on GKE a JobSet for each run.

The launchers hand over and return; what becomes of a run is read from its folder, which has to be seen from here under
the same path. A run that was handed over has a note in its folder and is not handed over again: two trainings in one
folder would follow.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmspt_jax.errors import LmsptError
from lmspt_jax.sweeps.members import Member, note, remove_note

_NAME = '--name='


@dataclass(frozen=True)
class Handover:
  """A command of a launcher, and the runs that it takes."""

  command: tuple[str, ...]
  members: tuple[Member, ...]


def handovers(members: Sequence[Member], launcher: str) -> list[Handover]:
  """How to hand runs to `launcher`, a launcher with its options. Raises LmsptError: it is none that can take them."""
  try:
    program, *options = shlex.split(launcher)
  except ValueError as error:  # none, or an open quote
    raise LmsptError(f"--launcher={launcher}: not a command; give one such as 'launch/slurm.sh --time=60'") from error
  kind = Path(program).name
  if kind == 'slurm.sh':
    command = [program, *options, *(word for member in members for word in ('--', *member.arguments))]
    return [Handover(tuple(command), tuple(members))] if members else []
  if kind == 'gke.py':
    return _job_sets(members, program, options)
  raise LmsptError(f"--launcher={launcher}: give launch/slurm.sh or launch/gke.py with its options, as in "
                   "'launch/slurm.sh --time=60'")


def hand_over(commands: Sequence[Handover]) -> None:
  """Runs the launchers, after each has accepted its command line. Raises LmsptError if one fails."""
  for handover in commands:
    program, *rest = handover.command
    _run((program, '--dry-run', *rest), quiet=True)
  for handover in commands:
    # Before, so that no run is handed over unnoted.
    for member in handover.members:
      remove_note(member, 'failed')
      note(member, 'launched', command=shlex.join(handover.command))
    try:
      _run(handover.command)
    except LmsptError:
      for member in handover.members:
        remove_note(member, 'launched')
      raise


def _job_sets(members: Sequence[Member], program: str, options: Sequence[str]) -> list[Handover]:
  """A JobSet's name is --name and the run's, in the letters that Kubernetes takes."""
  given = [option.removeprefix(_NAME) for option in options if option.startswith(_NAME)]
  if not given:
    raise LmsptError(f'--launcher={program}: has no --name=NAME; the JobSets are called NAME-RUN')
  rest = [option for option in options if not option.startswith(_NAME)]
  commands: dict[str, Handover] = {}
  for member in members:
    name = f'{given[-1]}-{re.sub("[^a-z0-9]+", "-", member.name.lower()).strip("-")}'
    if name in commands:
      raise LmsptError(f'runs {commands[name].members[0].name!r} and {member.name!r} would both be JobSet {name}: name '
                       'one of them otherwise')
    commands[name] = Handover((program, f'{_NAME}{name}', *rest, '--', *member.arguments), (member,))
  return list(commands.values())


def _run(command: Sequence[str], *, quiet: bool = False) -> None:
  try:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if quiet else None, check=False)
  except OSError as error:
    raise LmsptError(f'--launcher={command[0]}: can\'t be run ({error.strerror}); check the path') from error
  if done.returncode:
    raise LmsptError(f'--launcher={command[0]}: ended with status {done.returncode}; it says above why')
