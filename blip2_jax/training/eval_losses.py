"""The stage's metrics on the config's evaluation split."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
from clu import metrics as clu_metrics

from blip2_jax import recipe
from blip2_jax.data import loader, sources
from blip2_jax.runtime import distributed, mesh
from blip2_jax.stages.step import Params


@flax.struct.dataclass
class BatchAverage(clu_metrics.Metric):
    """The mean of a number over batches of one size.

    A batch's number is that of the global batch, the same on all hosts. Sums are Python's floats,
    on the host, in the order of the batches.
    """

    total: float
    count: int

    @classmethod
    def empty(cls) -> "BatchAverage":
        """Of no batch."""
        return cls(total=0.0, count=0)

    @classmethod
    def from_model_output(cls, value: Any, **_: Any) -> "BatchAverage":
        """Of one batch."""
        return cls(total=float(value), count=1)

    def merge(self, other: "BatchAverage") -> "BatchAverage":
        """Of the batches of both."""
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self) -> float:
        """The mean."""
        return self.total / self.count


class EvalLosses:
    """The stage's metrics on `data.eval_split`, averaged over whole batches.

    Args:
      run: the training run.
      before_batch: called before each batch is computed; may raise, to leave the evaluation.

    Attributes:
      source: the split's records.
      batch_size: of the global batches.

    Raises:
      ValueError: there is no such split, or it has too few records for one batch.
    """

    def __init__(self, run: recipe.Recipe, before_batch: Callable[[], None]):
        self._run, self._before_batch = run, before_batch
        self.source = sources.make_source(run.config, run.config.data.eval_split)
        self.batch_size = loader.eval_batch_size(
            run.config, self.source, mesh.num_batch_shards(run.mesh)
        )

    def __call__(self, params: Params, frozen: Params) -> dict[str, float]:
        """Metrics as "eval/NAME", of what the run has trained so far."""
        run, size = self._run, self.batch_size
        averages: clu_metrics.Collection | None = None
        names: list[str] = []
        with loader.eval_batches(
            run.config,
            run.image_size,
            batch_size=size,
            batch_rows=mesh.local_rows(run.mesh, size),
            source=self.source,
            resample=run.resample,
            llm=run.llm,
        ) as batches:
            for batch in batches:
                self._before_batch()
                placed = mesh.global_batch(batch, run.mesh, size)
                values = run.eval_step(params, frozen, placed)
                names = list(values)
                update = averages_of(values)
                averages = update if averages is None else averages.merge(update)
            batches.count_skipped(distributed.gather)
        computed = {} if averages is None else named(averages, names)
        return {f"eval/{name}": value for name, value in computed.items()}


def _field(name: str) -> str:
    """A metric's name as that of a collection's field, which cannot have a slash."""
    return name.replace("/", "__")


def averages_of(values: dict[str, Any]) -> clu_metrics.Collection:
    """The averages of one batch's metrics; of several batches, merge them."""
    averages = {
        _field(name): BatchAverage.from_model_output(value) for name, value in values.items()
    }
    return clu_metrics.Collection.create_collection(**averages)


def named(averages: clu_metrics.Collection, names: Sequence[str]) -> dict[str, float]:
    """The means of the metrics of these names."""
    computed = averages.compute()
    return {name: computed[_field(name)] for name in names}
