"""What a run works with, built and checked before its first step."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from blip2_jax import cli, recipe
from blip2_jax.data import sources
from blip2_jax.data.faults import Skipped
from blip2_jax.data.source import Source, skipped_at_start
from blip2_jax.evals.training import TrainingEvaluator
from blip2_jax.runtime import agreement, distributed, run_dir
from blip2_jax.stages.step import Params
from blip2_jax.training import identity as identities
from blip2_jax.training.eval_losses import EvalLosses
from blip2_jax.weights import huggingface


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
      run: the recipe, built.
      frozen: the frozen towers.
      fingerprints: theirs.
      source: the records that are trained on.
      skipped: those of them that could not be read.
      losses: computes losses on other records; None: the config asks for none.
      evals: scores tasks; None: the config asks for none.
      identity: what must stay the same for the run to go on; its checkpoints hold it.
    """

    run: recipe.Recipe
    frozen: Params
    fingerprints: dict[str, str]
    source: Source
    skipped: Skipped
    losses: EvalLosses | None
    evals: TrainingEvaluator | None
    identity: dict[str, Any]


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The part of a run's identity that is known before anything is read."""
    return {"recipe": config.name, "config": json.loads(cli.config_to_json(config))}


def set_up(config: ConfigDict, workdir: Path, before_eval_batch: Callable[[], None]) -> Setup:
    """Builds a recipe, reads its frozen towers, and checks that all processes have the same.

    Shapes and shardings come first, then what is checked before anything expensive starts.

    Args:
      config: the recipe's.
      workdir: the run's folder.
      before_eval_batch: called before each batch of an evaluation; may raise, to leave it.

    Raises:
      ConfigError: what does not fit together, or is missing.
    """
    settings = settings_of(config)
    with cli.mistakes_in_config(), agreement.together("start") as facts:
        run = recipe.build(config)
        source = sources.make_source(config, config.data.split)
        skipped = skipped_at_start(source, config.data.max_skipped)
        losses = EvalLosses(run, before_eval_batch) if config.eval.every else None
        if distributed.process_count() > 1:
            facts |= {**settings, **_facts_of(run, workdir)}
    with cli.mistakes_in_config(), agreement.together("load the frozen towers"):
        frozen = run.read_frozen()
    with cli.mistakes_in_config(), agreement.together("start") as facts:
        fingerprints = run.fingerprints(frozen)
        evals = TrainingEvaluator(run, frozen, before_eval_batch) if config.evals else None
        eval_source = None if losses is None else losses.source
        contents = identities.contents(config, fingerprints, source, eval_source, evals)
        identity = {**settings, **contents}
        facts |= identity
    return Setup(run, frozen, fingerprints, source, skipped, losses, evals, identity)


def _facts_of(run: recipe.Recipe, workdir: Path) -> dict[str, Any]:
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
        "init": identities.start_digests(config),
    }
