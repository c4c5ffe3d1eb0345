"""Kills a small run again and again, resumes it, and compares it with one that never stopped.

  python launch/drill.py --out=runs/drill [--times=10] [--processes 1 2] [--signals KILL TERM]

Every row of the table is one run that is stopped --times times: while it starts, after some step,
or in the middle of an asynchronous save, by turns; on one process or on all of them, by turns, and
always with the workers that read its data, as SLURM and spot machines do it. It is resumed with the
same command, on as many devices (`same`) or on one and on two devices a process by turns (`other`).
At no moment may a checkpoint be lost that was there before, and a process that was told to stop
(TERM) must have saved itself. At its end the run's parameters and its metrics.jsonl must be those
of the run never stopped: the same bits on as many devices; within 1e-6 where sums are made in
another order. For that bound to say something, the rate is an ordinary one (1e-3) but Adam's
epsilon is 1e-4: where a gradient is zero but for rounding, Adam with its usual 1e-8 would take a
full step in the direction of the noise.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "tests/recipes/tiny_lm.py"
STEPS, PER_ROUND = 100, 8
LIMIT = 300.0  # seconds for one start; more is a failure
START_TIMEOUT, PEER_TIMEOUT = 60, 10
MOMENTS = ("start", "step", "saving")
SAVED = (0, 42)  # exit codes: at its end, or told to stop


class Run:
    """One start of the command, in one process or several."""

    def __init__(self, workdir: Path, processes: int, devices: int, steps: int, workers: int):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "blip2_jax", "train", f"--config={RECIPE}"),
            *(f"--workdir={workdir}", f"--config.steps={steps}", "--config.log.every=1"),
            *("--config.checkpoint.every=3", "--config.optim.peak_lr=1e-3"),
            *("--config.optim.eps=1e-4", f"--config.faults.peer_timeout={PEER_TIMEOUT}"),
            f"--config.faults.start_timeout={START_TIMEOUT}",
            f"--config.data.workers={workers}",
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "xla"),
            "PYTHONPATH": str(ROOT),
        }
        if processes > 1:
            environment |= {
                "BLIP2_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            }
        self.workdir = workdir
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with open(workdir.with_suffix(".log"), "a") as log:
            self.all = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {"JAX_PROCESS_ID": str(i)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for i in range(processes)
            ]

    def alive(self) -> bool:
        if time.monotonic() - self.started > LIMIT:
            self.kill()
            raise TimeoutError(f"{self.workdir} took more than {LIMIT:g} s; see its .log")
        return any(process.poll() is None for process in self.all)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while self.alive() and not condition():
            time.sleep(0.002)

    def codes(self) -> list[int]:
        self.wait_for(lambda: False)
        return [process.returncode for process in self.all]

    def send(self, number: int, to_all: bool) -> None:
        """To one or all, each with the workers that read its data: its whole process group."""
        for process in self.all if to_all else [random.choice(self.all)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL, to_all=True)
        for process in self.all:
            process.wait()


def lines(workdir: Path) -> list[str]:
    log = workdir / "metrics.jsonl"
    return log.read_text().splitlines() if log.is_file() else []


def checkpoints(workdir: Path) -> list[int]:
    """The whole ones: only those have a plain number for a name."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def stop(run: Run, number: int, turn: int) -> tuple[str, list[int]]:
    """Stops a run at a random moment; returns what moment that was, and the exit codes."""
    moment = MOMENTS[turn % len(MOMENTS)]
    done = len(lines(run.workdir))
    if moment == "start":
        until = time.monotonic() + random.uniform(0.0, 8.0)
        run.wait_for(lambda: time.monotonic() > until)
    else:
        # Past what the checkpoint had: a resumed run cuts the lines after it.
        first = max([0, *checkpoints(run.workdir)])
        target = max(first, done) + random.randint(1, PER_ROUND)
        run.wait_for(lambda: len(lines(run.workdir)) >= target)
        if moment == "saving":
            run.wait_for(lambda: is_saving(run.workdir))
        time.sleep(random.uniform(0.0, 0.05))
    moment = "saving" if is_saving(run.workdir) else moment
    run.send(number, to_all=turn % 2 == 0)
    return moment, run.codes()


def drill(
    out: Path, processes: int, name: str, same: bool, times: int, steps: int, workers: int
) -> dict[str, Any]:
    """One row of the table."""
    workdir = out / f"{name}-{processes}-{'same' if same else 'other'}"
    number, lost = getattr(signal, f"SIG{name}"), 0
    met: dict[str, int] = {}
    codes: dict[int, int] = {}
    for turn in range(times):
        before = max([0, *checkpoints(workdir)])
        run = Run(workdir, processes, 1 if same else 1 + turn % 2, steps, workers)
        moment, ended = stop(run, number, turn)
        met[moment] = met.get(moment, 0) + 1
        for code in ended:
            codes[code] = codes.get(code, 0) + 1
        lost += max([0, *checkpoints(workdir)]) < before
    ended = Run(workdir, processes, 1 if same else 2, steps, workers).codes()
    if any(ended):
        raise RuntimeError(f"{workdir} did not finish: exit codes {ended}; see its .log")
    whole = out / f"whole-{processes}"
    strict = name == "TERM" and processes == 1  # of several that start, some wait for one that left
    return {
        "processes": processes,
        "signal": name,
        "devices": "same" if same else "other",
        "stops": " ".join(f"{k}:{v}" for k, v in sorted(met.items())),
        "exit codes": " ".join(f"{k}:{v}" for k, v in sorted(codes.items())),
        "lost": lost,
        "unsaved": sum(codes[code] for code in codes if code not in SAVED) if strict else 0,
        "largest difference": difference(whole, workdir),
        "metrics": "same" if lines(whole) == lines(workdir) else "differ",
    }


def difference(left: Path, right: Path) -> float:
    """The largest of any parameter of two finished runs."""
    import jax

    from blip2_jax import pretrained

    trees = [jax.device_get(pretrained.load_trained(path)[1]) for path in (left, right)]
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    return max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs)


def is_good(row: dict[str, Any]) -> bool:
    if row["unsaved"]:
        return False
    if row["devices"] == "same":
        return row["lost"] == 0 and row["largest difference"] == 0 and row["metrics"] == "same"
    return row["lost"] == 0 and row["largest difference"] <= 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--times", type=int, default=10, help="stops of each run")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM"], choices=["KILL", "TERM"])
    parser.add_argument("--devices", nargs="+", default=["same", "other"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="that read data (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out={args.out} is not empty; name a new folder.")
    random.seed(args.seed)
    out, good = args.out.resolve(), True
    for processes in args.processes:
        sizes = args.steps, args.workers
        if any(Run(out / f"whole-{processes}", processes, 1, *sizes).codes()):
            raise RuntimeError(f"The run never stopped failed; see {out}/whole-{processes}.log")
        for devices in args.devices:
            for name in args.signals:
                row = drill(out, processes, name, devices == "same", args.times, *sizes)
                good &= is_good(row)
                verdict = "ok" if is_good(row) else "FAILED"
                text = "  ".join(f"{key} {value}" for key, value in row.items())
                print(f"{verdict}  {text}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
