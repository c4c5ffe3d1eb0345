#!/usr/bin/env bash
# Train on Cloud TPU: a slice through a queued resource, made anew when it is pre-empted, until the run is finished.
#
#   TPU_NAME=mine TPU_TYPE=v5litepod-16 SPOT=1 ./launch/tpu.sh CONFIG gs://BUCKET/PATH [--config.KEY=VALUE ...]
#   TPU_NAME=mine ./launch/tpu.sh status | logs | delete
#
# It creates the slice, waits for it, installs this checkout on all hosts, runs `blip2 train` there, follows
# its log, and deletes the slice. A run that ends with code 42 has saved itself and is started again; so is
# one whose slice was taken away, on a new slice. The run does not need this connection: after Ctrl-C, the
# same command attaches to it again.
#
#   TPU_NAME      of the queued resource
#   TPU_TYPE      accelerator type, e.g. v5litepod-16, v5p-128, v6e-32
#   TPU_VERSION   runtime of the hosts (default: by TPU_TYPE)
#   SPOT=1        cheaper, and can be taken away at any time
#   SLICES        more than 1: several slices that train as one (default: 1)
#   ZONE PROJECT  default: those of `gcloud config`
#   RETRIES       how often in a row a run that fails on a healthy slice is tried again (default: 2)
#   KEEP=1        leave the slice when the run is over; otherwise it is deleted, also after a failure
#   POLL          seconds between two looks (default: 30)
#   DRY_RUN=1     show what would run
#
# gs://BUCKET is mounted as /gcs/BUCKET on every host; a bucket with a hierarchical namespace renames
# checkpoints in one stroke. An absolute path that all hosts share works as well.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
dry_run || need gcloud "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
require TPU_NAME
[[ $TPU_NAME =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || die "TPU_NAME is $TPU_NAME; it must be lower-case letters, digits and hyphens."
slices="${SLICES:-1}" poll="${POLL:-30}" retries="${RETRIES:-2}"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "SLICES is $slices; it must be 1 or more."
where=(--quiet)
[ -z "${ZONE:-}" ] || where+=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT

# ------------------------------------------------------------------------------------------ the slice

nodes=("$TPU_NAME")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$TPU_NAME-$slice"); done
fi

runtime() {
  case "$TPU_TYPE" in
    v5lite*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  require TPU_TYPE
  local options=("--accelerator-type=$TPU_TYPE" "--runtime-version=${TPU_VERSION:-$(runtime)}")
  if [ "$slices" -gt 1 ]; then
    options+=("--node-count=$slices" "--node-prefix=$TPU_NAME")
  else
    options+=("--node-id=$TPU_NAME")
  fi
  [ "${SPOT:-0}" != 1 ] || options+=(--spot)
  run gcloud compute tpus queued-resources create "$TPU_NAME" "${options[@]}" "${where[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$TPU_NAME" --force "${where[@]}"; }

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if there is no such resource; UNKNOWN while the service
# cannot be asked, which must not be taken for NONE.
state() {
  if gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" \
    --format='value(state.state)' > "$scratch/state" 2> "$scratch/error"; then
    tail -n 1 "$scratch/state"
  elif grep -qi 'not.found' "$scratch/error"; then
    echo NONE
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

# Returns once there is a healthy slice.
wait_for_slice() {
  local now seen=""
  while :; do
    now="$(state)"
    [ "$now" = "$seen" ] || say "$TPU_NAME: $now"
    seen="$now"
    case "$now" in
      ACTIVE) return ;;
      NONE) create || { say "$TPU_NAME could not be created."; exit 1; } ;;
      SUSPENDED | FAILED) delete || true ;;
    esac
    sleep "$poll"
  done
}

# ------------------------------------------------------------------------------------------ its hosts

on_all_hosts() {
  local node pid pids=() failed=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" --worker=all "--command=$1" "${where[@]}" < /dev/null &
    pids+=($!)
    if dry_run; then wait "$!"; fi # in their order
  done
  for pid in "${pids[@]}"; do dry_run || wait "$pid" || failed=1; done
  return "$failed"
}

on_first_host() {
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" --worker=0 "--command=$1" "${where[@]}" < /dev/null
}

# What git knows of, and new files, as they are here now.
pack() {
  local file
  git -C "$repository" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [ -f "$repository/$file" ]; then printf '%s\0' "$file"; fi
    done | tar -C "$repository" --null -czf "$1" -T -
}

setup() {
  local node
  dry_run || pack "$scratch/blip2_jax.tar.gz" || return 1
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$scratch/blip2_jax.tar.gz" "$node:" --worker=all "${where[@]}" || return 1
  done
  on_all_hosts "mkdir -p blip2_jax && tar -xzf blip2_jax.tar.gz -C blip2_jax && blip2_jax/launch/tpu_host.sh setup $buckets"
}

start_or_attach() { on_all_hosts "blip2_jax/launch/tpu_host.sh run $(quote "${flags[@]}")"; }

# `running`, the run's exit code, `other` (another run is on the slice), or `lost` (nobody knows).
outcome() {
  local command answer
  command="[ ! -x blip2_jax/launch/tpu_host.sh ] || blip2_jax/launch/tpu_host.sh code $(quote "${flags[@]}")"
  answer="$(on_first_host "$command" | tail -n 1)" || answer=""
  echo "${answer:-lost}"
}

babysit() {
  local now failures=0 code=0
  while :; do
    wait_for_slice
    now="$(outcome)"
    if [ "$now" = running ]; then
      start_or_attach || true
    elif [ "$now" != other ]; then
      { setup && start_or_attach; } || true
    fi
    now="$(outcome)"
    case "$now" in
      0) say "finished: $workdir"; break ;;
      42) say "the run saved itself and stopped; starting it again."; failures=0 ;;
      running) say "the connection was lost, not the run; attaching again." ;;
      other) die "another run is on $TPU_NAME; see its log with: TPU_NAME=$TPU_NAME $0 logs" ;;
      *)
        if [ "$(state)" = ACTIVE ]; then
          failures=$((failures + 1))
          say "the run failed ($now) on a healthy slice, $failures in a row."
          if [ "$failures" -gt "$retries" ]; then code=1; break; fi
        else
          say "the slice was lost."
          failures=0
        fi
        ;;
    esac
    sleep "$poll"
  done
  if [ "${KEEP:-0}" = 1 ]; then say "$TPU_NAME is kept; delete it with: TPU_NAME=$TPU_NAME $0 delete"; else delete; fi
  return "$code"
}

case "${1:-}" in
  check) require TPU_TYPE ;;
  status) if dry_run; then run gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}"; else state; fi ;;
  logs) on_first_host "blip2_jax/launch/tpu_host.sh logs" ;;
  delete) delete ;;
  *)
    arguments "$@"
    elsewhere
    require TPU_TYPE
    if dry_run; then
      create
      setup
      start_or_attach
      [ "${KEEP:-0}" = 1 ] || delete
    else
      babysit
    fi
    ;;
esac
