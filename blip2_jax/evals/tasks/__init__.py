"""What can be evaluated: question answering, captioning, retrieval, ranking of candidate answers.

A task predicts something for each image of a data set, and scores the predictions:

    task = tasks.make("vqav2_val", config, dataset, threads)
    task.predict(model, predictions)
    metrics, left_out = task.score(predictions.by_record)

Scoring reads the predictions and the data set, and knows no model. It wants a prediction for every
image, unless the config allows some of them to be unreadable; then the result says how many.
"""

from ml_collections import ConfigDict

from blip2_jax.data.eval_dataset import EvalDataset
from blip2_jax.evals.tasks.captioning import Captioning
from blip2_jax.evals.tasks.ranking import Ranking
from blip2_jax.evals.tasks.retrieval import Retrieval
from blip2_jax.evals.tasks.task import Task
from blip2_jax.evals.tasks.vqa import Vqa

TASKS: dict[str, type[Task]] = {task.kind: task for task in (Retrieval, Captioning, Vqa, Ranking)}


def make(name: str, config: ConfigDict, dataset: EvalDataset, threads: int) -> Task:
    """The task of a config.

    Raises:
      ValueError: there is no such kind, or the data set has nothing for it.
    """
    if config.task not in TASKS:
        raise ValueError(f"{name}: task is {config.task!r}; known: {', '.join(TASKS)}.")
    return TASKS[config.task](name, config, dataset, threads)
