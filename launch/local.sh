#!/usr/bin/env bash
# Trains on this machine: `lmspt train` with its devices, or with N virtual CPU devices. See launch/README.md.
set -euo pipefail

usage() {
  echo "usage: $0 [--cpu-devices=N] [--dry-run] --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]"
}

cpu_devices=''
dry_run=no
arguments=()
for argument in "$@"; do
  case "$argument" in
    --cpu-devices=*) cpu_devices="${argument#*=}" ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done
if [[ ${#arguments[@]} -eq 0 ]]; then
  usage >&2
  exit 2
fi
if [[ -n $cpu_devices && ! $cpu_devices =~ ^[1-9][0-9]*$ ]]; then
  echo "$0: error: --cpu-devices=$cpu_devices: give a whole number from 1 on" >&2
  exit 2
fi

# The checkout's own environment if `make` has built it, else what is on the PATH.
python="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
[[ -x $python ]] || python=python3
# Large arrays on huge pages: a step on CPU takes a quarter less time (docs/results/benchmarks.md).
settings=("GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}")
if [[ -n $cpu_devices ]]; then
  settings+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=$cpu_devices")
fi
command=(env "${settings[@]}" "$python" -m lmspt_jax train "${arguments[@]}")

if [[ $dry_run == yes ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# exec: signals reach lmspt itself, which saves on SIGTERM and leaves with status 75.
exec "${command[@]}"
