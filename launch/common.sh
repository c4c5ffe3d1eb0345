# Sourced by the launchers beside it: their help, their arguments, and commands that are run or shown.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

die() { say "$1"; exit 2; }

# A script's header comment is its help.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

dry_run() { [ "${DRY_RUN:-0}" = 1 ]; }

# One line of shell, for any POSIX shell, that gives back exactly these words, whatever is in them.
quote() {
  local word line="" escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" '${word//\'/"$escaped"}'"; fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or shows it when DRY_RUN=1.
run() { if dry_run; then quote "$@"; else "$@"; fi; }

need() { command -v "$1" > /dev/null || die "$1 is not installed here. $2"; }

# Puts the environment that the quickstart and test.sh make within reach, unless the shell has one active.
environment() {
  local venv="${BLIP2_VENV:-$repository/.venv}"
  if ! command -v blip2 > /dev/null && [ -x "$venv/bin/blip2" ]; then PATH="$(cd "$venv/bin" && pwd):$PATH"; fi
}

require() {
  local name
  for name in "$@"; do [ -n "${!name:-}" ] || die "$name is not set; try --help."; done
}

# CONFIG WORKDIR [--config.KEY=VALUE ...]: sets `config`, `workdir` and `flags`, the words of `blip2 train`.
arguments() {
  local word file python
  [ $# -ge 2 ] || die "it takes CONFIG WORKDIR [--config.KEY=VALUE ...]; try --help."
  config="$1" workdir="$2"
  shift 2
  file="${config%.py:*}"
  file="${file%.py}.py"
  [ -f "$file" ] || file="$repository/$file"
  [ -f "$file" ] || die "there is no config file $config."
  case "$workdir" in "" | -*) die "WORKDIR is '$workdir'; it must be a folder." ;; esac
  for word in "$@"; do
    case "$word" in --config.*=*) ;; *) die "unknown argument $word; write --config.KEY=VALUE, or try --help." ;; esac
  done
  flags=("--config=$config" "--workdir=$workdir" "$@")
  # A mistyped key is found here, where the package is installed, and not on a machine that costs money.
  python="${BLIP2_VENV:-$repository/.venv}/bin/python"
  [ -x "$python" ] || python="${PYTHON:-python3}"
  local -x PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
  if command -v "$python" > /dev/null; then
    "$python" -c '
import sys
try:
    from blip2_jax import cli
except Exception:
    sys.exit()
cli.parse(None, sys.argv[1:], prog="blip2 train")' "--config=$config" "$@" || exit 2
  fi
}

# For machines that have the repository and mount buckets, but not this machine's files: CONFIG as the
# repository names it, and gs://BUCKET/PATH as /gcs/BUCKET/PATH. Sets `buckets` to yes if there are any.
elsewhere() {
  local i key value suffix="" file="${config%.py:*}"
  [ "$file" = "$config" ] || suffix=":${config#*.py:}"
  file="${file%.py}.py"
  [ -f "$file" ] || file="$repository/$file"
  file="$(cd "$(dirname "$file")" && pwd)/${file##*/}"
  case "$file" in "$repository"/*) ;; *) die "CONFIG is $config; it must be inside $repository, which is what the hosts get." ;; esac
  case "$workdir" in gs://?* | /*) ;; *) die "WORKDIR is $workdir; it must be gs://BUCKET/PATH or an absolute path that all hosts share." ;; esac
  config="${file#"$repository"/}$suffix"
  flags[0]="--config=$config"
  buckets=no
  for i in "${!flags[@]}"; do
    key="${flags[$i]%%=*}" value="${flags[$i]#*=}"
    case "$value" in gs://*) value="/gcs/${value#gs://}" ;; esac
    # shellcheck disable=SC2034
    case "$value" in /gcs/*) buckets=yes ;; esac
    flags[i]="$key=$value"
  done
}
