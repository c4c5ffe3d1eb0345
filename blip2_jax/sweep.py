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
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blip2_jax import cli
from blip2_jax.runtime import atomic, jobs
from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.outputs import Own, Taken
from blip2_jax.sweeps import backends
from blip2_jax.sweeps.backends import BACKENDS
from blip2_jax.sweeps.points import make_runs
from blip2_jax.sweeps.results import (
    PAGE,
    RESULTS,
    SWEEP_FILE,
    check_workdir,
    last_line,
    remember,
    write_results,
)


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
    arguments = sys.argv[1:] if argv is None else argv
    args = cli.parse(__doc__, arguments, add_arguments, prog="blip2 sweep")
    common = [argument for argument in arguments if argument.startswith(cli.OVERRIDE)]
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
        backends.check_launcher(backend)
    else:
        backends.share_gpus(workers)  # an error where there are too few
    if dry_run:
        for run in left:
            command, environment = backends.command(backend, run, 0, workers)
            subprocess.run(command, env={**os.environ, **environment})
        return 0

    cli.make_workdir(workdir)
    with jobs.only_one(workdir / "sweep.lock", f"Another blip2 sweep is at work in {workdir}."):
        remember(own, identity, runs)
        if backend in ("slurm", "gke"):
            failed, stopped = backends.submit(left, backend), False
        else:
            failed, stopped = jobs.run_all(
                runs,
                workers,
                lambda run, worker: backends.command(backend, run, worker, workers),
                "sweep",
            )
            if backend == "tpu" and not stopped and os.environ.get("KEEP") != "1":
                backends.give_back(min(workers, len(left)), workers)
        write_results(own, base.name, runs, failed)
    if failed:
        print(f"\n{len(failed)} of {len(runs)} runs failed; the same command tries them again:")
        for name, code in failed.items():
            print(f"  {name}: exit code {code}. {last_line(workdir / name / jobs.LOG_FILE)}")
    if stopped:
        print("Asked to stop. The same command resumes.")
        return PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
