"""Train a recipe, or resume it when the workdir holds a run.

    blip2 train --config=configs/digits/stage1.py --workdir=runs/stage1
    blip2 train --config=configs/digits/stage2.py --workdir=runs/stage2 \\
        --config.init.checkpoint=runs/stage1 --config.optim.peak_lr=5e-4

The same command continues a run that was killed, from its last checkpoint: same data order, same
randomness, same numbers. Every key that --config.KEY=VALUE can set is in configs/default.py.
It leaves with 0 when the run is finished, with 42 when it was told to stop (SIGTERM) and has saved
itself, and with 1 and a message when it cannot go on; the last checkpoint is whole in each case.
A finished run goes on with --config.steps=MORE, at the learning rate that the schedule of the new
length has from there on. Data, towers and tokenizers may move; what they hold is compared.
The workdir receives metrics.jsonl (what is computed), timing.jsonl (rates, waiting
for data, MFU, goodput), tensorboard/, checkpoints/ and, at the end, done.json;
--config.profile.steps=5 records a trace of five steps in profile/.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import jax
from clu import platform
from ml_collections import ConfigDict

from blip2_jax import cli
from blip2_jax.data.faults import TooManySkipped
from blip2_jax.planning import chips
from blip2_jax.runtime import distributed, jobs
from blip2_jax.runtime.checkpoint import Checkpointer, SaveError
from blip2_jax.runtime.compare import moved
from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.run_dir import RunDir
from blip2_jax.runtime.timer import Timer
from blip2_jax.runtime.watchdog import Watchdog, alive
from blip2_jax.stages.flops import flops_per_sample
from blip2_jax.training import identity
from blip2_jax.training.loop import TrainLoop
from blip2_jax.training.overview import describe
from blip2_jax.training.setup import Setup, set_up, settings_of
from blip2_jax.training.start import first_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `blip2 train`."""
    parser.add_argument("--workdir", required=True, help="folder of the run; made if need be")


def main(argv: list[str] | None = None) -> int:
    """Runs `blip2 train`; returns its exit code."""
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 train")
    try:
        return train(args.config, Path(args.workdir))
    except (cli.ConfigError, jobs.Busy, FloatingPointError, SaveError, TooManySkipped) as error:
        raise SystemExit(f"blip2 train: {error}") from error


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs a recipe to its end; returns the exit code."""
    with cli.mistakes_in_config():
        distributed.initialize(
            config.distributed,
            start_timeout=config.faults.start_timeout,
            peer_timeout=config.faults.peer_timeout,
        )
    distributed.setup_compilation_cache()
    with (
        distributed.Preemption() as preemption,  # from here on, SIGTERM ends no run unsaved
        Watchdog(config.faults.step_timeout),
        _locked(workdir),
    ):
        return _train(config, workdir, preemption)


def _locked(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Makes the workdir and holds its lock, on the first process."""
    if not distributed.is_first_process():
        return contextlib.nullcontext()
    cli.make_workdir(workdir)
    return RunDir(workdir).lock()


def _train(config: ConfigDict, workdir: Path, preemption: distributed.Preemption) -> int:
    run_dir, settings = RunDir(workdir), settings_of(config)
    finished = run_dir.read_finished()
    if finished is not None:
        cli.check_same_run(finished, settings, workdir)
        if _has_all_steps(finished, config) and not moved(finished["config"], settings["config"]):
            return _finished_before(config, workdir)

    def before_eval_batch() -> None:
        alive()
        preemption.check()

    setup = set_up(config, workdir, before_eval_batch)
    if finished is not None and _has_all_steps(finished, config):  # from other paths
        cli.check_same_run(finished, setup.identity, workdir)
        identity.check_start(finished, config, workdir)
        if distributed.is_first_process():
            run_dir.write_finished({**finished, **setup.identity})
        return _finished_before(config, workdir)
    timer = _start_timer(setup, workdir)
    with Checkpointer(
        run_dir.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    ) as checkpointer:
        with cli.mistakes_in_config():
            start = first_state(
                setup.run, checkpointer, setup.identity, timer, setup.skipped, workdir
            )
        if finished is not None and distributed.is_first_process():
            run_dir.remove_finished()
        loop = TrainLoop(setup, start, workdir, checkpointer, timer, preemption)
        stopped = loop.run()
        loop.save()
    if loop.bad_steps.too_many:
        raise FloatingPointError(loop.bad_steps.message())
    if stopped and distributed.is_first_process():
        step = int(loop.state["step"])
        print(f"Asked to stop: saved step {step}. The same command resumes.")
    if stopped:
        return PREEMPTED
    if distributed.is_first_process():
        cost = {"seconds": timer.seconds, "peak_memory_gb": distributed.peak_memory_gb()}
        run_dir.write_finished({**setup.identity, **start.kept, **cost})
    return 0


def _has_all_steps(finished: dict[str, Any], config: ConfigDict) -> bool:
    return bool(config.steps == finished["config"]["steps"])


def _finished_before(config: ConfigDict, workdir: Path) -> int:
    print(
        f"{config.name}: finished before; its results are in {workdir}. It goes on with "
        "--config.steps=MORE."
    )
    return 0


def _start_timer(setup: Setup, workdir: Path) -> Timer:
    """Starts the run's timer, and says what is about to run."""
    run = setup.run
    flops = sum(part.total for part in flops_per_sample(run.config, run.model_config).values())
    chip = chips.of_device_kind(jax.devices()[0].device_kind)
    timer = Timer(
        examples=run.config.data.batch_size,
        flops=flops,
        peak_flops=None if chip is None else chip.peak_flops,
    )
    if distributed.is_first_process():
        print(describe(run, setup.fingerprints, flops), flush=True)
        losses = setup.losses
        if losses is not None and losses.batch_size != run.config.eval.batch_size:
            print(f"  eval.batch_size: {losses.batch_size}, what the mesh and the data allow")
        # On the experiment's page in XManager, where there is one.
        platform.work_unit().create_artifact(
            platform.ArtifactType.DIRECTORY, str(workdir.absolute()), "workdir of the run"
        )
    return timer


if __name__ == "__main__":
    raise SystemExit(main())
