#!/usr/bin/env bash
# Under a real Slurm on this machine: a job of two tasks is requeued, runs into its time limit, loses a task and is
# cancelled. It resumes each time and ends as the job that nothing happened to. As root, on Debian:
#
#     apt install slurm-wlm munge && benchmarks/slurm_run.sh runs/slurm
set -euo pipefail

if [[ $# -ne 1 || $EUID -ne 0 ]]; then
  echo "usage, as root: $0 FOLDER" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if ! mkdir -p "$1" || [[ -n $(ls -A "$1") ]]; then
  echo "$0: error: $1: give a folder that is empty or not there" >&2
  exit 2
fi
work="$(cd "$1" && pwd)"
python="$root/.venv/bin/python"
[[ -x $python ]] || python=python3
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$work/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_FLAGS=--xla_backend_optimization_level=0 # such a run is mostly compilation
export PYTHONPATH="$root" SLURM_CONF="$work/slurm.conf"

# ---------------------------------------------------------------- a cluster of one node

cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$work/state" "$work/spool"
stop_cluster() {
  local file
  scancel --name=lmspt 2>/dev/null || true
  until [[ -z $(squeue --noheader 2>/dev/null) ]]; do sleep 1; done
  for file in "$work"/slurmd.pid "$work"/slurmctld.pid "$work"/munged.pid; do
    if [[ -f $file ]]; then kill "$(<"$file")"; fi
  done
}
trap stop_cluster EXIT
if ! munge -n >/dev/null 2>&1; then
  install -d -o munge -m 755 /run/munge
  su -s /bin/sh munge -c "$(command -v munged) --pid-file=/run/munge/lmspt.pid"
  ln -s /run/munge/lmspt.pid "$work/munged.pid"
fi
slurmctld
slurmd
until [[ $(sinfo --noheader --format=%t) == idle ]]; do sleep 1; done

# ---------------------------------------------------------------- what the script does to jobs, and what it looks at

begin=$SECONDS
say() { printf '%4d s  %s\n' $((SECONDS - begin)) "$*"; }
submit() { # RUN
  "$root/launch/slurm.sh" --ntasks=2 --time=30 --signal=B:TERM@120 --pause=1 --output="$work/$1.log" \
    -- --config="$work/config.py" --workdir="$work/$1" | sed 's/.* //'
}
field() { scontrol show job "$1" | sed -n "s/.*\b$2=\([^ ]*\).*/\1/p"; }
step() { # RUN: the last that is logged
  tail -n 1 "$work/$1/metrics.jsonl" 2>/dev/null | sed 's/.*"step": *\([0-9]*\).*/\1/'
}
wait_for_step() { # RUN STEP
  until [[ $(step "$1") -ge $2 ]]; do sleep 0.2; done
}
wait_for_state() { # JOB STATE
  until [[ $(field "$1" JobState) == "$2" ]]; do sleep 0.2; done
}
starts_at_once() { # JOB, whose start Slurm puts off for two minutes after a requeue
  wait_for_state "$1" PENDING
  until scontrol update JobId="$1" StartTime=now 2>/dev/null; do sleep 1; done
}
starts() { grep -c 'launch: status .* starts again' "$work/broken.log" || true; }
checkpoints() { find "$work/$1/checkpoints" -maxdepth 1 -name '[0-9]*' -printf '%f\n' | sort -n | tr '\n' ' '; }

"$python" "$root/benchmarks/_slurm_experiment.py" make "$work"
say "$(sinfo --version), $(nproc) cores, two tasks with one CPU device each"

# ---------------------------------------------------------------- nothing happens

job="$(submit unbroken)"
wait_for_state "$job" COMPLETED
say "unbroken: job $job $(field "$job" JobState), exit $(field "$job" ExitCode), checkpoints $(checkpoints unbroken)"

# ---------------------------------------------------------------- everything happens

job="$(submit broken)"
wait_for_step broken 30
say "broken: job $job at step $(step broken): scontrol requeue"
scontrol requeue "$job"
starts_at_once "$job"
say "broken: restarts $(field "$job" Restarts), checkpoints $(checkpoints broken)"

wait_for_step broken 70
say "broken: step $(step broken): its time limit comes near"
minutes="$(field "$job" RunTime | awk -F: '{print $1 * 60 + $2}')"
scontrol update JobId="$job" TimeLimit=$((minutes + 2))
until [[ $(field "$job" Restarts) == 2 ]]; do sleep 0.2; done
starts_at_once "$job"
scontrol update JobId="$job" TimeLimit=30
say "broken: restarts $(field "$job" Restarts), checkpoints $(checkpoints broken)"

wait_for_step broken 110
# The step may have been reached before the time limit stopped the job: its tasks need not have begun again.
until task="$(scontrol listpids "$job" 2>/dev/null | awk '$4 == 1 {print $1; exit}')" && [[ -n $task ]]; do sleep 0.5; done
say "broken: step $(step broken): kill -9 of task 1"
before="$(starts)"
kill -KILL "$task"
until [[ $(starts) -gt $before ]]; do sleep 0.2; done
say "broken: $(grep -o 'launch: status .* starts again.*' "$work/broken.log" | tail -n 1)"

wait_for_step broken 150
say "broken: step $(step broken): scancel"
scancel "$job"
wait_for_state "$job" CANCELLED
sleep 15
say "broken: 15 s later: $(field "$job" JobState), checkpoints $(checkpoints broken)"

job="$(submit broken)"
wait_for_state "$job" COMPLETED
say "broken: submitted again: job $job $(field "$job" JobState), exit $(field "$job" ExitCode)"
say "steps at which it went on: $(grep -o 'resum[a-z]* .*step [0-9]*' "$work/broken.log" | grep -o '[0-9]*$' | tr '\n' ' ')"
"$python" "$root/benchmarks/_slurm_experiment.py" compare "$work" unbroken broken
