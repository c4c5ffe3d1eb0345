"""One of several processes that work as one; started by tests/hosts/test_hosts.py:

    python tests/hosts/process.py JOB.json ...

A job is {"kind": "train", "config", "workdir", and maybe "devices", an order of them, and "kill",
a step after which the process is killed}; {"kind": "start", "config", "workdir", "out"}: the state
that a run in this workdir starts from; or {"kind": "refused", "config", "odd", "workdir", "out"}:
a run of which process 1 has the config "odd", and the message that it ends with.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from blip2_jax import cli, recipe, train
from blip2_jax.data.faults import Skipped
from blip2_jax.runtime import distributed
from blip2_jax.runtime import mesh as meshes
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.metric_writers import RunWriters
from blip2_jax.runtime.timer import Timer
from blip2_jax.training.start import first_state


def start(config: FrozenConfigDict, workdir: str) -> dict[str, np.ndarray]:
    """The state before the first step of a run in this workdir, and the model's parameters."""
    run = recipe.build(config)
    frozen, fingerprints = run.load_frozen()
    identity = {"fingerprints": fingerprints}
    skipped = Skipped(1, config.data.max_skipped)
    with Checkpointer(Path(workdir) / "checkpoints") as checkpointer:
        timer = Timer(examples=1, flops=1.0)
        state = first_state(run, checkpointer, identity, timer, skipped, Path(workdir)).state
    everywhere = jax.jit(lambda x: x, out_shardings=meshes.replicated(run.mesh))
    arrays = everywhere({"state": state, "model": run.merge_params(frozen, state["params"])})
    return dict(meshes.flatten_with_names(jax.device_get(arrays)))


@contextlib.contextmanager
def devices(order: Iterable[int]) -> Iterator[None]:
    """Runs take these devices, in this order."""
    make, chosen = meshes.make_mesh, [jax.devices()[i] for i in order]
    meshes.make_mesh = lambda sizes: make(sizes, chosen)
    yield
    meshes.make_mesh = make


def kill_after(step: int, workdir: Path) -> None:
    """Kills this process once the step is logged and the checkpoint before it is there."""
    write = RunWriters.write

    def write_and_die(writer, now, *args, **kwargs):
        write(writer, now, *args, **kwargs)
        if now == step:
            until = time.monotonic() + 60
            while not (workdir / "checkpoints" / str(step - 1)).is_dir():
                assert time.monotonic() < until
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    RunWriters.write = write_and_die


def main(files: list[str]) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    distributed.initialize()
    distributed.setup_compilation_cache()
    for file in files:
        job = json.loads(Path(file).read_text())
        config = cli.config_from_json(job["config"])
        if job["kind"] == "start":
            arrays = start(config, job["workdir"])
            if distributed.is_first_process():
                np.savez(job["out"], **arrays)
            continue
        if job["kind"] == "refused":
            if not distributed.is_first_process():
                config = cli.config_from_json(job["odd"])
            with pytest.raises(cli.ConfigError) as error:
                train.train(config, Path(job["workdir"]))
            Path(f"{job['out']}.{distributed.process_index()}").write_text(str(error.value))
            continue
        if "kill" in job:
            kill_after(job["kill"], Path(job["workdir"]))
        with devices(job.get("devices", range(4))):
            assert train.train(config, Path(job["workdir"])) == 0


if __name__ == "__main__":
    main(sys.argv[1:])
