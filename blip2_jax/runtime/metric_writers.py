"""Where a run's scalars go: JSONL files and TensorBoard.

The interface is that of `clu.metric_writers`, so that clu's own writers can be used beside these
where TensorFlow is installed, which clu imports for them; nothing here does.

There are two JSONL files on purpose. `metrics.jsonl` holds what the run computes, and a run that
was stopped and resumed leaves the same file as one that never stopped; `timing.jsonl` holds what
depends on the machine and the moment.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams as hparams_summaries

from blip2_jax.runtime.jsonl import drop_lines_after
from blip2_jax.runtime.run_dir import RunDir

Scalar = int | float | np.number | np.ndarray | jax.Array


class MetricWriter(Protocol):
    """The part of `clu.metric_writers.MetricWriter` that a run needs."""

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes numbers, or arrays of one element, of a step."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes hyperparameters, flat by name; once."""

    def flush(self) -> None:
        """Writes out what is buffered."""

    def close(self) -> None:
        """Flushes and closes; the writer cannot be used any more."""


class JsonlWriter:
    """One line a step in a file, for programs.

    Args:
      path: the file; it is appended to.
      last_step: lines of later steps are dropped, for they will be written again.

    Attributes:
      last_step: of the last line that was there and is kept; None: there is none.
    """

    def __init__(self, path: Path, *, last_step: int = -1):
        kept = drop_lines_after(path, last_step)
        self.last_step: int | None = kept[-1]["step"] if kept else None
        self._file = open(path, "a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes a line, which is in the file when this returns; none for no scalars."""
        if scalars:
            line = {"step": int(step), **_numbers(scalars)}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes nothing: a run's config is in its checkpoints, and these files hold scalars."""

    def flush(self) -> None:
        """Every line is written out at once; there is nothing to do."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard's event files, written without TensorFlow.

    Args:
      folder: for the files; made if need be.
      last_step: TensorBoard leaves out what earlier files hold of later steps.
    """

    def __init__(self, folder: Path, *, last_step: int = -1):
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Adds a point to each scalar's curve."""
        for name, number in _numbers(scalars).items():
            self._writer.add_scalar(name, number, int(step))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes what TensorBoard's page of hyperparameters shows."""
        known = {
            name: value if isinstance(value, (bool, int, float, str)) else repr(value)
            for name, value in hparams.items()
        }
        for summary in hparams_summaries(known, {}):
            self._writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Writes out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()


class MultiWriter:
    """Writes the same to several writers, in their order."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """See `MetricWriter`; arrays are fetched from their devices once."""
        scalars = jax.device_get(dict(scalars))
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.close()


class RunWriters:
    """The writers of a run; on all processes but the first they write nothing.

    For a resumed run to repeat its files exactly, write all numbers of a step before the checkpoint
    of that step is saved.

    Args:
      workdir: the run's folder; made if need be.
      restored_step: the step of the checkpoint that the run resumed from: lines after it are
        dropped, for they will be written again. None for a run from the start: all are dropped.
      active: whether this process writes; only the first does when None.

    Attributes:
      metrics: what the run computes.
      timing: what depends on the machine and the moment.
      last_step: of the last line of metrics that was there and is kept; None: there is none, or
        this process does not write.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        restored_step: int | None = None,
        active: bool | None = None,
    ):
        self.last_step: int | None = None
        self.metrics: MetricWriter = MultiWriter([])
        self.timing: MetricWriter = MultiWriter([])
        self._open: list[MetricWriter] = []
        if not (jax.process_index() == 0 if active is None else active):
            return
        run = RunDir(workdir)
        run.path.mkdir(parents=True, exist_ok=True)
        last = -1 if restored_step is None else restored_step
        metrics = JsonlWriter(run.metrics, last_step=last)
        timing = JsonlWriter(run.timing, last_step=last)
        tensorboard = TensorBoardWriter(run.tensorboard, last_step=last)
        self.last_step = metrics.last_step
        self.metrics = MultiWriter([metrics, tensorboard])
        self.timing = MultiWriter([timing, tensorboard])
        self._open = [metrics, timing, tensorboard]

    def __enter__(self) -> "RunWriters":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(
        self,
        step: int,
        metrics: Mapping[str, Scalar],
        timing: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Writes the scalars of a step, the number of steps done."""
        self.metrics.write_scalars(step, metrics)
        self.timing.write_scalars(step, timing or {})

    def close(self) -> None:
        """Flushes and closes all files."""
        for writer in self._open:
            writer.close()


def _numbers(scalars: Mapping[str, Scalar]) -> dict[str, int | float]:
    return {name: _number(name, value) for name, value in scalars.items()}


def _number(name: str, value: Scalar) -> int | float:
    if np.size(value) != 1:
        raise ValueError(
            f"The metric {name!r} has the shape {np.shape(value)}; it must be a scalar."
        )
    number = np.asarray(value).item()
    return number if isinstance(number, int) else float(number)
