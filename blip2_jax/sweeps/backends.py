"""Where the runs of a sweep are done: processes of this machine, TPU slices, a queue."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blip2_jax import cli
from blip2_jax.sweeps.points import Run

BACKENDS = ("print", "local", "slurm", "tpu", "gke")

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def command(backend: str, run: Run, worker: int, workers: int) -> tuple[list[str], dict[str, str]]:
    """The command that trains a run, and additions to the environment."""
    if backend == "local":
        arguments = [sys.executable, "-m", "blip2_jax", "train", *run.flags]
        return arguments, share_gpus(workers)[worker]
    config, _, *overrides = run.flags
    script = str(LAUNCH / f"{backend}.sh")
    arguments = [script, config.partition("=")[2], str(run.workdir.absolute()), *overrides]
    # A slice serves one run after the other, until `give_back`.
    return arguments, slice_of(worker, workers) if backend == "tpu" else {}


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
