#!/usr/bin/env python3
"""Trains on a TPU slice of a GKE cluster: makes a JobSet and hands it to kubectl. See docs/launch.md.

    gke.py --name=NAME --image=IMAGE --topology=v5e:4x4 --volume=CLAIM:/runs \\
      -- --config=FILE --workdir=/runs/NAME [--config.FIELD=VALUE ...]

JobSet (https://jobset.sigs.k8s.io) starts all hosts again when one ends, unless its exit status says that nothing
would come of it. The processes find each other by what GKE tells TPU pods (TPU_WORKER_HOSTNAMES).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from supervise import FINAL, Parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lmspt_jax.chips import Topology, parse_topology
from lmspt_jax.errors import LmsptError

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {'v4': 'tpu-v4-podslice', 'v5e': 'tpu-v5-lite-podslice', 'v5p': 'tpu-v5p-slice', 'v6e': 'tpu-v6e-slice'}
NAME = re.compile(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?')  # pods are called NAME-hosts-0-INDEX-xxxxx, 63 characters at most
CONTAINER = 'lmspt'

MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    # All hosts in one node pool, which is one slice, and nobody else in it.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # Every restart counts: after a preemption, a lost host, a crash.
    maxRestarts: {restarts}
    rules:
    - name: fault
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: {hosts}
        parallelism: {hosts}
        # One ended host fails the job, and with it all hosts start again.
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # A fault to mend, a command line to mend, the keyboard: a restart would not help.
          - action: FailJob
            onExitCodes:
              containerName: {container}
              operator: In
              values: {final}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {shape}
{spot}            containers:
            - name: {container}
              image: {image}
              command: [python, -m, lmspt_jax, train]
              args:
{arguments}
              resources:
                limits:
                  google.com/tpu: {chips}
              volumeMounts:
              - name: runs
                mountPath: {mount}
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: {claim}
"""
SPOT = """\
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, Topology]:
  parser = Parser(prog='gke.py', description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', required=True, help="the JobSet's")
  parser.add_argument('--image', required=True, help='holds lmspt_jax with its extra tpu')
  parser.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help='as for lmspt plan: v5e:4x4')
  parser.add_argument('--volume', required=True, metavar='CLAIM:PATH', help='a claim that all hosts can write to')
  parser.add_argument('--spot', action='store_true', help='on spot nodes')
  parser.add_argument('--restarts', type=int, default=20, metavar='N', help='in all')
  parser.add_argument('--grace', type=int, default=120, metavar='SECONDS', help='between SIGTERM and SIGKILL')
  parser.add_argument('--dry-run', action='store_true', help='print the manifest')
  parser.add_argument('train', nargs='+', metavar='ARGUMENT', help='of lmspt train')
  options = parser.parse_args(argv)
  if not NAME.fullmatch(options.name):
    parser.error(f'--name={options.name}: use small letters, digits and -, 40 at most, a letter first')
  options.claim, _, options.mount = options.volume.partition(':')
  if not options.claim or not options.mount.startswith('/'):
    parser.error(f'--volume={options.volume}: give CLAIM:PATH, a persistent volume claim and where it is mounted')
  for name in ('restarts', 'grace'):
    if getattr(options, name) < 0:
      parser.error(f'--{name}={getattr(options, name)}: give a number from 0 on')
  workdir = next((a.removeprefix('--workdir=') for a in options.train if a.startswith('--workdir=')), None)
  if workdir is None or not Path(workdir).is_relative_to(options.mount):
    parser.error(f'--workdir={workdir}: give a folder under {options.mount}, where the volume is mounted')
  try:
    return options, parse_topology(options.topology)
  except LmsptError as error:
    return parser.error(str(error))


def manifest(options: argparse.Namespace, topology: Topology) -> str:
  """The JobSet as YAML. JSON strings are YAML strings: what the user gave needs no other quoting."""
  return MANIFEST.format(
      name=json.dumps(options.name), restarts=options.restarts, grace=options.grace, hosts=topology.hosts,
      container=CONTAINER, final=[status for status in FINAL if status], accelerator=ACCELERATORS[topology.chip.name],
      shape='x'.join(map(str, topology.shape)), chips=min(topology.chips, topology.chip.chips_per_host),
      spot=SPOT if options.spot else '', image=json.dumps(options.image), mount=json.dumps(options.mount),
      claim=json.dumps(options.claim), arguments='\n'.join(f'              - {json.dumps(a)}' for a in options.train))


def main(argv: list[str]) -> int:
  options, topology = parse(argv)
  text = manifest(options, topology)
  if options.dry_run:
    print(text, end='')
    return 0
  try:
    return subprocess.run(['kubectl', 'apply', '--filename=-'], input=text, text=True, check=False).returncode
  except OSError as error:
    print(f'gke.py: error: kubectl: {error.strerror}; install it or apply what --dry-run prints', file=sys.stderr)
    return 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
