"""What all tasks share: a data set, predictions of its records, and scores of these."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import transforms
from blip2_jax.data.eval_dataset import EvalDataset
from blip2_jax.evals import submissions
from blip2_jax.evals.predictions import Prediction, Predictions, PredictionsByRecord
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.runtime import run_dir
from blip2_jax.runtime.distributed import Host
from blip2_jax.runtime.progress import Progress

# Keys of a task that may change when it goes on: they decide nothing of what is predicted.
SCORING = ("metric", "forms", "lemmatize", "scores", "by", "tokenizer", "examples")

Metrics = dict[str, float | str]
Reasons = dict[str, str]  # why something could not be scored, by its name
Batch = tuple[list[int], list[np.ndarray], list[tuple[int, str]]]  # see `EvalDataset.batches`


def _do_nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Execution:
    """How predictions are computed.

    Attributes:
      host: which process this is, and of how many that share the records.
      before_batch: called before each batch is computed; may raise, to stop there.
      barrier: called before processes exchange something; waits for all of them.
    """

    host: Host = Host(0, 1)
    before_batch: Callable[[], None] = _do_nothing
    barrier: Callable[[], None] = _do_nothing


SINGLE_PROCESS = Execution()


class Task:
    """One data set, and one kind of prediction of its records.

    Args:
      name: its metrics begin with it.
      config: see `configs/eval/default.py`.
      dataset: what is read.
      threads: that decode images.

    Attributes:
      numbers: of the records that need a prediction.

    Raises:
      ValueError: the data set has no record for this kind of task.
    """

    kind = ""

    def __init__(self, name: str, config: ConfigDict, dataset: EvalDataset, threads: int):
        self.name, self.config, self.dataset, self.threads = name, config, dataset, threads
        self.numbers = self._select_records()
        if not self.numbers:
            raise ValueError(
                f"{name}: {dataset.name} has nothing for the task {config.task!r}: no record has "
                f"{'questions' if config.task in ('vqa', 'ranking') else 'captions'}."
            )

    @property
    def submission(self) -> str:
        """The server's form of its predictions, of `submissions.FIELDS`; "": there is none."""
        return ""

    def _select_records(self) -> list[int]:
        return list(range(len(self.dataset)))

    # ------------------------------------------------------------------------ with a model

    def settings(self, model: Blip2 | None = None) -> dict[str, Any]:
        """All that decides the scores: the config, the data, and what a model makes of them."""
        keep = {key: value for key, value in self.config.to_dict().items() if key != "data"}
        settings = json.loads(json.dumps(keep)) | {"data": self.dataset.identity()}
        if model is None:
            return settings
        return settings | {
            "model": model.source,
            "weights": run_dir.stamp(model.source),
            "resolution": model.config.vit.image_size,
            "dtype": str(model.dtype),
        }

    def request(self, model: Blip2) -> dict[str, Any]:
        """What decides the predictions: the settings without those that only score them."""
        return {key: value for key, value in self.settings(model).items() if key not in SCORING}

    def predict(
        self, model: Blip2, predictions: Predictions, execution: Execution = SINGLE_PROCESS
    ) -> None:
        """Adds this process's share of the predictions that are missing."""
        todo = [number for number in self.numbers if not predictions.has(number)]
        done = len(self.numbers) - len(todo)
        for number in todo:  # what could not be read is tried again
            predictions.discard(number)
        share = todo[execution.host.index :: execution.host.count]
        total = len(share) + done
        with Progress(total, initial=done, label=self.name, unit="image") as progress:
            for numbers, images, faults in self._batches(model, share, execution):
                self._add_unreadable(faults, predictions)
                if numbers:
                    predictions.add(self._predict_batch(model, numbers, images))
                progress.update(len(numbers) + len(faults))

    def _batches(
        self, model: Blip2, numbers: Sequence[int], execution: Execution
    ) -> Iterator[Batch]:
        resizing = transforms.resizing_of(model.config.vit)
        execution.before_batch()
        if numbers:
            for batch in self.dataset.batches(
                numbers, model.config.vit.image_size, model.batch_size, self.threads, **resizing
            ):
                execution.before_batch()
                yield batch

    def _predict_batch(
        self, model: Blip2, numbers: list[int], images: list[np.ndarray]
    ) -> list[Prediction]:
        raise NotImplementedError

    def _add_unreadable(self, faults: list[tuple[int, str]], predictions: Predictions) -> None:
        predictions.add([{"record": number, "unreadable": where} for number, where in faults])
        self._check_unreadable(predictions.by_record)

    # -------------------------------------------------------- from saved predictions alone

    def _check_unreadable(self, predictions: PredictionsByRecord) -> None:
        bad = [each["unreadable"] for each in predictions.values() if "unreadable" in each]
        if len(bad) > self.dataset.max_unreadable:
            raise ValueError(
                f"{self.name}: {len(bad)} of {len(self.dataset)} images cannot be read "
                f"({', '.join(bad[:3])}). Mend them and run the same command again, which goes on "
                "where it stopped, or allow a share with data.max_unreadable; scores are then "
                "without them."
            )

    def score(self, predictions: PredictionsByRecord) -> tuple[Metrics, Reasons]:
        """Metrics of the predictions, and what could not be scored, with the reason.

        Raises:
          ValueError: predictions are missing.
        """
        self._check_unreadable(predictions)  # those of all processes
        missing = [n for n in self.numbers if n not in predictions]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} of {len(self.numbers)} images have no prediction "
                f"({', '.join(str(self.dataset.records[n]['id']) for n in missing[:3])}, ...)."
            )
        scored = {n: predictions[n] for n in self.numbers if "unreadable" not in predictions[n]}
        metrics, left_out = self._score(scored)
        metrics = {f"{self.name}/{name}": value for name, value in metrics.items()}
        unreadable = sum("unreadable" in each for each in predictions.values())
        if unreadable:
            metrics[f"{self.name}/unreadable"] = unreadable
            left_out["images"] = f"{unreadable} of {len(self.numbers)} cannot be read"
        if self.dataset.left_out:
            left_out["records"] = f"rows that are of no use ({self.dataset.left_out})"
        return metrics, {f"{self.name}/{name}": reason for name, reason in left_out.items()}

    def _score(self, predictions: PredictionsByRecord) -> tuple[Metrics, Reasons]:
        """`score` of readable images, without the task's name before the metrics'."""
        raise NotImplementedError

    def read(self, path: Path) -> dict[int, Prediction]:
        """Predictions from a file in a server's form, of any origin.

        Raises:
          ValueError: it is in another form, or not of exactly these images or questions.
        """
        if not self.submission:
            raise ValueError(f"{self.name}: no server takes files of {self.kind}; pass a --model.")
        return self._from_texts(submissions.read(path, self.submission))

    def _from_texts(self, texts: Mapping[Any, str]) -> dict[int, Prediction]:
        """Predictions from texts by official id."""
        raise NotImplementedError

    def write(self, path: Path, predictions: PredictionsByRecord) -> None:
        """Writes predictions, in a server's form where there is one."""
        submissions.write(path, self.submission, self.texts(predictions))

    def texts(self, predictions: PredictionsByRecord) -> dict[Any, str]:
        """Predicted texts by official id."""
        raise NotImplementedError
