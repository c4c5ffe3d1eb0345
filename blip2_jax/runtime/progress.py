"""How far a long task is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

import jax
from clu import platform
from tqdm import tqdm

from blip2_jax.runtime.watchdog import alive


class Progress:
    """A bar on a terminal, and a plain line now and then where output goes to a file.

    Args:
      total: the number of steps of the whole run.
      initial: the steps done before, in a resumed run.
      label: what is going on, e.g. "stage 1".
      unit: what is counted.
      every_seconds: the time between two plain lines.
      file: where to; standard error when None.
      active: whether this process shows anything; only the first does when None.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        label: str = "",
        unit: str = "step",
        every_seconds: float = 15.0,
        file: TextIO | None = None,
        active: bool | None = None,
    ):
        self._file = sys.stderr if file is None else file
        self._active = jax.process_index() == 0 if active is None else active
        self._label, self._unit, self._total = label, unit, total
        self._done = self._initial = initial
        self._every = every_seconds
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self._active and self._file.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=label,
                unit=unit,
                file=self._file,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, count: int = 1, **shown: float) -> None:
        """Counts `count` more, and shows the latest numbers, e.g. `loss=1.2`; a sign of life."""
        alive()
        self._done += count
        if self._bar is not None:
            if shown:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            self._bar.update(count)
        elif self._active:
            now = time.monotonic()
            if now - self._shown >= self._every or self._done >= self._total:
                self._shown = now
                self._print_line(now - self._start, shown)

    def _print_line(self, seconds: float, shown: Mapping[str, float]) -> None:
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        left = tqdm.format_interval((self._total - self._done) / rate) if rate else "?"
        parts = [
            f"{self._label} {self._unit} {self._done}/{self._total}".strip(),
            f"{rate:.3g} {self._unit}/s",
            f"{left} left",
        ]
        if shown:
            parts.append(format_metrics(shown))
        line = "  ".join(parts)
        print(line, file=self._file, flush=True)
        platform.work_unit().set_notes(
            line
        )  # XManager's page of the experiment, where there is one

    def close(self) -> None:
        """Leaves the bar as it is and moves on to the next line."""
        if self._bar is not None:
            self._bar.close()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`loss 1.234  itc/accuracy 0.5`, for people."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
