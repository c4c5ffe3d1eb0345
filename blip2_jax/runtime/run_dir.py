"""The folder of a run: what lies in it, and which of its checkpoints a name stands for.

    WORKDIR/checkpoints/STEP/   parameters and optimizer (`state`), and what the run is (`extra`)
    WORKDIR/done.json           what the run is and what it cost; written at its end
    WORKDIR/metrics.jsonl       what it computed; timing.jsonl and tensorboard/ beside it
    WORKDIR/profile/            a trace of some steps, if one was asked for

A run, finished or not, is named by its workdir, which stands for its newest checkpoint; one of its
checkpoints by WORKDIR/checkpoints/STEP, wherever that folder was copied to.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2_jax.runtime import atomic, checkpoint, digest, jobs
from blip2_jax.runtime.checkpoint import CheckpointError
from blip2_jax.runtime.jsonl import read_jsonl

CHECKPOINTS = "checkpoints"


class RunDir:
    """The folder of a run.

    Args:
      path: the workdir; it need not be there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.lock_file = self.path / "train.lock"  # held while the run is at work
        self._finished = self.path / "done.json"

    def holds_a_run(self) -> bool:
        """Whether a run was started here."""
        return self.checkpoints.exists() or self._finished.exists()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Two runs that write one folder would spoil each other's files.

        Raises:
          jobs.Busy: when it is entered, and another run is at work here.
        """
        return jobs.only_one(
            self.lock_file,
            f"Another run is at work in {self.path}. Wait for its end or stop it, or take another "
            "--workdir.",
        )

    def read_finished(self) -> dict[str, Any] | None:
        """The record of a finished run; None where there is none, or where it is damaged.

        A run can write it again from its last checkpoint, so a damaged one is reported and no
        error.
        """
        if not self._finished.is_file():
            return None
        try:
            return atomic.read_json(self._finished, "The same blip2 train writes it again.")
        except atomic.DamagedFile as error:
            print(error, file=sys.stderr)
            return None

    def write_finished(self, record: Mapping[str, Any]) -> None:
        """Says that the run is finished.

        Args:
          record: what the run is (see `training.identity`) and what it cost.
        """
        atomic.write_json(self._finished, dict(record))

    def remove_finished(self) -> None:
        """Says that the run goes on."""
        self._finished.unlink(missing_ok=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; none where there is no such file."""
        return read_jsonl(self.metrics) if self.metrics.is_file() else []


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run.

    Attributes:
      folder: with the arrays.
      workdir: the run's; None: the folder was copied out of it.
      step: steps that made it.
      document: what was saved with it: the run's `recipe`, `config`, `fingerprints`, ...
    """

    folder: Path
    workdir: Path | None
    step: int
    document: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Steps that the run was to make when this was saved."""
        return int(self.document["config"]["steps"])

    @property
    def name(self) -> str:
        """Short, for reports: the workdir's name, with the step if the run is not at its end."""
        name = (self.workdir or self.folder).resolve().name
        return name if self.step >= self.steps else f"{name}@{self.step}"

    @property
    def stamp(self) -> str:
        """A hash of what the checkpoint is; the same wherever it lies."""
        return digest.of_text(json.dumps([self.step, self.document], sort_keys=True))


def find(source: str | Path) -> RunCheckpoint | None:
    """The checkpoint that a workdir (its newest) or a checkpoint's own folder stands for.

    Nothing is written, and the run may be at work meanwhile.

    Returns:
      None where `source` is no such thing.

    Raises:
      CheckpointError: it is a run without that checkpoint, or without any; or what was saved with
        the checkpoint cannot be read.
    """
    forms = Path(source), Path(os.path.abspath(source)), Path(source).resolve()
    for path in dict.fromkeys(forms):
        if path.parent.name == CHECKPOINTS and path.name.isdigit():
            return _open(path.parent, int(path.name))
        if checkpoint.is_step(path):
            return _read(path, None, None)
        folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
        if folder.is_dir():
            return _open(folder, None)
    return None


def stamp(source: str | Path) -> str:
    """A hash of a model, wherever it lies: of a run's checkpoint, of a folder's files, of a file.

    Returns:
      "" where it is not on this machine.

    Raises:
      CheckpointError: see `find`.
    """
    run = find(source)
    if run is not None:
        return run.stamp
    path = Path(source)
    inside = [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("[!.]*")))
    return digest.of_files(inside) if inside else ""


def _open(folder: Path, step: int | None) -> RunCheckpoint | None:
    """A step of a run's `checkpoints/`; the newest when None."""
    steps, workdir = checkpoint.steps_in(folder), folder.parent
    if step is None and steps:
        step = steps[-1]
    if not steps and not RunDir(workdir).lock_file.is_file():
        return None  # somebody else's folder of that name
    if step is None:
        raise CheckpointError(
            f"The run in {workdir} has saved no checkpoint yet. Go on with blip2 train "
            f"--workdir={workdir}, or name another."
        )
    if step not in steps:
        there = f"there are those of the steps {', '.join(map(str, steps)) or '(none)'}"
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; {there}.")
    return _read(folder / str(step), workdir, step)


def _read(folder: Path, workdir: Path | None, step: int | None) -> RunCheckpoint | None:
    if not checkpoint.is_step(folder):
        return None
    document = checkpoint.read_extra(folder)
    if "config" not in document:  # a model in the native format, whose arrays are saved likewise
        return None
    return RunCheckpoint(folder, workdir, document["step"] if step is None else step, document)
