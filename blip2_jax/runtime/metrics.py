"""Numbers over time: a JSONL file, TensorBoard, the console, and a progress display.

Two files on purpose. `metrics.jsonl` holds what the run computes, and a run that was stopped and
resumed leaves the same file as one that never stopped; `timing.jsonl` holds what its clock says.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from blip2_jax.runtime import atomic
from blip2_jax.runtime.watchdog import alive

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"


class MetricsWriter:
    """Writes scalars of a run; on all processes but the first it does nothing.

    For a resumed run to repeat its file exactly, write all numbers of a step before the checkpoint
    of that step is saved.

    Args:
      workdir: the run's folder; TensorBoard files go into `workdir/tensorboard`.
      restored_step: the step of the checkpoint that the run resumed from: lines after it are
        dropped, for they will be written again. None for a run from the start: all are dropped.
      active: whether this process writes; only the first does when None.

    Attributes:
      last_step: of the last line that was there and is kept; None: there is none, or this process
        does not write.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        restored_step: int | None = None,
        active: bool | None = None,
    ):
        self._active = jax.process_index() == 0 if active is None else active
        self.last_step: int | None = None
        if not self._active:
            return
        last = -1 if restored_step is None else restored_step
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in (METRICS_FILE, TIMING_FILE):
            kept = _drop_lines_after(workdir / name, last)
            if name == METRICS_FILE and kept:
                self.last_step = kept[-1]["step"]
            self._files[name] = open(workdir / name, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        timing: Mapping[str, Any] | None = None,
        echo: bool = False,
    ) -> None:
        """Writes one line for a step.

        Args:
          step: the number of steps done.
          metrics: scalars (numbers or arrays of one element, also on devices).
          timing: scalars that depend on the machine and the moment, e.g. `steps_per_second`.
          echo: also print the line.
        """
        if not self._active:
            return
        scalars = {}
        for name, values in ((METRICS_FILE, metrics), (TIMING_FILE, timing or {})):
            numbers = {
                key: _number(key, value) for key, value in jax.device_get(dict(values)).items()
            }
            if numbers:
                self._files[name].write(json.dumps({"step": int(step), **numbers}) + "\n")
                self._files[name].flush()
            scalars.update(numbers)
        for key, value in scalars.items():
            self._tensorboard.add_scalar(key, value, int(step))
        if echo:
            tqdm.write(f"step {step}  {format_metrics(scalars)}")

    def close(self) -> None:
        """Flushes and closes all files."""
        if not self._active:
            return
        for file in self._files.values():
            file.close()
        self._tensorboard.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file.

    A last line that a killed process left unfinished is skipped; others that are damaged, by a
    crash of the machine or by hand, are skipped and reported.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record.get("step"), int):
                raise ValueError("no step")
            records.append(record)
        except (ValueError, AttributeError):
            if number < len(lines):
                print(
                    f"{path}, line {number} is damaged and left out: {line[:80]!r}", file=sys.stderr
                )
    return records


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Returns the lines that are kept."""
    if not path.exists():
        return []
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    atomic.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _number(key: str, value: Any) -> int | float:
    if np.size(value) != 1:
        raise ValueError(
            f"The metric {key!r} has the shape {np.shape(value)}; it must be a scalar."
        )
    number = np.asarray(value).item()
    return number if isinstance(number, int) else float(number)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`loss 1.234  itc/accuracy 0.5`, for people."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())


class Profiler:
    """Records some steps for TensorBoard's and XProf's trace viewers, into `workdir/profile`.

    Args:
      workdir: the run's folder.
      first: number of the first step to record, counted from 0.
      steps: how many; 0: none.
    """

    def __init__(self, workdir: str | Path, first: int, steps: int):
        self._folder = str(Path(workdir) / "profile")
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
        print("  ".join(parts), file=self._file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and moves on to the next line."""
        if self._bar is not None:
            self._bar.close()
