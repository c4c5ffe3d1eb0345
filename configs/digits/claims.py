"""The conditions of two claims of the paper, in small; written down before the runs.

The paper says

- without stage 1, question answering after stage 2 is worse (section 4.1, figure 5);
- without ITG, retrieval after stage 1 is worse (section 4.4, table 6).

Stage 1 is the quickstart's and is trained in three ways (`claims_stage1.py`): with all objectives;
without ITG; and, as a control, with all objectives on captions of other images, where there is
language to learn and nothing about images. Stage 2 starts from each of them, and from nothing
(`claims_stage2.py`). Everything is done with three seeds.

Stage 2 is an eighth as long as stage 1; in the paper it is a third. In this world captions say all
that there is to see, and the language model is small, so its gradient alone soon teaches queries to
read: in trials with seed 0 (which is why it is none of these) stage 2 alone, in a run of 300 steps,
was 6 points behind after 100 of them, 1 after 200, and level at the end. A weaker encoder (its
first two blocks) would be nearer to the paper's, but a stage 1 that a laptop can afford hardly
learns to match with it, and helped nothing. Wrong captions, as the web has them, were not tried.
"""

from typing import Any

from ml_collections import ConfigDict

from blip2_jax.sweeps.points import as_text, run_name
from configs.digits import evaluate

SEEDS = (1, 2, 3)
FOLDER = "runs/claims"
WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {},
    "without ITG": {"stage.objectives": ("itc", "itm")},
    "mismatched pairs": {"data.mismatched": 1.0},
}


def under(config: ConfigDict, task: str, every: int) -> ConfigDict:
    """A recipe of the embedded world, scored on one task every so many steps."""
    config.eval.every = 0
    evaluation = evaluate.get_config(task)
    config.evals = evaluation.tasks
    config.eval.update({"tasks_every": every, "tasks_batch_size": evaluation.batch_size})
    return config


def stage1_point(way: str, seed: int) -> dict[str, Any]:
    """What a stage-1 run changes, as `sweep(add)` adds it."""
    return {"seed": seed, **WAYS[way]}


def stage1_folder(way: str, seed: int) -> str:
    """Where the sweep of stage 1 leaves that run."""
    point = {key: as_text(value) for key, value in sorted(stage1_point(way, seed).items())}
    return f"{FOLDER}/stage1/{run_name(point)}"
