#!/usr/bin/env bash
# On each host of a slice, for tpu.sh: installs the checkout it lies in, and holds one run, which outlives connections.
#
#   tpu_host.sh setup [yes]    install; yes: mount buckets as /gcs
#   tpu_host.sh run FLAGS      start `blip2 train FLAGS`, or attach to it; shows the log until the run ends
#   tpu_host.sh code FLAGS     running, its exit code, lost, or other if another run is alive
#   tpu_host.sh logs           follow the log
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
cd "$repository"
here="$HOME/.blip2_run" # in it, lock: held by the run's own processes as long as they live
mkdir -p "$here"

running() { ! flock --nonblock "$here/lock" true; }

install_python() { # the hosts' own may be too old
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 .venv
}

mount_buckets() {
  local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  mountpoint -q /gcs && return
  if ! command -v gcsfuse > /dev/null; then
    curl -fsS "$source/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -qqy gcsfuse
  fi
  sudo mkdir -p /gcs
  sudo chown "$(id -u)" /gcs
  # Orbax gives a checkpoint's folder its final name when it is whole; gcsfuse renames no folder by itself.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 /gcs
}

case "${1:-}" in
  setup)
    [ -x .venv/bin/python ] || blip2_python > /dev/null 2>&1 || install_python
    [ ! -x .venv/bin/python ] || export PYTHON=.venv/bin/python
    blip2_environment "[tpu]"
    [ "${2:-no}" = no ] || mount_buckets
    ;;
  run)
    shift
    exec 9>> "$here/lock"
    if flock --nonblock 9; then
      rm -f "$here/code"
      quote "$@" > "$here/command"
      # The waiting shell must live through SIGTERM, or nobody would note the code.
      # shellcheck disable=SC2016
      PATH="$(cd "${BLIP2_VENV:-.venv}/bin" && pwd):$PATH" setsid nohup \
        bash -c 'trap : TERM; BLIP2_DISTRIBUTED=1 blip2 train "$@"; echo $? > "$0"' "$here/code" "$@" \
        > "$here/log" 2>&1 < /dev/null &
    elif [ "$(quote "$@")" != "$(cat "$here/command")" ]; then
      die "another run is alive here: blip2 train $(cat "$here/command")"
    fi
    exec 9>&-
    tail -n +1 -F "$here/log" 2> /dev/null &
    flock "$here/lock" true
    sleep 0.3 # the last lines
    kill "$!" 2> /dev/null || true
    exit "$(cat "$here/code" 2> /dev/null || echo 1)"
    ;;
  code)
    shift
    if [ "$(quote "$@")" = "$(cat "$here/command" 2> /dev/null)" ]; then
      if running; then echo running; else cat "$here/code" 2> /dev/null || echo lost; fi
    elif running; then
      echo other
    else
      echo lost
    fi
    ;;
  logs) exec tail -n 200 -F "$here/log" ;;
  *) usage; exit 2 ;;
esac
