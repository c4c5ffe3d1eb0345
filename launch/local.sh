#!/usr/bin/env bash
# Train on this machine, in one process or in several that work as one.
#
#   ./launch/local.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#   PROCESSES=2 ./launch/local.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
#
#   PROCESSES   how many (default: 1); where there are GPUs, each process gets one of its own
#   PORT        of the processes' meeting point (default: a random one)
#   GRACE       seconds that the others have to end by themselves once one has failed (default: 150);
#               then they are killed, also one that hangs or was stopped
#   DRY_RUN=1   show what would run
#
# A run that ends with code 42 was told to stop and has saved itself; it is started again. When this
# script gets SIGTERM or Ctrl-C, it passes that on, waits for the run to save, and leaves with 42.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
processes="${PROCESSES:-1}"
[[ ${GRACE:-150} =~ ^[0-9]+$ ]] || die "GRACE is $GRACE; it must be a number of seconds."
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "PROCESSES is $processes; it must be 1 or more."
arguments "$@"
environment
dry_run || need blip2 "Run ./launch/quickstart.sh, or in an environment of your own: pip install -e $repository"

pids=() stopping=no
pass_on() { stopping=yes; kill -TERM "${pids[@]}" 2> /dev/null || true; }

# All processes, once; the exit code is that of the first to fail otherwise than with 42, or 42, or 0.
attempt() {
  local i pid code result=0 reaper="" port="${PORT:-$((20000 + RANDOM % 20000))}" alone=()
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
  while [ "${#pids[@]}" -gt 0 ]; do
    pid="" code=0
    wait -n -p pid "${pids[@]}" || code=$?
    [ -n "${pid:-}" ] || continue # a signal to this script ends the wait, not the child
    for i in "${!pids[@]}"; do [ "${pids[$i]}" != "$pid" ] || unset "pids[$i]"; done
    if [ "$code" != 0 ] && { [ "$result" = 0 ] || [ "$result" = 42 ]; }; then result="$code"; fi
    if [ "$result" != 0 ] && [ "$result" != 42 ] && [ -z "$reaper" ] && [ "${#pids[@]}" -gt 0 ]; then
      say "a process ended with code $result; the others have ${GRACE:-150} seconds."
      { sleep "${GRACE:-150}" && kill -KILL "${pids[@]}"; } > /dev/null 2>&1 < /dev/null &
      reaper=$!
    fi
  done
  [ -z "$reaper" ] || kill "$reaper" 2> /dev/null || true
  return "$result"
}

trap pass_on TERM INT
while :; do
  code=0
  attempt || code=$?
  [ "$code" = 42 ] && [ "$stopping" = no ] || exit "$code"
  say "the run saved itself and stopped; starting it again."
done
