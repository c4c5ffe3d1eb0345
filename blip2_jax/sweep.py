"""Run every point of a recipe's sweep, skipping what is done; a table and curves over all runs.

    blip2 sweep --config=configs/digits/stage1.py --workdir=runs/seeds --backend=print
    blip2 sweep --config=configs/digits/stage1.py --workdir=runs/seeds --backend=local --workers=2
    TPU_NAME=mine TPU_TYPE=v5litepod-16 blip2 sweep --config=configs/R.py \\
        --workdir=/gcs/BUCKET/runs --backend=tpu --workers=4

The recipe says what is swept, in a function beside its get_config():

    def sweep(add):
        for lr in (1e-4, 3e-4):
            add(seed=1, **{"optim.peak_lr": lr})

or in get_hyper(hyper), with hyper.sweep, product, zipit and chainit. --config.KEY=VALUE holds for
all runs. Everything is checked before anything starts. Each run has a folder in the workdir, named
after its overrides. The same command again skips what is finished, resumes what was stopped and
tries what failed.

--backend=print, the default, shows the commands; local runs them here; slurm and gke hand the runs
to a queue (ask again later for the table); tpu gives each worker a slice of its own, named
TPU_NAME-0, -1, ... What launch/BACKEND.sh --help lists is set in the environment; DRY_RUN=1 shows
what would be launched. The workdir receives results.csv and results.html.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_jax import cli
from blip2_jax.reporting.sweep_page import write_sweep_report
from blip2_jax.runtime import atomic, compare, jobs, values
from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.outputs import Own, Taken
from blip2_jax.runtime.run_dir import RunDir

BACKENDS = ("print", "local", "slurm", "tpu", "gke")
SWEEP_FILE, RESULTS, PAGE = "sweep.json", "results.csv", "results.html"
LAUNCH = Path(__file__).resolve().parent.parent / "launch"
_LONGEST_NAME = 100  # characters; file systems end at 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 sweep`."""
    parser.add_argument("--workdir", required=True, help="folder of all runs; made if need be")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="print", help="where to run (default: print)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="local, tpu: runs at a time (default: 1)"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 sweep`; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = cli.parse(__doc__, words, add_arguments, prog="blip2 sweep")
    common = [word for word in words if word.startswith(cli.OVERRIDE)]
    try:
        return sweep(args.config_path, Path(args.workdir), common, args.backend, args.workers)
    except (cli.ConfigError, jobs.Busy, atomic.DamagedFile, Taken) as error:
        print(f"blip2 sweep: {error}", file=sys.stderr)
        return 2


def sweep(path: str, workdir: Path, common: Sequence[str], backend: str, workers: int = 1) -> int:
    """Runs a sweep; returns the exit code."""
    if workers < 1:
        raise cli.ConfigError(f"--workers is {workers}; it must be at least 1.")
    if str(workdir).startswith("gs:"):
        raise cli.ConfigError(
            "The files of a sweep are read here as well: mount the buckets (gcsfuse "
            "--implicit-dirs /gcs) and give --workdir=/gcs/BUCKET/PATH, the same place everywhere."
        )
    base = cli.load_config(path, common)
    runs = make_runs(path, workdir, common)
    identity = {"recipe": base.name, "config": json.loads(cli.config_to_json(base))}
    own = Own(workdir, "blip2 sweep")
    own.check(SWEEP_FILE, RESULTS, PAGE)
    check_workdir(workdir, identity)
    left = [run for run in runs if not run.is_finished()]
    dry_run = os.environ.get("DRY_RUN") == "1"
    if backend == "print" or (backend == "local" and dry_run):
        for run in runs:
            print(shlex.join(["blip2", "train", *run.flags]) + ("" if run in left else "  # done"))
        if (workdir / SWEEP_FILE).is_file():
            write_results(own, base.name, runs)
        return 0
    if backend != "local":
        check_launcher(backend)
    else:
        share_gpus(workers)  # an error where there are too few
    if dry_run:
        for run in left:
            words, environment = command(backend, run, 0, workers)
            subprocess.run(words, env={**os.environ, **environment})
        return 0

    cli.make_workdir(workdir)
    with jobs.only_one(workdir / "sweep.lock", f"Another blip2 sweep is at work in {workdir}."):
        remember(own, identity, runs)
        if backend in ("slurm", "gke"):
            failed, stopped = submit(left, backend), False
        else:
            failed, stopped = jobs.run_all(
                runs, workers, lambda run, worker: command(backend, run, worker, workers), "sweep"
            )
            if backend == "tpu" and not stopped and os.environ.get("KEEP") != "1":
                give_back(min(workers, len(left)), workers)
        write_results(own, base.name, runs, failed)
    if failed:
        print(f"\n{len(failed)} of {len(runs)} runs failed; the same command tries them again:")
        for name, code in failed.items():
            print(f"  {name}: exit code {code}. {last_words(workdir / name / jobs.LOG_FILE)}")
    if stopped:
        print("Asked to stop. The same command resumes.")
        return PREEMPTED
    return 1 if failed else 0


