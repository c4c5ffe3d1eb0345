"""What can be evaluated: question answering, captioning, retrieval, ranking of candidate answers.

A task reads a data set with a model, one line an image, and scores what was said:

    task = tasks.make("vqav2_val", config, dataset, threads)
    task.model = model
    task.predict(lines, host)              what the model says, into lines that survive a kill
    metrics, left_out = task.score(lines.rows)

Nothing is scored that was not predicted for every image, unless the config allows some of them to
be unreadable; then the result says how many.
"""

from ml_collections import ConfigDict

from blip2_jax.data.heldout import Heldout
from blip2_jax.evals.tasks.captioning import Captioning
from blip2_jax.evals.tasks.ranking import Ranking
from blip2_jax.evals.tasks.retrieval import Retrieval
from blip2_jax.evals.tasks.task import Task
from blip2_jax.evals.tasks.vqa import Vqa

TASKS = {kind.kind: kind for kind in (Retrieval, Captioning, Vqa, Ranking)}


def make(name: str, config: ConfigDict, dataset: Heldout, threads: int) -> Task:
    """The task of a config.

    Raises:
      ValueError: there is no such kind, or the data set has nothing for it.
    """
    if config.task not in TASKS:
        raise ValueError(f"{name}: task is {config.task!r}; known: {', '.join(TASKS)}.")
    return TASKS[config.task](name, config, dataset, threads)
