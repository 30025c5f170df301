#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice over ssh, and starts again after a crash. See docs/launch.md.
set -euo pipefail

usage() {
  cat <<END
usage: $0 --tpu=NAME --zone=ZONE --dir=DIR [--project=PROJECT] [--internal-ip]
       [--restarts=N] [--pause=SECONDS] [--grace=SECONDS] [--dry-run]
       -- --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]
  --dir is the checkout on the hosts (from the home folder, or from /), with lmspt_jax in its .venv or for python3
END
}

tpu=''
zone=''
dir=''
policy=()
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case "$1" in
    --tpu=*) tpu="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --project=* | --internal-ip) options+=("$1") ;;
    --restarts=* | --pause=* | --grace=* | --dry-run) policy+=("$1") ;;
    --help | -h) usage; exit 0 ;;
    *) echo "$0: error: $1: unknown option (see $0 --help)" >&2; exit 2 ;;
  esac
  shift
done
workdir=''
for argument in "$@"; do
  [[ $argument == --workdir=* ]] && workdir="${argument#*=}"
done
for name in tpu zone dir workdir; do
  if [[ -z ${!name} ]]; then
    echo "$0: error: --$name is missing (see $0 --help)" >&2
    exit 2
  fi
done
shift

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x $python ]] || python=python3
quoted() { printf '%q ' "$@"; }
ssh=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" "${options[@]}")

# Whoever trains on a host holds the lock file open: that is whom to stop, and who has to be gone before a start.
lock='.lmspt_train.lock'  # in the home folder, where ssh starts
stop="touch $lock; fuser --silent --kill -TERM $lock"
start="$stop; exec 9>>$lock; flock --wait=120 9 || exit 75; cd $(quoted "$dir")|| exit 1"
start+="; python=.venv/bin/python; [ -x \$python ] || python=python3"
start+="; exec \$python -m lmspt_jax train $(quoted "$@")"

policy+=("--progress=$(quoted "${ssh[@]}" --worker=0 --command="ls -- $(quoted "$workdir/checkpoints")")"
  "--stop=$(quoted "${ssh[@]}" --worker=all --command="$stop")")
exec "$python" "$root/launch/supervise.py" "${policy[@]}" -- "${ssh[@]}" --worker=all --command="$start"
