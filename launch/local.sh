#!/usr/bin/env bash
# Train on this machine, in one process or in several that work as one.
#
#   ./launch/local.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#   PROCESSES=2 ./launch/local.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   PROCESSES   how many (default: 1); where there are GPUs, each process gets one of its own
#   PORT        of the processes' meeting point (default: a random one)
#   DRY_RUN=1   show what would run
#
# A run that ends with code 42 was told to stop and has saved itself; it is started again. When this
# script gets SIGTERM or Ctrl-C, it passes that on, waits for the run to save, and leaves with 42.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
processes="${PROCESSES:-1}"
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "PROCESSES is $processes; it must be 1 or more."
arguments "$@"
dry_run || need blip2 "Activate the environment that has it: pip install -e $repository"

pids=() stopping=no
pass_on() { stopping=yes; kill -TERM "${pids[@]}" 2> /dev/null || true; }

# The exit code of a child; a signal to this script does not end the wait.
ended() {
  local code
  while :; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2> /dev/null || return "$code"
  done
}

# All processes, once; the exit code is that of the first to fail otherwise than with 42, or 42, or 0.
attempt() {
  local i pid code result=0 port="${PORT:-$((20000 + RANDOM % 20000))}" alone=()
  pids=()
  for ((i = 0; i < processes; i++)); do
    if [ "$processes" -gt 1 ]; then
      alone=(env BLIP2_DISTRIBUTED=1 "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes"
        "JAX_PROCESS_ID=$i" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
      if command -v nvidia-smi > /dev/null; then alone+=("CUDA_VISIBLE_DEVICES=$i"); fi
    fi
    if dry_run; then quote "${alone[@]}" blip2 train "${flags[@]}"; continue; fi
    "${alone[@]}" blip2 train "${flags[@]}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    code=0
    ended "$pid" || code=$?
    if [ "$code" != 0 ] && { [ "$result" = 0 ] || [ "$result" = 42 ]; }; then result="$code"; fi
  done
  return "$result"
}

trap pass_on TERM INT
while :; do
  code=0
  attempt || code=$?
  [ "$code" = 42 ] && [ "$stopping" = no ] || exit "$code"
  say "the run saved itself and stopped; starting it again."
done
