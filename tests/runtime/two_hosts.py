"""One of two hosts with four devices each; started by test_distributed.py, prints JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from blip2_jax.runtime import distributed, state
from blip2_jax.runtime import mesh as mesh_lib
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.metric_writers import RunWriters

MAX_STEPS = 3000  # Far more than the news of a signal takes to go around.


def main(workdir: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    distributed.initialize()
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": -1, "tensor": 1})
    sharding = {"x": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "fsdp"))}
    tree = jax.jit(lambda: {"x": jnp.arange(64.0).reshape(8, 8)}, out_shardings=sharding)()

    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(1, tree, {"hosts": distributed.process_count()})
        checkpointer.wait()
        restored, extra = checkpointer.restore(state.with_shardings(tree, sharding))
    with RunWriters(workdir) as writer:
        writer.write(1, {"mean": jnp.mean(tree["x"])})

    step = 0
    with distributed.Preemption() as preemption:
        while not preemption.should_stop() and step < MAX_STEPS:
            step += 1
            time.sleep(0.01)
            if step == 5 and distributed.is_first_process():
                os.kill(os.getpid(), signal.SIGTERM)
    alone = {"met": 0, "stopped": False, "rounds": 0}
    with distributed.StopSignal() as stop:
        stop.meet()
        alone["met"] += 1
        try:
            while distributed.is_first_process():  # the other has done its share, and waits below
                stop.check()
                alone["rounds"] += 1
                if alone["rounds"] == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
            stop.meet()
            alone["met"] += 1
        except distributed.Stopped:
            alone["stopped"] = True
    results = {
        "alone": alone,
        "index": distributed.process_index(),
        "extra": extra,
        "fingerprints": [state.fingerprint(tree), state.fingerprint(restored)],
        "stopped_at": step,
        "told_to_stop": preemption.requested,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
