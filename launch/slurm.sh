#!/usr/bin/env bash
# Submits a training to Slurm; the job puts itself back in the queue when it is stopped. See docs/launch.md.
set -euo pipefail

usage() {
  cat <<END
usage: $0 [--restarts=N] [--pause=SECONDS] [--grace=SECONDS] [--dry-run] [SBATCH OPTION ...]
       -- --config=FILE --workdir=DIR [--config.FIELD=VALUE ...] [-- ANOTHER RUN'S ...]
several runs, each after a --, become one array
END
}

dry_run=no
grace=120
policy=()
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --grace=*) grace="${1#*=}"; policy+=("$1") ;;
    --restarts=* | --pause=*) policy+=("$1") ;;
    --help | -h) usage; exit 0 ;;
    *) options+=("$1") ;;
  esac
  shift
done
if [[ $# -lt 2 ]]; then
  usage >&2
  exit 2
fi
quoted() { printf '%q ' "$@"; }

# A run's branch in the job script, which finds its own by the index in the array.
runs=()
while [[ $# -gt 0 ]]; do
  shift # the -- before it
  workdir=''
  train=()
  while [[ $# -gt 0 && $1 != -- ]]; do
    [[ $1 == --workdir=* ]] && workdir="${1#*=}"
    train+=("$1")
    shift
  done
  if [[ -z $workdir ]]; then
    echo "$0: error: --workdir is missing: give --workdir=DIR, on storage that all nodes see, after --" >&2
    exit 2
  fi
  progress="ls -- $(printf %q "$workdir/checkpoints")"
  runs+=("${#runs[@]}) progress=$(printf %q "$progress") train=($(quoted "${train[@]}")) ;;")
done
for value in "${policy[@]}"; do
  if [[ ! ${value#*=} =~ ^[0-9]+$ ]]; then
    echo "$0: error: $value: give a whole number from 0 on" >&2
    exit 2
  fi
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x $python ]] || python=python3

# --stop: srun kills its tasks when it gets SIGTERM itself; scancel --signal reaches them and leaves the job as it is.
# --requeue: of a job that somebody cancels the state isn't RUNNING any more, and it is not to come back.
# --wait: once a task has ended the others have this long. With --kill-on-bad-exit they'd be killed while they save.
job() {
  cat <<END
#!/usr/bin/env bash
run=$index
case "\$run" in
$(printf '%s\n' "${runs[@]}")
esac
# srun does not take this one from the job by itself.
[ -z "\${SLURM_CPUS_PER_TASK-}" ] || export SRUN_CPUS_PER_TASK="\$SLURM_CPUS_PER_TASK"
exec $(quoted "$python" "$root/launch/supervise.py" "${policy[@]}")"--progress=\$progress" \\
  --stop='scancel --signal=TERM $id' \\
  --requeue='[ "\$(squeue -h -j $id -o %T)" = RUNNING ] && scontrol requeue $id' \\
  -- srun --kill-on-bad-exit=0 --wait=$grace env GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} \\
  $(quoted "$python" -m lmspt_jax train)"\${train[@]}"
END
}
index=0
id="\"\$SLURM_JOB_ID\""
array=()
if [[ ${#runs[@]} -gt 1 ]]; then
  # One of its jobs has the whole array's number as its SLURM_JOB_ID: 42_3 means one alone.
  index="\"\$SLURM_ARRAY_TASK_ID\""
  id="\"\${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID\""
  array=("--array=0-$((${#runs[@]} - 1))")
fi
# B: only the job's shell gets the signal. It is the supervisor by then, which lets the tasks save and requeues the job.
submit=(sbatch --job-name=lmspt --requeue --open-mode=append --signal=B:TERM@300 "${array[@]}" "${options[@]}")

if [[ $dry_run == yes ]]; then
  quoted "${submit[@]}"
  echo '<<JOB'
  job
  echo JOB
  exit 0
fi
job | "${submit[@]}"
