"""The points of a recipe's sweep, and the run of each."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_jax import cli
from blip2_jax.runtime import compare, values
from blip2_jax.runtime.run_dir import RunDir

_LONGEST_NAME = 100  # characters; file systems end at 255


class Hyper:
    """What `get_hyper(hyper)` builds a sweep from: lists of points, each a dict by config key.

    The names are those of XManager's hyper module, as configs of big_vision and others use them;
    a key may begin with `config.`.
    """

    def sweep(self, key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """One point for each value of a key."""
        return [{key.removeprefix("config."): value} for value in values]

    def fixed(self, key: str, value: Any, length: int = 1) -> list[dict[str, Any]]:
        """The same value `length` times, to zip with others."""
        return self.sweep(key, [value] * length)

    def product(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Every point of one with every point of the others; the last varies fastest."""
        return [_merged(points) for points in itertools.product(*sweeps)]

    def zipit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """First with first, second with second, ...; all must be equally long."""
        lengths = [len(sweep) for sweep in sweeps]
        if len(set(lengths)) > 1:
            raise cli.ConfigError(f"zipit takes sweeps of one length; these have {lengths} points.")
        return [_merged(points) for points in zip(*sweeps, strict=True)]

    def chainit(self, sweeps: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """One after the other."""
        return [dict(point) for points in sweeps for point in points]

    def discrete(self, values: Sequence[Any]) -> list[Any]:
        """The values as they are; also as `categorical`."""
        return list(values)

    categorical = discrete


def _merged(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        repeated = merged.keys() & point.keys()
        if repeated:
            raise cli.ConfigError(f"Two parts of the sweep set {', '.join(sorted(repeated))}.")
        merged |= point
    return merged


@dataclass(frozen=True)
class Run:
    """One point of a sweep."""

    name: str
    point: Mapping[str, str]  # what is swept, as text
    config: str  # the whole config, as JSON
    flags: tuple[str, ...]  # of `blip2 train`
    workdir: Path

    def is_finished(self) -> bool:
        """Whether its workdir holds its results.

        Raises:
          ConfigError: the workdir holds those of another run.
        """
        saved = RunDir(self.workdir).read_finished()
        if saved is None:
            return False
        config = json.loads(self.config)
        cli.check_same_run(saved, {"recipe": config["name"], "config": config}, self.workdir)
        # For more steps it goes on; and where things moved, it looks at them itself.
        before = saved["config"]
        return before["steps"] == config["steps"] and not compare.moved(before, config)


def read_points(path: str) -> list[dict[str, Any]]:
    """The points of a recipe's `sweep(add)` or `get_hyper(hyper)`, in its order.

    Args:
      path: as in `cli.load_config`.

    Raises:
      ConfigError: it has neither or both, or no points.
    """
    module = cli.load_module(path)
    forms = [form for form in ("sweep", "get_hyper") if hasattr(module, form)]
    if len(forms) != 1:
        has = "both sweep(add) and get_hyper(hyper); keep one" if forms else "no sweep"
        raise cli.ConfigError(
            f"{path} defines {has}. A sweep is a function beside get_config():\n"
            "  def sweep(add):\n      for seed in range(3):\n          add(seed=seed)"
        )
    points: list[dict[str, Any]] = []

    def add(*values: Any, **point: Any) -> None:
        if values:
            raise cli.ConfigError(
                f"add({values[0]!r}) in {path}: keys have names, as in add(seed=1) or "
                "add(**{'optim.peak_lr': 1e-4})."
            )
        points.append(point)

    if forms == ["sweep"]:
        module.sweep(add)
    else:
        points = [dict(point) for point in module.get_hyper(Hyper())]
    if not points:
        raise cli.ConfigError(f"The sweep of {path} has no points.")
    return points


def make_runs(path: str, workdir: Path, common: Sequence[str] = ()) -> list[Run]:
    """All runs of a sweep, each checked against the config.

    Args:
      path: of the recipe.
      workdir: of the sweep.
      common: `--config.key=value` flags for all runs.

    Raises:
      ConfigError: a key or value that the config does not take, a key that `common` sets too, or
        two points that are the same run.
    """
    runs: list[Run] = []
    everywhere = {flag.removeprefix(cli.OVERRIDE).partition("=")[0] for flag in common}
    for number, point in enumerate(read_points(path), 1):
        texts = {key: as_text(value) for key, value in sorted(point.items())}
        overrides = [*common, *(f"{cli.OVERRIDE}{key}={text}" for key, text in texts.items())]
        repeated = everywhere & texts.keys()
        if repeated:
            raise cli.ConfigError(
                f"{cli.OVERRIDE}{min(repeated)} is on the command line, but {path} sweeps over it."
            )
        try:
            config = cli.config_to_json(cli.load_config(path, overrides))
        except cli.ConfigError as error:
            raise cli.ConfigError(f"Point {number} of the sweep of {path}: {error}") from error
        for other, run in enumerate(runs, 1):
            if run.config == config:
                raise cli.ConfigError(f"Points {other} and {number} of {path} are the same run.")
        name = run_name(texts)
        flags = (f"--config={path}", f"--workdir={workdir / name}", *overrides)
        runs.append(Run(name, texts, config, flags, workdir / name))
    return runs


def as_text(value: Any) -> str:
    """A value as `--config.key=value` takes it."""
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    if isinstance(value, (list, tuple)):
        inner = "".join(f"{v!r}," for v in value)
        return f"({inner if len(value) == 1 else inner[:-1]})"
    return values.escape(value) if isinstance(value, str) else repr(value)


def run_name(point: Mapping[str, str]) -> str:
    """`optim.peak_lr=0.0001,seed=1`: readable, and safe in every file system and shell.

    It depends on this point alone, so that a sweep can grow. A checksum stands for what cannot
    be in a name.
    """
    text = ",".join(f"{key}={value}" for key, value in sorted(point.items())) or "base"
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
