#!/usr/bin/env bash
# Trains on this machine, and starts again after a crash. See docs/launch.md.
set -euo pipefail

usage() {
  cat <<END
usage: $0 [--cpu-devices=N [--processes=N]] [--restarts=N] [--pause=SECONDS] [--grace=SECONDS] [--dry-run]
       --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]
END
}

cpu_devices=''
processes=''
workdir=''
policy=()
arguments=()
for argument in "$@"; do
  case "$argument" in
    --cpu-devices=*) cpu_devices="${argument#*=}" ;;
    --processes=*) processes="${argument#*=}"; policy+=("$argument") ;;
    --restarts=* | --pause=* | --grace=* | --dry-run) policy+=("$argument") ;;
    --help | -h) usage; exit 0 ;;
    --workdir=*) workdir="${argument#*=}"; arguments+=("$argument") ;;
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
if [[ -n $processes && -z $cpu_devices ]]; then
  echo "$0: error: --processes=$processes: give --cpu-devices=N too; accelerators are all driven by one process" >&2
  exit 2
fi
if [[ -z $workdir ]]; then
  echo "$0: error: --workdir is missing: give --workdir=DIR" >&2
  exit 2
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The checkout's own environment if `make` has built it, else what is on the PATH.
python="$root/.venv/bin/python"
[[ -x $python ]] || python=python3
# Large arrays on huge pages: a step on CPU takes a quarter less time (docs/results/benchmarks.md).
settings=("GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}")
if [[ -n $cpu_devices ]]; then
  settings+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=$cpu_devices")
fi
policy+=("--progress=ls -- $(printf %q "$workdir/checkpoints")")
exec "$python" "$root/launch/supervise.py" "${policy[@]}" -- \
  env "${settings[@]}" "$python" -m lmspt_jax train "${arguments[@]}"