# -------------------------------------------------------------------------------- points and runs


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
        twice = merged.keys() & point.keys()
        if twice:
            raise cli.ConfigError(f"Two parts of the sweep set {', '.join(sorted(twice))}.")
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
      path: `FILE.py` or `FILE.py:ARG`.

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
      common: `--config.key=value` words for all runs.

    Raises:
      ConfigError: a key or value that the config does not take, a key that `common` sets too, or
        two points that are the same run.
    """
    runs: list[Run] = []
    everywhere = {word.removeprefix(cli.OVERRIDE).partition("=")[0] for word in common}
    for number, point in enumerate(read_points(path), 1):
        texts = {key: as_text(value) for key, value in sorted(point.items())}
        words = [*common, *(f"{cli.OVERRIDE}{key}={text}" for key, text in texts.items())]
        twice = everywhere & texts.keys()
        if twice:
            raise cli.ConfigError(
                f"{cli.OVERRIDE}{min(twice)} is on the command line, but {path} sweeps over it."
            )
        try:
            config = cli.config_to_json(cli.load_config(path, words))
        except cli.ConfigError as error:
            raise cli.ConfigError(f"Point {number} of the sweep of {path}: {error}") from error
        for other, run in enumerate(runs, 1):
            if run.config == config:
                raise cli.ConfigError(f"Points {other} and {number} of {path} are the same run.")
        name = run_name(texts)
        flags = (f"--config={path}", f"--workdir={workdir / name}", *words)
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


# ------------------------------------------------------------------------------------ the workdir


def check_workdir(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Refuses a folder that holds another sweep, or a run."""
    file = workdir / SWEEP_FILE
    if file.is_file():
        cli.check_same_run(_read(file), identity, workdir)
    elif RunDir(workdir).holds_a_run():
        raise cli.ConfigError(f"{workdir} holds a run, not a sweep; name another --workdir.")


def _read(file: Path) -> dict[str, Any]:
    return atomic.read_json(
        file, "Remove it and give the same command again: the runs beside it stay as they are."
    )


def remember(own: Own, identity: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Writes down whose workdir this is, and says which runs are no longer in the sweep."""
    file = own.folder / SWEEP_FILE
    known = _read(file)["runs"] if file.is_file() else {}
    gone = known.keys() - {run.name for run in runs}
    if gone:
        print(f"No longer in the sweep, and left as they are: {', '.join(sorted(gone))}.")
    content = {**identity, "runs": {**known, **{run.name: run.point for run in runs}}}
    with own.replacing(SWEEP_FILE) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------- running


def command(backend: str, run: Run, worker: int, workers: int) -> tuple[list[str], dict[str, str]]:
    """What trains a run: words, and additions to the environment."""
    if backend == "local":
        words = [sys.executable, "-m", "blip2_jax", "train", *run.flags]
        return words, share_gpus(workers)[worker]
    config, _, *overrides = run.flags
    script = str(LAUNCH / f"{backend}.sh")
    words = [script, config.partition("=")[2], str(run.workdir.absolute()), *overrides]
    # A slice serves one run after the other, until `give_back`.
    return words, slice_of(worker, workers) if backend == "tpu" else {}


def slice_of(worker: int, workers: int) -> dict[str, str]:
    """The environment that gives a worker its own TPU slice."""
    name = os.environ["TPU_NAME"]
    return {"TPU_NAME": f"{name}-{worker}" if workers > 1 else name, "KEEP": "1"}


def give_back(used: int, workers: int) -> None:
    """Deletes the slices of the workers that had something to do."""
    for worker in range(used):
        environment = {**os.environ, **slice_of(worker, workers)}
        subprocess.run([LAUNCH / "tpu.sh", "delete"], env=environment)


def share_gpus(workers: int) -> list[dict[str, str]]:
    """For each worker, the environment that shows it its share of this machine's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS") != "cpu":
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        visible = ",".join(str(i) for i in range(listed.stdout.count("GPU ")))
    gpus = [gpu for gpu in (visible or "").split(",") if gpu]
    if not gpus or workers == 1:
        return [{}] * workers
    if workers > len(gpus):
        raise cli.ConfigError(
            f"--workers={workers}, but there are {len(gpus)} GPUs; a worker needs at least one."
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::workers])} for i in range(workers)]


