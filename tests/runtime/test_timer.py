"""Rates and goodput, on a clock that the test turns."""

import jax
import pytest

from blip2_jax.planning import chips
from blip2_jax.runtime import timer


@pytest.fixture
def now(monkeypatch):
    """Seconds; and a date that jumps at every look, which must not matter."""
    time = [100.0]
    dates = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(timer.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(timer.time, "time", lambda: float(next(dates)))
    return time


def test_time_is_told_apart(now):
    run = timer.Timer(examples=16, flops=1e9)
    now[0] += 20  # starting and compiling
    run.start()
    now[0] += 10
    with run.pause():
        now[0] += 5  # a checkpoint
    timing = run.read(4, waited=2.5)
    assert timing["examples_per_second"] == pytest.approx(4 * 16 / 10)
    assert timing["examples_per_second_per_chip"] == pytest.approx(6.4 / jax.device_count())
    assert timing["data_wait"] == pytest.approx(0.25)
    assert timing["goodput"] == pytest.approx(7.5 / 35)
    assert "mfu" not in timing  # no rate is stated for a CPU
    now[0] += 10
    timing = run.read(5, waited=2.5)
    assert timing["examples_per_second"] == pytest.approx(1.6) and timing["data_wait"] == 0
    assert (run.seconds, run.productive_seconds) == (pytest.approx(45), pytest.approx(17.5))


def test_a_resumed_run_counts_on(now):
    run = timer.Timer(examples=1, flops=1.0)
    run.resume(seconds=100.0, productive_seconds=80.0)
    run.start()
    now[0] += 20
    assert run.read(2, waited=0.0)["goodput"] == pytest.approx(100 / 120)
    assert run.seconds == pytest.approx(120)


def test_mfu_is_the_share_of_what_the_chips_could_do(now):
    run = timer.Timer(examples=100, flops=197e9, peak_flops=chips.CHIPS["v5e"].peak_flops)
    run.start()
    now[0] += 1
    per_chip = 197e12 * jax.device_count()
    assert run.read(1, waited=0.0)["mfu"] == pytest.approx(100 * 197e9 / per_chip)
