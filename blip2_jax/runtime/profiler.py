"""A trace of some steps."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Records some steps for TensorBoard's and XProf's trace viewers.

    Args:
      folder: where the trace goes.
      first: number of the first step to record, counted from 0.
      steps: how many; 0: none.
    """

    def __init__(self, folder: str | Path, first: int, steps: int):
        self._folder = str(folder)
        self._first, self._last = first, first + steps
        self._on = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._on:
            jax.profiler.stop_trace()

    def before(self, step: int, results: Any) -> None:
        """Call before each step with its number and the results of the one before."""
        on = self._first <= step < self._last
        if on == self._on:
            return
        jax.block_until_ready(results)  # nothing of the steps before or after is in the trace
        if on:
            jax.profiler.start_trace(self._folder)
        else:
            jax.profiler.stop_trace()
        self._on = on
