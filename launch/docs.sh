#!/usr/bin/env bash
# The API reference, as static HTML made from the docstrings.
#
#   ./launch/docs.sh [--out=DIR] [--overwrite]
#
#   --out=DIR    where the pages go (default: runs/docs); open DIR/index.html
#   --overwrite  replace the pages that this command wrote to DIR before
#
# Every public module of the package has a page, and so has every config; configs/default.py
# explains all keys.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/docs
overwrite=()
for argument in "$@"; do
  case "$argument" in
    --out=*) out="${argument#*=}" ;;
    --overwrite) overwrite=(--overwrite) ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "docs.sh: unknown argument $argument; try --help" >&2; exit 2 ;;
  esac
done
source launch/environment.sh
blip2_environment "[docs]"
exec python launch/docs.py --out="$out" "${overwrite[@]}"
