#!/usr/bin/env bash
# The guides and the API reference, as one static, searchable site.
#
#   ./launch/docs.sh [--out=DIR] [--overwrite]
#
#   --out=DIR    where the pages go (default: runs/docs)
#   --overwrite  replace the pages that this command wrote to DIR before
#
# Open DIR/index.html, or with search: python -m http.server --directory DIR
#
# The guides are the README and docs/. Every public module of the package has a page, made from its
# docstrings, and so has every recipe; that of configs/default.py explains all keys.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/docs
overwrite=()
for argument in "$@"; do
  case "$argument" in
    --out=*) out="${argument#*=}" ;;
    --overwrite) overwrite=(--overwrite) ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "docs.sh: unknown argument $argument; try --help" >&2; exit 2 ;;
  esac
done
source launch/environment.sh
blip2_environment "[docs]"
exec python launch/docs.py --out="$out" "${overwrite[@]}"
