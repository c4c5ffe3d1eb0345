"""Train a recipe, or resume it when the workdir holds a run.

  blip2 train --config=configs/digits/stage1.py --workdir=runs/stage1
  blip2 train --config=configs/digits/stage2.py --workdir=runs/stage2 \\
      --config.init.checkpoint=runs/stage1 --config.optim.peak_lr=5e-4

The same command continues a run that was killed, from its last checkpoint: same data order, same
randomness, same numbers. Every key that --config.KEY=VALUE can set is in configs/default.py.
The workdir receives checkpoints/, metrics.jsonl, tensorboard/, config.json, and, at the end,
done.json.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from blip2_jax import cli, recipe
from blip2_jax.data import loader, sources
from blip2_jax.evaluate import DuringTraining
from blip2_jax.runtime import distributed, mesh
from blip2_jax.runtime.checkpoint import Checkpointer
from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.metrics import MetricsWriter, Progress
from blip2_jax.stages.step import Params, State
from blip2_jax.weights import bert, checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of the run; made if need be")


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(__doc__, argv, add_arguments, prog="blip2 train")
    return train(args.config, Path(args.workdir))


def train(config, workdir: Path) -> int:
    """Runs a recipe to its end; returns the exit code."""
    started = time.monotonic()
    distributed.initialize(config.distributed)
    distributed.setup_compilation_cache()
    done = workdir / "done.json"
    identity = {"recipe": config.name, "config": json.loads(cli.config_to_json(config))}
    if done.is_file():
        cli.check_same_run(json.loads(done.read_text()), identity, workdir)
        print(f"{config.name}: finished before; its results are in {workdir}.")
        return 0

    # Shapes and shardings first, then what is checked before anything expensive starts.
    run = recipe.build(config)
    frozen, fingerprints = run.load_frozen()
    identity["fingerprints"] = fingerprints
    source = loader.make_source(config, config.data.split)
    identity["data"] = sources.identity(source)  # other records would be other batches
    if distributed.is_first_process():
        print(_describe(run, fingerprints))

    with (
        Checkpointer(
            workdir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
        ) as checkpointer,
        distributed.Preemption() as preemption,
    ):
        # A checkpoint of this run; else another run's parameters; else fresh ones.
        seconds_before = 0.0
        if checkpointer.latest_step is not None:
            state, extra = checkpointer.restore(run.abstract_state, expect=identity)
            seconds_before = extra["seconds"]
            print(f"Resuming at step {int(state['step'])} of {config.steps}.")
        else:
            state = run.load_trained_towers(run.init_state(jax.random.key(config.seed)))
            if config.init.bert:
                qformer = bert.initialize(
                    state["params"]["qformer"], run.model_config.qformer, config.init.bert
                )
                state = {**state, "params": {**state["params"], "qformer": qformer}}
            if config.init.checkpoint:
                state = start_from(state, config, fingerprints)

        def save(state: State) -> None:
            seconds = seconds_before + time.monotonic() - started
            checkpointer.save(int(state["step"]), state, {**identity, "seconds": seconds})

        state, stopped = loop(run, state, frozen, workdir, save, preemption, source)
        save(state)
    if stopped:
        print(f"Asked to stop: saved step {int(state['step'])}. The same command resumes.")
        return PREEMPTED
    if distributed.is_first_process():
        seconds = seconds_before + time.monotonic() - started
        cost = {"seconds": seconds, "peak_memory_gb": distributed.peak_memory_gb()}
        done.write_text(json.dumps({**identity, **cost}, indent=2) + "\n")
    return 0


def loop(
    run: recipe.Recipe, state: State, frozen: Params, workdir: Path, save, preemption, source
) -> tuple[State, bool]:
    """Steps from `state` to the config's last step.

    Returns:
      The last state, and whether the run was asked to stop before its end.
    """
    config = run.config
    step = int(state["step"])
    # Made in place: a key cannot be sent to the devices of other hosts.
    make_key = jax.jit(jax.random.key, static_argnums=0, out_shardings=mesh.replicated(run.mesh))
    key = make_key(config.seed)
    metrics: dict[str, Any] = {}
    scores = DuringTraining(run, frozen, config.eval.tasks) if config.eval.tasks else None
    with (
        loader.train_batches(config, run.image_size, start_step=step, source=source) as batches,
        MetricsWriter(workdir, restored_step=step) as writer,
        Progress(config.steps, initial=step, label=config.name) as progress,
    ):
        since, since_step, waited = time.monotonic(), step, 0.0
        ahead = batches.ahead(lambda batch: mesh.global_batch(batch, run.mesh))
        while step < config.steps:
            state, metrics = run.train_step(state, frozen, next(ahead), key)
            step += 1
            progress.update(1)
            if step % config.log.every == 0 or step == config.steps:
                numbers = {name: float(value) for name, value in metrics.items()}
                check_finite(numbers, step)
                now = time.monotonic()
                rate = (step - since_step) * config.data.batch_size / (now - since)
                wait = (batches.wait_seconds - waited) / (now - since)  # share of the time
                since, since_step, waited = now, step, batches.wait_seconds
                if config.eval.every and (step % config.eval.every == 0 or step == config.steps):
                    numbers |= evaluate_losses(run, state["params"], frozen)
                    since = time.monotonic()
                every = config.eval.tasks_every
                if scores and (step == config.steps or (every and step % every == 0)):
                    numbers |= scores(state["params"])
                    since = time.monotonic()
                # Not among the metrics: a resumed run counts what it has met itself.
                timing = {
                    "examples_per_second": rate,
                    "data_wait": wait,
                    "data/skipped": batches.skipped.count,
                }
                writer.write(step, numbers, timing=timing)
                progress.update(0, loss=numbers["loss"])
            if preemption.should_stop(step):
                break
            if step % config.checkpoint.every == 0 and step < config.steps:
                save(state)
        batches.skipped.report()
    return state, step < config.steps


def check_finite(numbers: dict[str, float], step: int) -> None:
    """Stops a run that has diverged."""
    bad = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    if bad:
        raise FloatingPointError(
            f"Step {step}: {', '.join(bad)} not finite. The last checkpoint is from before; lower "
            "config.optim.peak_lr or set config.optim.clip_norm=1.0 and run again."
        )


def evaluate_losses(run: recipe.Recipe, params: Params, frozen: Params) -> dict[str, float]:
    """The stage's metrics on `data.eval_split`, averaged over whole batches."""
    totals: dict[str, float] = {}
    count = 0
    with loader.heldout_batches(run.config, run.image_size) as batches:
        for batch in batches:
            metrics = run.eval_step(params, frozen, mesh.global_batch(batch, run.mesh))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            count += 1
    return {f"eval/{name}": value / count for name, value in totals.items()}


