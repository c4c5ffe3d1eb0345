import io
import re

from blip2_jax.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    out = Terminal()
    with Progress(10, initial=4, label="stage 1", file=out) as progress:
        for _ in range(6):
            progress.update(loss=0.25)
    last = out.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("stage 1: 100%")
    assert "10/10" in last


def test_progress_is_plain_lines_elsewhere():
    out = io.StringIO()
    with Progress(10, initial=8, label="stage 1", every_seconds=0, file=out) as progress:
        progress.update(loss=0.25)
        progress.update(loss=0.125)
    first, last = out.getvalue().splitlines()
    assert re.fullmatch(r"stage 1 step 9/10  \S+ step/s  00:0\d left  loss 0.25", first)
    assert last.startswith("stage 1 step 10/10") and last.endswith("loss 0.125")


def test_plain_lines_are_few():
    out = io.StringIO()
    with Progress(100, every_seconds=1000, file=out) as progress:
        for _ in range(100):
            progress.update()
    assert len(out.getvalue().splitlines()) == 1
