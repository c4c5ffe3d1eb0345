#!/usr/bin/env bash
# Environment, install, lint, types and tests, on a fresh machine. Further arguments go to pytest.
#   ./launch/test.sh                 everything
#   ./launch/test.sh tests/models    some tests
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
blip2_environment "[test]"

ruff check .
ruff format --check .
bash -n launch/*.sh .ci/run
shellcheck --shell=bash --external-sources launch/*.sh .ci/run
mypy
# Two processes, each test file in one of them: compiling, which tests mostly do, is on one core.
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
