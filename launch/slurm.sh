#!/usr/bin/env bash
# Train on the GPUs of a SLURM cluster: one job that goes on after pre-emption and at its time limit.
#
#   NODES=2 GPUS=8 TIME=12:00:00 ./launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   NODES       of the job (default: 1)
#   GPUS        of each node, one process each (default: 8)
#   CPUS        of each process (default: the cluster's)
#   TIME        limit of one stretch; the run may take many (default: the partition's)
#   SBATCH_*    what sbatch itself reads: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, ...
#   DRY_RUN=1   show what would run
#
# Two minutes before the limit, or when pre-empted, the run is told to stop; it saves itself, ends with
# code 42, and the job goes back into the queue. A WORKDIR whose job is in the queue is not submitted
# twice. The log is WORKDIR/slurm.log; the repository and WORKDIR must be where all nodes see them.
set -euo pipefail

if [ "${1:-}" = --job ]; then # SLURM's copy of this script, on the job's first node
  shift
  code=0
  srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    env BLIP2_DISTRIBUTED=1 blip2 train "$@" || code=$?
  if [ "$code" = 42 ]; then scontrol requeue "$SLURM_JOB_ID" && exit 0; fi
  exit "$code"
fi

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
dry_run || need sbatch "Log in to a node of the SLURM cluster, or load its slurm module."
[ "${1:-}" = check ] && exit 0
arguments "$@"
name="blip2:${workdir//[^A-Za-z0-9._=,+\/-]/-}"
log="$workdir/slurm.log"
submit=(sbatch --parsable "--job-name=$name" "--nodes=${NODES:-1}" "--ntasks-per-node=${GPUS:-8}"
  "--gpus-per-node=${GPUS:-8}" --requeue --signal=TERM@120 --open-mode=append "--output=${log//%/%%}")
[ -z "${CPUS:-}" ] || submit+=("--cpus-per-task=$CPUS")
[ -z "${TIME:-}" ] || submit+=("--time=$TIME")
submit+=("$repository/launch/slurm.sh" --job "${flags[@]}")
if ! dry_run; then
  if squeue --me --noheader --format=%j | grep -Fxq -- "$name"; then
    say "$workdir is in the queue already."
    exit 0
  fi
  mkdir -p -- "$workdir"
  if ! command -v blip2 > /dev/null; then
    here="$PWD"
    cd "$repository"
    blip2_environment "[cuda]"
    cd "$here"
  fi
fi
run "${submit[@]}"
