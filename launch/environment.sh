# Sourced by the scripts beside it: makes a virtual environment in .venv and installs the package.
# Usage: source launch/environment.sh EXTRAS   ("" or e.g. "[test]")
# PYTHON names the interpreter (3.11 or newer) that the environment is made from.

blip2_environment() {
  local extras="$1" venv="${BLIP2_VENV:-.venv}" python stamp
  python="$(blip2_python)" || return 1
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return 1
  stamp="$venv/.installed$extras"
  if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    echo "Installing blip2_jax$extras into $venv (once; a few minutes) ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip || return 1
    # The exact CPU build first: a range would pull a CUDA build of several gigabytes.
    if [[ "$extras" == *test* ]]; then
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 || return 1
    fi
    # Without setuptools' warning, given for every editable install, of folders with its name.
    PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -e ".$extras" || return 1
    touch "$stamp"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
}

blip2_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" > /dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "blip2_jax needs Python 3.11 or newer; set PYTHON=/path/to/python3.11." >&2
  return 1
}
