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
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from blip2_jax import cli, identity, recipe
from blip2_jax.data import loader
from blip2_jax.data.faults import Skipped, TooManySkipped
from blip2_jax.evals.training import TrainingEvaluator
from blip2_jax.planning import chips
from blip2_jax.runtime import agreement, distributed, jobs, mesh, run_dir
from blip2_jax.runtime.bad_steps import BadSteps
from blip2_jax.runtime.checkpoint import Checkpointer, SaveError, restore_params_into
from blip2_jax.runtime.compare import moved
from blip2_jax.runtime.distributed import PREEMPTED
from blip2_jax.runtime.metric_writers import RunWriters
from blip2_jax.runtime.profiler import Profiler
from blip2_jax.runtime.progress import Progress
from blip2_jax.runtime.run_dir import RunDir
from blip2_jax.runtime.timer import Timer
from blip2_jax.runtime.watchdog import Watchdog, alive
from blip2_jax.stages.flops import flops_per_sample
from blip2_jax.stages.step import Params, State
from blip2_jax.weights import bert, huggingface
from blip2_jax.weights import checkpoint as weights


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
        _alone_in(workdir),
    ):
        return _train(config, workdir, preemption)


def _alone_in(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Two runs that write one folder would spoil each other's files."""
    if not distributed.is_first_process():
        return contextlib.nullcontext()
    cli.make_workdir(workdir)
    return RunDir(workdir).lock()


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins, or goes on.

    Attributes:
      state: the train state.
      kept: what all its checkpoints say, besides what the run is now: digests of what it was
        started from (`init`), and when its `config.steps` became more (`extensions`).
      unwritten: of the step that `state` is of, what its line in metrics.jsonl was waiting for an
        evaluation with; None: nothing. See `loop`.
    """

    state: State
    kept: dict[str, Any]
    unwritten: dict[str, Any] | None = None


def _train(
    config: ConfigDict,
    workdir: Path,
    preemption: distributed.Preemption,
) -> int:
    what = {"recipe": config.name, "config": json.loads(cli.config_to_json(config))}
    done = RunDir(workdir).read_finished()
    if done is not None:
        cli.check_same_run(done, what, workdir)
        if config.steps == done["config"]["steps"] and not moved(done["config"], what["config"]):
            return _finished_before(config, workdir)

    def between_batches() -> None:  # of an evaluation
        alive()
        preemption.check()

    # Shapes and shardings first, then what is checked before anything expensive starts.
    with cli.mistakes_in_config(), agreement.together("start") as facts:
        run = recipe.build(config)
        source = loader.make_source(config, config.data.split)
        skipped = loader.count_of(source, config)
        losses = EvalLosses(run, between_batches) if config.eval.every else None
        if distributed.process_count() > 1:
            facts |= {**what, **about(run, workdir)}
    with cli.mistakes_in_config(), agreement.together("load the frozen towers"):
        frozen = run.read_frozen()
    with cli.mistakes_in_config(), agreement.together("start") as facts:
        fingerprints = run.fingerprints(frozen)
        scores = None
        if config.evals:
            scores = TrainingEvaluator(run, frozen, between_batches)
        eval_source = None if losses is None else losses.source
        what |= identity.contents(config, fingerprints, source, eval_source, scores)
        facts |= what
    if done is not None and config.steps == done["config"]["steps"]:  # from other places
        cli.check_same_run(done, what, workdir)
        identity.check_start(done, config, workdir)
        if distributed.is_first_process():
            RunDir(workdir).write_finished({**done, **what})
        return _finished_before(config, workdir)
    flops = sum(part.total for part in flops_per_sample(config, run.model_config).values())
    chip = chips.of_device_kind(jax.devices()[0].device_kind)
    timer = Timer(
        examples=config.data.batch_size,
        flops=flops,
        peak_flops=None if chip is None else chip.peak_flops,
    )
    if distributed.is_first_process():
        print(describe(run, fingerprints, flops), flush=True)
        if losses is not None and losses.batch_size != config.eval.batch_size:
            print(f"  eval.batch_size: {losses.batch_size}, what the mesh and the data allow")

    with Checkpointer(
        RunDir(workdir).checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    ) as checkpointer:
        with cli.mistakes_in_config():
            start = first_state(run, checkpointer, what, timer, skipped, workdir)
        if done is not None and distributed.is_first_process():
            RunDir(workdir).remove_finished()

        def save(state: State, unwritten: dict[str, Any] | None = None) -> None:
            step = int(state["step"])
            now = {
                "seconds": timer.seconds,
                "productive_seconds": timer.productive_seconds,
                "skipped": skipped.met(),
                "step": step,
                "unwritten": unwritten,
            }
            with timer.pause():
                checkpointer.save(step, state, {**what, **start.kept, **now})

        bad_steps = BadSteps(
            step=int(start.state["step"]),
            count=int(start.state["bad_steps"]),
            max_count=config.faults.max_bad_steps,
            records=functools.partial(loader.record_numbers, source, config),
        )
        state, stopped = loop(
            run,
            start,
            frozen,
            workdir,
            save,
            preemption,
            source,
            skipped,
            losses,
            scores,
            timer,
            bad_steps,
        )
        save(state)
    if bad_steps.too_many:
        raise FloatingPointError(bad_steps.message())
    if stopped and distributed.is_first_process():
        print(f"Asked to stop: saved step {int(state['step'])}. The same command resumes.")
    if stopped:
        return PREEMPTED
    if distributed.is_first_process():
        cost = {"seconds": timer.seconds, "peak_memory_gb": distributed.peak_memory_gb()}
        RunDir(workdir).write_finished({**what, **start.kept, **cost})
    return 0


def _finished_before(config: ConfigDict, workdir: Path) -> int:
    print(
        f"{config.name}: finished before; its results are in {workdir}. It goes on with "
        "--config.steps=MORE."
    )
    return 0


def about(run: recipe.Recipe, workdir: Path) -> dict[str, Any]:
    """What must be the same on all processes of a run before anything is loaded."""
    config = run.config
    parts = run.abstract_state["params"].keys() | run.abstract_frozen.keys()
    towers = {key: config.model[key].source for key in ("vit", "llm") if key in parts}
    return {
        "workdir": str(workdir.absolute()),
        **agreement.program(),
        "mesh": [f"{device.id} of {device.process_index}" for device in run.mesh.devices.flat],
        "state": agreement.layout(run.abstract_state),
        "frozen": agreement.layout(run.abstract_frozen),
        "towers": {
            key: run_dir.stamp(huggingface.find(source)) for key, source in towers.items() if source
        },
        "init": identity.start(config),
    }


def first_state(
    run: recipe.Recipe,
    checkpointer: Checkpointer,
    what: dict[str, Any],
    timer: Timer,
    skipped: Skipped,
    workdir: Path,
) -> Start:
    """A checkpoint of this run; else another run's parameters; else fresh ones."""
    config = run.config
    restored = checkpointer.restore_newest(run.abstract_state, expect=what)
    if restored is not None:
        state, document = restored
        identity.check_start(document, config, workdir)
        timer.resume(seconds=document["seconds"], productive_seconds=document["productive_seconds"])
        skipped.resume(document["skipped"])
        step, before = int(state["step"]), document["config"]["steps"]
        # Now, not when a buffer is full: for those who follow the log, or read a killed run's.
        print(f"Resuming at step {step} of {config.steps}.", flush=True)
        kept = {key: document[key] for key in ("init", "extensions")}
        if config.steps > before:
            kept["extensions"] = [
                *kept["extensions"],
                {"step": step, "steps": [before, config.steps]},
            ]
            rate = np.asarray(run.spec.schedule(step - int(state["bad_steps"]))).item()
            print(
                f"config.steps was {before}. The schedule is that of {config.steps} steps from "
                f"here on: the learning rate is {rate:.3g} now.",
                flush=True,
            )
        return Start(state, kept, document["unwritten"])
    kept = {"init": identity.start(config), "extensions": []}
    state = run.load_trained_towers(run.init_state(jax.random.key(config.seed)))
    if config.init.bert:
        qformer = bert.initialize(
            state["params"]["qformer"], run.model_config.qformer, config.init.bert
        )
        state = {**state, "params": {**state["params"], "qformer": qformer}}
    if config.init.checkpoint:
        state = start_from(state, config, what["fingerprints"])
    return Start(state, kept)


def loop(
    run: recipe.Recipe,
    start: Start,
    frozen: Params,
    workdir: Path,
    save: Callable[..., None],
    preemption: distributed.Preemption,
    source: Any,
    skipped: Skipped,
    losses: "EvalLosses | None",
    scores: TrainingEvaluator | None,
    timer: Timer,
    bad_steps: BadSteps,
) -> tuple[State, bool]:
    """Steps from a run's start to the config's last step.

    An evaluation may take long, fail, or be told to stop between two batches. So the step is saved
    before it, with what is known of the step's line in metrics.jsonl; a run that is resumed there
    evaluates first, and writes the line.

    Returns:
      The last state, and whether the run was asked to stop before its end.
    """
    config, state = run.config, start.state
    first = step = int(state["step"])
    # Made in place: a key cannot be sent to the devices of other hosts.
    make_key = jax.jit(jax.random.key, static_argnums=0, out_shardings=mesh.replicated(run.mesh))
    key = make_key(config.seed)
    metrics: dict[str, Any] = {}
    size = config.data.batch_size
    rows = mesh.local_rows(run.mesh, size)
    alive()
    train_step = run.lower_step().compile()  # the very program that `blip2 plan` looks at
    alive()
    if distributed.is_first_process():
        print(_memory(train_step), flush=True)

    def evaluations(losses_due: bool, tasks_due: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        with timer.pause():
            if losses_due and losses is not None:
                found |= losses(state["params"], frozen)
            if tasks_due and scores is not None:
                found |= scores(state["params"])
        return found

    with (
        loader.train_batches(
            config,
            run.image_size,
            start_step=step,
            rows=rows,
            source=source,
            skipped=skipped,
            resample=run.resample,
            llm=run.llm,
        ) as batches,
        RunWriters(workdir, restored_step=step) as writers,
        Progress(config.steps, initial=step, label=config.name) as progress,
        Profiler(
            RunDir(workdir).profile, first=first + config.profile.after, steps=config.profile.steps
        ) as profiler,
        contextlib.suppress(distributed.Stopped),  # between batches of an evaluation
    ):
        late = start.unwritten
        if late is not None and distributed.from_first(str(writers.last_step)) != str(step):
            writers.write(step, late["numbers"] | evaluations(late["losses"], late["tasks"]))
        prefetched = batches.prefetch(lambda batch: mesh.global_batch(batch, run.mesh, size))
        timer.start()
        # All hosts look at the same numbers: they leave after the same step.
        while step < config.steps and not bad_steps.too_many:
            batch = next(prefetched)
            profiler.before(step, metrics)
            state, metrics = train_step(state, frozen, batch, key)
            step += 1
            alive()
            bad_steps.add(metrics["bad_steps"])
            progress.update(1)
            last = step == config.steps
            losses_due = bool(losses and (last or step % config.eval.every == 0))
            tasks_every = config.eval.tasks_every
            tasks_due = bool(scores and (last or (tasks_every and step % tasks_every == 0)))
            if last or step % config.log.every == 0 or losses_due or tasks_due:
                numbers = {name: float(value) for name, value in metrics.items()}
                # Of a bad step; JSON has no word for them.
                numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
                bad_steps.flush()
                timing = timer.read(step - first, batches.wait_seconds)
                # Not among the metrics: batches are read ahead of the step.
                timing["data/skipped"] = batches.count_skipped(distributed.gather).count
                if losses_due or tasks_due:
                    due = {"numbers": numbers, "losses": losses_due, "tasks": tasks_due}
                    save(state, unwritten=due)
                    numbers = numbers | evaluations(losses_due, tasks_due)
                writers.write(step, numbers, timing=timing)
                progress.update(0, loss=numbers.get("loss", math.nan))
            if preemption.should_stop():
                break
            if step % config.checkpoint.every == 0 and step < config.steps:
                batches.count_skipped(distributed.gather)
                save(state)
        bad_steps.flush()
        batches.count_skipped(distributed.gather)
        if distributed.is_first_process():
            skipped.report()
        return state, step < config.steps
    return state, True


class EvalLosses:
    """The stage's metrics on `data.eval_split`, averaged over whole batches.

    Args:
      run: the training run.
      between_batches: called before each batch is computed; may raise, to leave the evaluation.

    Attributes:
      source: the split's records.
      batch_size: of the global batches.

    Raises:
      ValueError: there is no such split, or it has too few records for one batch.
    """

    def __init__(self, run: recipe.Recipe, between_batches: Callable[[], None]):
        self._run, self._between_batches = run, between_batches
        self.source = loader.make_source(run.config, run.config.data.eval_split)
        self.batch_size = loader.eval_batch_size(
            run.config, self.source, mesh.num_batch_shards(run.mesh)
        )

    def __call__(self, params: Params, frozen: Params) -> dict[str, float]:
        """Metrics as "eval/NAME", of what the run has trained so far."""
        run, size = self._run, self.batch_size
        totals: dict[str, float] = {}
        count = 0
        with loader.eval_batches(
            run.config,
            run.image_size,
            batch_size=size,
            rows=mesh.local_rows(run.mesh, size),
            source=self.source,
            resample=run.resample,
            llm=run.llm,
        ) as batches:
            for batch in batches:
                self._between_batches()
                placed = mesh.global_batch(batch, run.mesh, size)
                for name, value in run.eval_step(params, frozen, placed).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
                count += 1
            batches.count_skipped(distributed.gather)
        return {f"eval/{name}": value / count for name, value in totals.items()}


def start_from(state: State, config: ConfigDict, fingerprints: dict[str, str]) -> State:
    """Replaces parameters by those that `config.init.checkpoint` has in common with them.

    Stage 2 starts so from stage 1: it takes the queries, `ln_vision` and the Q-Former without its
    text branch. What the other run does not have (`language_projection`) stays as initialized.
    """
    source = config.init.checkpoint
    theirs = run_dir.find(source)
    if theirs is not None:
        params, taken, fresh = _from_run(state["params"], theirs, fingerprints)
        source = f"{theirs.folder} (step {theirs.step} of {theirs.steps})"
    elif not weights.is_checkpoint(source):
        raise ValueError(
            f"config.init.checkpoint: {source} holds no run and is no published checkpoint. Train "
            "it first, or set --config.init.checkpoint='' to start from scratch."
        )
    else:
        towers = {name: config.model[name].source for name in ("vit", "llm")}
        found = weights.open_checkpoint(source, **towers)
        params, taken, fresh = found.load_into(state["params"])
    print(f"From {source}: {taken} parameter arrays; fresh: {', '.join(fresh) or 'none'}.")
    return {**state, "params": params}


def _from_run(
    params: Params, run: run_dir.RunCheckpoint, fingerprints: dict[str, str]
) -> tuple[Params, int, list[str]]:
    theirs = run.document["fingerprints"]
    for tower in theirs.keys() & fingerprints.keys():
        if theirs[tower] != fingerprints[tower]:
            raise ValueError(
                f"{run.folder} was trained on another `{tower}` (fingerprint {theirs[tower]}, "
                f"here {fingerprints[tower]}). Use the same config.model.{tower}.source."
            )
    return restore_params_into(run.folder, params)


def describe(run: recipe.Recipe, fingerprints: dict[str, str], flops: float) -> str:
    """The table that a run starts with: every part, its parameters, and what a device holds."""
    config, state = run.config, run.abstract_state
    held = lambda tree: f"{_size(mesh.bytes_per_device(tree)):>10}"  # noqa: E731
    parts = [("trained", key, tree, "") for key, tree in state["params"].items()]
    parts += [
        ("frozen", key, tree, fingerprints[key][:16]) for key, tree in run.abstract_frozen.items()
    ]
    rows = [
        f"  {kind:<10}{key:<22}{sum(x.size for x in jax.tree.leaves(tree)):>15,}"
        f"{held(tree)}  {note}".rstrip()
        for kind, key, tree, note in parts
    ]
    return "\n".join(
        [
            f"{config.name}: {config.steps} steps of {config.data.batch_size} on {run.mesh.size} "
            f"{jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)}",
            f"  {'':<32}{'parameters':>15}{'a device':>10}  fingerprint",
            *rows,
            f"  {'optimizer':<47}{held(state['opt_state'])}",
            *_texts_of(config),
            f"  {_size(flops, 'FLOPs')} an example",
        ]
    )


def _texts_of(config: ConfigDict) -> list[str]:
    """How texts are made of records, with white space made visible."""
    if config.stage.name != "stage2":
        return []
    return [f"  prompt {config.data.prompt!r}, end of text {config.data.end_of_text!r}"]


def _size(number: float, unit: str = "B") -> str:
    """1.23 GB for 1.23e9."""
    text = tqdm.format_sizeof(number, unit)
    return text.replace(text.lstrip("0123456789."), " " + text.lstrip("0123456789."))


def _memory(train_step: jax.stages.Compiled) -> str:
    """What the compiler says that the step needs on a device, beside what the device has."""
    found = train_step.memory_analysis()
    if found is None:
        return "  memory: this backend's compiler does not say"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    has = f", which has {_size(limit)}" if limit else ""
    return (
        f"  a step needs {_size(found.argument_size_in_bytes)} for what it is given and "
        f"{_size(found.temp_size_in_bytes)} to work in, on each device{has}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
