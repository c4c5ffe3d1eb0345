"""Checkpoints of a run: the train state and one JSON document, saved together or not at all.

A step's folder gets its final name only once all of it is written, so a process that is killed at
any moment leaves the previous checkpoint as the latest one. Orbax is used through its stable
(v0) interface, and only in this file.
"""

import contextlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blip2_jax.runtime import distributed
from blip2_jax.runtime.compare import run_differences
from blip2_jax.runtime.mesh import flatten_with_names, nested


class CheckpointError(ValueError):
    """The checkpoint does not belong to what is being restored."""


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpointer:
    """The checkpoints under one folder, local or `gs://`.

    Use as a context manager, or call `close`: saving goes on in the background.

    Args:
      directory: holds one folder a step; made if need be.
      keep_last: how many of the newest to keep.
      keep_every: also keep, for good, every step that this number divides; 0 = none.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, keep_every: int = 0):
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least one checkpoint must be kept.")
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = epath.Path(Path(directory).absolute())
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named here so that a fresh process can read the shapes before it reads the arrays.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> bool:
        """Saves in the background; `state` may be donated as soon as this returns.

        Args:
          step: the number of steps that made `state`.
          state: a tree of arrays.
          extra: anything JSON can hold, e.g. config, tower fingerprints and data position.

        Returns:
          False if this step was saved before, in which case nothing is written.

        Raises:
          SaveError: this one or the one before could not be written, e.g. because the disk is full.
        """
        if step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(dict(extra))
        )
        with self._saving(step):
            return self._manager.save(step, args=items)

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON document of a step (of the latest when None)."""
        step = self._existing(step)
        items = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["extra"]

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        expect: Mapping[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices that `abstract_state` names.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with `sharding`; the mesh need not be the one the
            checkpoint was saved from.
          step: the latest when None.
          expect: entries that the JSON document must hold, e.g. the recipe and the fingerprints of
            the frozen towers; `compare.run_differences` says what may differ.

        Returns:
          The state and the JSON document.

        Raises:
          CheckpointError: no such checkpoint, another recipe, or other leaves, shapes or dtypes.
            All differences are listed, before any array is read.
        """
        step = self._existing(step)
        extra = self.extra(step)
        # Through JSON, as the saved document was: its tuples are lists.
        wrong = run_differences(extra, json.loads(json.dumps(dict(expect or {}))))
        if wrong:
            raise CheckpointError(
                f"{self.directory} holds another run. Use a new workdir, or go back to what it was "
                "trained with:\n" + "\n".join(wrong)
            )
        self._check_leaves(step, abstract_state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=items)["state"], extra

    def restore_newest(
        self, abstract_state: Any, *, expect: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """As `restore`, of the newest checkpoint that can be read; None where there is none.

        One that is there but cannot be read (a file cut short as the power failed) is reported and
        put aside under another name, `broken-STEP`; nothing is deleted.

        Raises:
          CheckpointError: as `restore`; or there are checkpoints and none can be read.
        """
        broken: list[int] = []
        for step in reversed(self.all_steps()):
            try:
                restored, trouble = self.restore(abstract_state, step, expect=expect), None
            except CheckpointError:
                raise
            except Exception as error:
                restored, trouble = None, error
            if distributed.all_agree(trouble is None):
                for other in broken:
                    self._put_aside(other)
                return restored
            broken.append(step)
            if distributed.is_first_process() or trouble is not None:
                print(
                    f"The checkpoint of step {step} in {self.directory} cannot be read, and is "
                    f"left out: {_reason(trouble) if trouble else 'on another host'}",
                    file=sys.stderr,
                )
        if broken:
            raise CheckpointError(
                f"None of the checkpoints in {self.directory} can be read (steps {broken}). Mend "
                "or move that folder, or take a new workdir."
            )
        return None

    def _put_aside(self, step: int) -> None:
        target = self.directory / f"broken-{step}"
        if distributed.is_first_process() and not target.exists():
            (self.directory / str(step)).rename(target)
        distributed.barrier(f"put aside {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Returns once all that was saved is on disk."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being saved."""
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self, step: int | None = None) -> Iterator[None]:
        """Says of a failed save, of now or of the background, what it means and what to do."""
        try:
            yield
        except Exception as error:
            which = "A checkpoint" if step is None else f"The checkpoint of step {step}, or before,"
            # What is on disk, not what was to be.
            whole = max(ocp.utils.checkpoint_steps(self.directory), default=None)
            peers = "and whether all processes are alive, " if jax.process_count() > 1 else ""
            raise SaveError(
                f"{which} could not be written to {self.directory}: {_reason(error)}\nThe last "
                f"whole one is of step {whole}. Look for space and rights there, {peers}then start "
                "the same command again: it goes on from that step."
            ) from error

    def _existing(self, step: int | None) -> int:
        existing = self.latest_step if step is None else step
        if existing is None or existing not in self._manager.all_steps():
            name = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(
                f"There is no {name} in {self.directory}; it holds the steps {self.all_steps()}."
            )
        return existing

    def _check_leaves(self, step: int, abstract_state: Any) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"])
        wanted = _shapes(abstract_state)
        lines = []
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                lines.append(f"  {path}: {_leaf(saved, path)} saved, {_leaf(wanted, path)} wanted")
        if lines:
            raise CheckpointError(
                f"Step {step} in {self.directory} does not fit the model or optimizer of this "
                "config. Use a new workdir, or the config the run was started with:\n"
                + "\n".join(lines)
            )


