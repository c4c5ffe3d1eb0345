"""Steps whose loss or gradient was not finite: reported with their records, and bounded.

The step itself leaves parameters and optimizer alone then and counts it (`optim.apply_gradients`).
"""

import sys
from collections.abc import Callable, Sequence

import jax
from tqdm import tqdm

from blip2_jax.runtime import distributed


class BadSteps:
    """Watches the count of bad steps.

    Counts stay on the device until `flush`, so that no step waits for the one before.

    Args:
      step: steps done before, by earlier processes of the run.
      count: bad ones among them.
      max_count: how many a run may have.
      records: number of a step, from 0 -> the records of its batch, for the report.
    """

    def __init__(
        self, *, step: int, count: int, max_count: int, records: Callable[[int], Sequence[int]]
    ):
        self._step, self._count, self._max_count, self._records = step, count, max_count, records
        self._waiting: list[jax.Array] = []

    @property
    def too_many(self) -> bool:
        """Whether the run must stop, as of the last `flush`."""
        return self._count > self._max_count

    def add(self, count: jax.Array) -> None:
        """Takes the count after one more step, int32[], without waiting for it."""
        self._waiting.append(count)

    def flush(self) -> None:
        """Reports the bad ones of the steps that were added since the last flush."""
        counts, self._waiting = jax.device_get(self._waiting), []
        for count in counts:
            if count > self._count and distributed.is_first_process():
                tqdm.write(
                    f"Step {self._step + 1}: loss or gradient not finite; left out. Its records: "
                    f"{list(self._records(self._step))}",
                    file=sys.stderr,
                )
            self._step, self._count = self._step + 1, int(count)

    def message(self) -> str:
        """What a run that must stop says."""
        return (
            f"{self._count} steps with a loss or gradient that is not finite, more than "
            f"config.faults.max_bad_steps={self._max_count}; they changed no parameter, and the "
            f"run is saved at step {self._step}. Look at the records above. To go on, allow more "
            "of them; or start anew with a lower config.optim.peak_lr or with "
            "config.optim.clip_norm=1.0."
        )
