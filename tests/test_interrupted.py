"""Events at which tests interrupt a command: at the call that is named, or it is said."""

import importlib
import signal
import textwrap

import pytest

from blip2_jax import __main__ as blip2
from tests import interrupted


@pytest.fixture
def heard(monkeypatch):
    """The signals that came; the function of the events is as before afterwards."""
    monkeypatch.setattr(textwrap, "dedent", textwrap.dedent)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    numbers = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("options", ["", ":process=0"])
def test_the_signal_comes_once_when_that_call_has_returned(heard, options):
    happened = interrupted.plant(f"textwrap.dedent:2:SIGUSR1{options}")
    for calls in (1, 2, 3):
        assert textwrap.dedent(" a") == "a"
        assert happened() == (calls > 1) and heard == [signal.SIGUSR1] * (calls > 1)


def test_another_process_gets_none(heard):
    happened = interrupted.plant("textwrap.dedent:1:SIGUSR1:process=1")
    textwrap.dedent("a")
    assert happened() and heard == []


def test_a_call_is_repeated_until_it_is_true(heard, monkeypatch):
    asked = iter([False, False, False, True])
    monkeypatch.setattr(textwrap, "dedent", lambda: next(asked))
    interrupted.plant("textwrap.dedent:2:SIGUSR1:until_true")
    assert textwrap.dedent() is False and textwrap.dedent() is True
    assert heard == [signal.SIGUSR1]


@pytest.mark.parametrize(
    "event",
    [
        "textwrap.dedents:1:SIGUSR1", "no.dedent:1:SIGUSR1", "textwrap.dedent:1:SIGNONE",
        "textwrap.dedent:0:SIGUSR1", "textwrap.dedent:1", "textwrap.dedent:1:SIGUSR1:all",
    ],
)  # fmt: skip
def test_an_event_that_cannot_be_is_refused(event):
    with pytest.raises(SystemExit, match=event):
        interrupted.plant(event)


def test_an_event_that_did_not_happen_is_said(monkeypatch, capsys):
    monkeypatch.setenv(interrupted.VARIABLE, "textwrap.dedent:1:SIGUSR1")
    monkeypatch.setattr("sys.argv", ["blip2", "--version"])
    monkeypatch.setattr(blip2, "importlib", importlib)  # as before afterwards
    assert interrupted.main() == interrupted.NEVER
    assert "it has not happened" in capsys.readouterr().err
