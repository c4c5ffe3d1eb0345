"""Evaluations of a training run, `config.evals`: of the parameters that it has at some steps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blip2_jax import pretrained
from blip2_jax.evals.evaluator import open_tasks
from blip2_jax.evals.predictions import Predictions
from blip2_jax.evals.tasks.task import Execution, Metrics
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.models.blip2 import Blip2Config

if TYPE_CHECKING:
    from blip2_jax.recipe import Recipe


class TrainingEvaluator:
    """Evaluates the parameters that a training run has at the moment.

    All hosts of the run compute the same in step, since they hold the parameters together: keep it
    small with `data.first`. Meanwhile the language model is held twice.

    Args:
      run: the training run.
      frozen: its frozen towers.
      before_batch: called before each batch is computed; may raise, to leave the evaluation.

    Raises:
      ValueError: what is wrong with a task or its data; the model has no head for a task.
    """

    def __init__(
        self, run: "Recipe", frozen: dict[str, Any], before_batch: Callable[[], None] = lambda: None
    ):
        self._run, self._frozen = run, frozen
        self.tasks = open_tasks(run.config.evals, run.config.data.threads)
        self._execution = Execution(before_batch=before_batch)
        self._model: Blip2 | None = None
        sizes = run.model_config
        for task in self.tasks:
            if not isinstance(sizes, Blip2Config) or (
                (sizes.llm is None) != (task.kind == "retrieval")
            ):
                raise ValueError(
                    f"config.evals.{task.name}: {run.config.name} has no head for {task.kind}. "
                    "Name another, or --config.evals={} for none."
                )

    def identity(self) -> dict[str, Any]:
        """Digests of the data that each task reads, wherever they are."""
        return {task.name: task.dataset.identity() for task in self.tasks}

    def __call__(self, params: dict[str, Any]) -> dict[str, float]:
        """Scores as "eval/NAME", of parameters that the run trains."""
        run, frozen = self._run, self._frozen
        if self._model is None:
            batch_size = run.config.eval.tasks_batch_size
            self._model = pretrained.from_run(run, params, frozen, batch_size=batch_size)
        else:
            self._model.set_params(pretrained.copied_params(run, params, frozen))
        metrics: Metrics = {}
        try:
            for task in self.tasks:
                predictions = Predictions(None, task.name, {}, self._execution.host)
                task.predict(self._model, predictions, self._execution)
                metrics |= task.score(predictions.by_record)[0]
        finally:
            self._model.set_params(None)
        return {f"eval/{name}": x for name, x in metrics.items() if not isinstance(x, str)}
