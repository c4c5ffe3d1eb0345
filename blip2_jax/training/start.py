"""The first state of a run: a checkpoint of its own, another run's parameters, or fresh ones."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from blip2_jax import recipe
from blip2_jax.data.faults import Skipped
from blip2_jax.runtime import run_dir
from blip2_jax.runtime.checkpoint import Checkpointer, restore_params_into
from blip2_jax.runtime.timer import Timer
from blip2_jax.stages.step import Params, State
from blip2_jax.training import identity as identities
from blip2_jax.weights import bert
from blip2_jax.weights import checkpoint as weights


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins, or goes on.

    Attributes:
      state: the train state.
      kept: what all its checkpoints hold besides the run's identity of now: digests of what it was
        started from (`init`), and when its `config.steps` became more (`extensions`).
      unwritten: the part of the line in metrics.jsonl of the state's step that was known before an
        evaluation, after which the line is written; None: nothing. See `loop`.
    """

    state: State
    kept: dict[str, Any]
    unwritten: dict[str, Any] | None = None


def first_state(
    run: recipe.Recipe,
    checkpointer: Checkpointer,
    identity: dict[str, Any],
    timer: Timer,
    skipped: Skipped,
    workdir: Path,
) -> Start:
    """A checkpoint of this run; else another run's parameters; else fresh ones."""
    restored = checkpointer.restore_newest(run.abstract_state, expect=identity)
    if restored is not None:
        state, document = restored
        identities.check_start(document, run.config, workdir)
        timer.resume(seconds=document["seconds"], productive_seconds=document["productive_seconds"])
        skipped.resume(document["skipped"])
        return Start(state, _resumed(run, state, document), document["unwritten"])
    config = run.config
    kept = {"init": identities.start_digests(config), "extensions": []}
    state = run.load_trained_towers(run.init_state(jax.random.key(config.seed)))
    if config.init.bert:
        qformer = bert.initialize(
            state["params"]["qformer"], run.model_config.qformer, config.init.bert
        )
        state = {**state, "params": {**state["params"], "qformer": qformer}}
    if config.init.checkpoint:
        state = start_from(state, config, identity["fingerprints"])
    return Start(state, kept)


def _resumed(run: recipe.Recipe, state: State, document: dict[str, Any]) -> dict[str, Any]:
    """Says where a run goes on; returns what its checkpoints keep, see `Start`."""
    config = run.config
    step, before = int(state["step"]), document["config"]["steps"]
    # Flushed, for those who follow the log, or read a killed run's.
    print(f"Resuming at step {step} of {config.steps}.", flush=True)
    kept = {key: document[key] for key in ("init", "extensions")}
    if config.steps > before:
        extension = {"step": step, "steps": [before, config.steps]}
        kept["extensions"] = [*kept["extensions"], extension]
        rate = np.asarray(run.spec.schedule(step - int(state["bad_steps"]))).item()
        print(
            f"config.steps was {before}. The schedule is that of {config.steps} steps from "
            f"here on: the learning rate is {rate:.3g} now.",
            flush=True,
        )
    return kept


def start_from(state: State, config: ConfigDict, fingerprints: dict[str, str]) -> State:
    """Replaces parameters by those that `config.init.checkpoint` has in common with them.

    Stage 2 starts so from stage 1: it takes the queries, `ln_vision` and the Q-Former without its
    text branch. What the other run does not have (`language_projection`) stays as initialized.
    """
    source = config.init.checkpoint
    saved = run_dir.find(source)
    if saved is not None:
        params, taken, fresh = _from_run(state["params"], saved, fingerprints)
        source = f"{saved.folder} (step {saved.step} of {saved.steps})"
    elif not weights.is_checkpoint(source):
        raise ValueError(
            f"config.init.checkpoint: {source} holds no run and is no published checkpoint. Train "
            "it first, or set --config.init.checkpoint='' to start from scratch."
        )
    else:
        towers = {name: config.model[name].source for name in ("vit", "llm")}
        checkpoint = weights.open_checkpoint(source, **towers)
        params, taken, fresh = checkpoint.load_into(state["params"])
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
