"""Runs a command in this process as if it were typed; small, for processes that start with it."""

import contextlib
import io
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from blip2_jax import __main__ as blip2


def run(program: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Runs `blip2 WORDS` or `python FILE WORDS`; its exit code, and what it said and complained."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = (blip2.main(list(words)) if program == "blip2" else run_file(*words)) or 0
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                err.write(code)
                code = 1
    return code, out.getvalue(), err.getvalue()


def run_file(file: str, *words: str) -> None:
    """`python FILE WORDS`."""
    folder = str(Path(file).resolve().parent)
    before, sys.argv = sys.argv, [file, *words]
    sys.path.insert(0, folder)
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(folder)
