#!/usr/bin/env bash
# Environment, install, lint, types and tests, on a fresh machine. Further arguments go to pytest.
#   ./launch/test.sh                 everything but what takes gigabytes (-m full_size)
#   ./launch/test.sh --quick         lint, types and unit tests: what to run while working
#   ./launch/test.sh tests/models    some tests
set -euo pipefail
cd "$(dirname "$0")/.."
options=()
if [ "${1:-}" = --quick ]; then
  shift
  options=(-m "not (integration or docs or full_size)")
fi
source launch/environment.sh
blip2_environment "[test]"

ruff check .
ruff format --check .
bash -n launch/*.sh .ci/run
shellcheck --shell=bash --external-sources launch/*.sh .ci/run
mypy
# A file's tests stay together: they share what was trained and compiled for them.
exec python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder \
  "${options[@]}" "$@"