def check_launcher(backend: str) -> None:
    """Asks a launcher whether it has the tools and the settings that it needs."""
    script = LAUNCH / f"{backend}.sh"
    if not script.is_file():
        raise cli.ConfigError(f"{script} is not there: --backend={backend} needs a checkout.")
    checked = subprocess.run([script, "check"], capture_output=True, text=True)
    if checked.returncode:
        raise cli.ConfigError(f"--backend={backend}: {checked.stderr.strip()}")


def submit(runs: Sequence[Run], backend: str) -> dict[str, int]:
    """Hands runs to a queue; returns the codes of those that it did not take."""
    failed = {}
    for run in runs:
        print(f"{run.name}:", flush=True)
        code = subprocess.run(command(backend, run, 0, 1)[0]).returncode
        if code:
            failed[run.name] = code
    return failed


# ---------------------------------------------------------------------------------------- results


def write_results(
    own: Own, title: str, runs: Sequence[Run], failed: Mapping[str, int] | None = None
) -> None:
    """Writes results.csv and results.html, and prints the table."""
    keys = list(dict.fromkeys(key for run in runs for key in run.point))
    found, rows = [], []
    for run in runs:
        records = RunDir(run.workdir).read_metrics()
        status = "finished"
        costs: dict[str, Any] = {}
        if run.is_finished():
            finished = RunDir(run.workdir).read_finished() or {}
            costs = {
                name: finished[name] for name in ("seconds", "peak_memory_gb") if name in finished
            }
        elif failed and run.name in failed:
            status = f"failed ({failed[run.name]})"
        else:
            status = "not finished" if records else "not started"
        found.append({"run": run.name, "status": status, "point": run.point, "records": records})
        last: dict[str, Any] = {"step": 0}
        for record in records:  # not all steps have all metrics
            last |= record
        rows.append({"run": run.name, "status": status, **run.point, **last, **costs})

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table, page = (own.folder / name for name in (RESULTS, PAGE))
    with own.replacing(RESULTS) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    num_finished = sum(row["status"] == "finished" for row in rows)
    with own.replacing(PAGE) as draft:
        write_sweep_report(
            draft,
            title=f"Sweep of {title}",
            summary=f"{num_finished} of {len(runs)} runs finished.",
            keys=keys,
            runs=found,
        )
    width = max(len(run.name) for run in runs)
    shown = [name for name in ("loss", "eval/loss") if name in columns]
    print(f"{'':<{width}}  {'status':<14}{'step':>8}" + "".join(f"{name:>12}" for name in shown))
    for row in rows:
        numbers = "".join(f"{row[name]:>12.4g}" if name in row else " " * 12 for name in shown)
        print(f"{row['run']:<{width}}  {row['status']:<14}{row['step']:>8}{numbers}")
    print(f"Results: {table}, {page}")


def last_words(log: Path) -> str:
    """The last line that a run said, and where all of them are."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1]}  ({log})" if said else f"It said nothing ({log})."


if __name__ == "__main__":
    raise SystemExit(main())
