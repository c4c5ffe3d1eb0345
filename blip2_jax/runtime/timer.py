"""Where the time of a run goes: examples a second, FLOPs utilisation, waiting for data, goodput.

All times are of a monotonic clock: a machine whose date is set changes nothing.
"""

import contextlib
import time
from collections.abc import Iterator

import jax


class Timer:
    """Measures one process of a run.

    Goodput is the share of a run's time, all its processes since they started, that went into
    steps which count: not into starting, compiling, waiting for data, evaluating or saving, nor
    into steps that were lost in a crash.

    Args:
      examples: in a step.
      flops: of one example in a step (`stages.flops`).
      peak_flops: FLOP/s of one chip (`planning.chips`); None: not known.
    """

    def __init__(self, *, examples: int, flops: float, peak_flops: float | None = None):
        self._examples, self._flops, self._peak_flops = examples, flops, peak_flops
        self._started = time.monotonic()
        self._productive_seconds = 0.0
        self._since = self._steps = self._waited = self._paused = 0.0

    def resume(self, *, seconds: float, productive_seconds: float) -> None:
        """Adds what earlier processes of the run needed, as their last checkpoint says."""
        self._started -= seconds
        self._productive_seconds += productive_seconds

    @property
    def seconds(self) -> float:
        """Of the run, all its processes together."""
        return time.monotonic() - self._started

    @property
    def productive_seconds(self) -> float:
        """The part of `seconds` that went into steps that count."""
        return self._productive_seconds

    def start(self) -> None:
        """Call when the first step is compiled and about to begin."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not counted as a step's: an evaluation, a checkpoint."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def read(self, step: int, waited: float) -> dict[str, float]:
        """What to log of the steps since the last reading.

        Args:
          step: steps that this process has done; all their results are there.
          waited: seconds that it has waited for data.

        Returns:
          `examples_per_second`, of all chips and of one; `data_wait`, a share of the time;
          `goodput`; and, where `peak_flops` is known, `mfu`: the share of it that the model's own
          FLOPs make, rematerialization not counted.
        """
        now = time.monotonic()
        seconds = max(now - self._since - self._paused, 1e-9)
        wait = min(waited - self._waited, seconds)
        rate = (step - self._steps) * self._examples / seconds
        self._productive_seconds += seconds - wait
        self._since, self._steps, self._waited, self._paused = now, step, waited, 0.0
        timing = {
            "examples_per_second": rate,
            "examples_per_second_per_chip": rate / jax.device_count(),
            "data_wait": wait / seconds,
            "goodput": self._productive_seconds / self.seconds,
        }
        if self._peak_flops is not None:
            peak = self._peak_flops * jax.device_count()
            timing["mfu"] = rate * self._flops / peak
        return timing
