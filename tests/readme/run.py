"""Runs a command in this process as if it were typed; small, for processes that start with it."""

import argparse
import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from blip2_jax import __main__ as blip2
from blip2_jax import cli


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


def parse(program: str, words: Sequence[str]) -> tuple[int, str, str]:
    """As `run`, up to the point where all words are understood and the config is loaded."""
    with _stopped_after(cli, "parse"), _stopped_after(argparse.ArgumentParser, "parse_args"):
        try:
            return run(program, words)
        except _Parsed:
            return 0, "", ""


class _Parsed(BaseException):
    """Every word was understood."""


@contextlib.contextmanager
def _stopped_after(owner: Any, name: str) -> Iterator[None]:
    """Inside, the outermost call of a function ends in `_Parsed` once it has done its work."""
    real: Callable[..., Any] = getattr(owner, name)

    def then_stop(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", PARSE_ARGS):
            real(*args, **kwargs)
        raise _Parsed

    with mock.patch.object(owner, name, then_stop):
        yield


PARSE_ARGS = argparse.ArgumentParser.parse_args


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