def start_from(state: State, config: ConfigDict, fingerprints: dict[str, str]) -> State:
    """Replaces parameters by those that `config.init.checkpoint` has in common with them.

    Stage 2 starts so from stage 1: it takes the queries, `ln_vision` and the Q-Former without its
    text branch. What the other run does not have (`language_projection`) stays as initialized.
    """
    source = config.init.checkpoint
    if (Path(source) / "done.json").is_file():
        params, taken, fresh = _from_run(state["params"], Path(source), fingerprints)
    elif not checkpoint.is_checkpoint(source):
        raise ValueError(
            f"config.init.checkpoint: {source} holds no finished run and is no published "
            "checkpoint. Train it first, or set --config.init.checkpoint='' to start from scratch."
        )
    else:
        towers = {name: config.model[name].source for name in ("vit", "llm")}
        found = checkpoint.open_checkpoint(source, **towers)
        params, taken, fresh = found.load_into(state["params"])
    print(f"From {source}: {taken} parameter arrays; fresh: {', '.join(fresh) or 'none'}.")
    return {**state, "params": params}


def _from_run(params: Params, workdir: Path, fingerprints: dict[str, str]):
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        theirs = checkpointer.extra()["fingerprints"]
        for tower in theirs.keys() & fingerprints.keys():
            if theirs[tower] != fingerprints[tower]:
                raise ValueError(
                    f"{workdir} was trained on another `{tower}` (fingerprint {theirs[tower]}, "
                    f"here {fingerprints[tower]}). Use the same config.model.{tower}.source."
                )
        return checkpointer.restore_params_into(params)


def _describe(run: recipe.Recipe, fingerprints: dict[str, str]) -> str:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    lines = [
        f"{run.config.name}: {run.config.steps} steps of {run.config.data.batch_size} on "
        f"{run.mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)}",
        *(
            f"  trained  {key:<20} {count(tree):>14,}"
            for key, tree in run.abstract_state["params"].items()
        ),
        *(
            f"  frozen   {key:<20} {count(tree):>14,}  {fingerprints[key]}"
            for key, tree in run.abstract_frozen.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