# ------------------------------------------------------------------- one checkpoint, only read


def steps_in(directory: str | Path) -> list[int]:
    """The complete checkpoints in a folder, oldest first; a run may be saving others meanwhile."""
    paths = ocp.utils.checkpoint_steps_paths(epath.Path(directory))
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def is_step(folder: Path) -> bool:
    """Whether a folder is a checkpoint, whatever its name."""
    return (folder / "state").is_dir() and (folder / "extra").is_dir()


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The JSON document of a checkpoint.

    Args:
      folder: the checkpoint's own, e.g. `checkpoints/1000`.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return dict(reader.restore(_item(folder, "extra")))
    except Exception as error:  # the library's errors have no common class
        raise CheckpointError(_unreadable(folder, error)) from error


def restore_params(folder: str | Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a checkpoint; its optimizer state is not read.

    Args:
      folder: the checkpoint's own, e.g. `checkpoints/1000`.
      abstract: a nested dict of arrays or `jax.ShapeDtypeStruct`s, with shardings: all or some of
        the parameters that were saved.

    Returns:
      A dict like `abstract`.

    Raises:
      CheckpointError: parameters that are not there or have other shapes, all listed; or the files
        cannot be read.
    """
    theirs = _saved_params(folder)
    lines = [
        f"  {path}: {_leaf(theirs, path)} saved, {list(leaf.shape)} wanted"
        for path, leaf in flatten_with_names(abstract)
        if path not in theirs or theirs[path][0] != leaf.shape
    ]
    if lines:
        raise CheckpointError(
            f"{folder} was trained with other sizes. Give config.model the sizes of that run:\n"
            + "\n".join(lines)
        )
    item = {"params": abstract}
    try:
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                _item(folder, "state"),
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # the library's errors have no common class
        raise CheckpointError(_unreadable(folder, error)) from error
    return restored["params"]


def restore_params_into(
    folder: str | Path, params: dict[str, Any]
) -> tuple[dict[str, Any], int, list[str]]:
    """Replaces those parameters that a checkpoint has too, matched by their path.

    The optimizer state is left alone, and what the checkpoint has besides is not read.

    Args:
      folder: the checkpoint's own, e.g. `checkpoints/1000`.
      params: a nested dict of arrays, whose shapes, dtypes and shardings are kept.

    Returns:
      The parameters, the number of arrays taken, and what was not found: whole top-level keys, or
      the paths of single arrays.

    Raises:
      CheckpointError: nothing in common, or as `restore_params`.
    """
    theirs = _saved_params(folder)
    ours = dict(flatten_with_names(params))
    common = {path: leaf for path, leaf in ours.items() if path in theirs}
    if not common:
        raise CheckpointError(f"{folder} has none of {list(params)}.")
    restored = restore_params(folder, nested(common))
    merged = ours | dict(flatten_with_names(restored))
    return nested(merged), len(common), _missing(ours, set(common))


def saved_shapes(folder: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of all arrays that a checkpoint holds; parameters begin "params/".

    Args:
      folder: the checkpoint's own, e.g. `checkpoints/1000`.

    Raises:
      CheckpointError: the files cannot be read.
    """
    try:
        # Of the handler: the checkpointer's own keeps its errors to itself.
        return _shapes(ocp.PyTreeCheckpointHandler().metadata(_item(folder, "state")))
    except Exception as error:  # the library's errors have no common class
        raise CheckpointError(_unreadable(folder, error)) from error


def _item(folder: str | Path, name: str) -> epath.Path:
    """A part of a checkpoint; Orbax reads absolute paths only."""
    return epath.Path(Path(folder).absolute()) / name


def _saved_params(folder: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes = saved_shapes(folder)
    return {
        path.removeprefix("params/"): leaf
        for path, leaf in shapes.items()
        if path.startswith("params/")
    }


def _unreadable(folder: str | Path, error: BaseException) -> str:
    return (
        f"The checkpoint {folder} cannot be read ({_reason(error)}). Name another one of that run, "
        "as WORKDIR/checkpoints/STEP; or the same command trains on from the one before."
    )


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype)."""
    return {
        path: (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in flatten_with_names(tree)
    }


def _missing(paths: Collection[str], taken: Collection[str]) -> list[str]:
    """The top-level keys of which nothing was taken, and the other paths one by one."""
    some = {path.split("/")[0] for path in taken}
    names = [p if p.split("/")[0] in some else p.split("/")[0] for p in paths if p not in taken]
    return list(dict.fromkeys(names))


def _reason(error: BaseException) -> str:
    """The innermost cause, in one short line: its end, where the system's own words are."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"


def _leaf(leaves: Mapping[str, tuple[tuple[int, ...], str]], path: str) -> str:
    if path not in leaves:
        return "nothing"
    shape, dtype = leaves[path]
    return f"{dtype}{list(shape)}"
