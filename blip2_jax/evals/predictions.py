"""Predictions of one task: in memory, and in files from which a stopped evaluation goes on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.runtime import journal
from blip2_jax.runtime.distributed import Host

COMMAND = "blip2 evaluate"
FOLDER = "predictions"  # in the workdir
# Long entries of a prediction, which are kept as arrays.
ARRAYS = {"texts": np.int32, "itc": np.float32, "itm": np.float32}

# Of one record: its number as "record", its "id", and what the task predicts; or "unreadable", with
# the place of the image.
Prediction = dict[str, Any]
PredictionsByRecord = Mapping[int, Prediction]


class Predictions:
    """What was predicted so far, by record number: in memory, and in a file of this process.

    Args:
      folder: where the files of all processes are; None: in memory only.
      task: the task's name.
      request: all that decides what is predicted.
      host: which process this is, and of how many that share the work.
      barrier: waits for all of these.

    Attributes:
      by_record: the predictions.

    Raises:
      ValueError: there are predictions of another request.
    """

    def __init__(
        self,
        folder: Path | None,
        task: str,
        request: Mapping[str, Any],
        host: Host,
        barrier: Callable[[], None] = lambda: None,
    ):
        self.by_record: dict[int, Prediction] = {}
        self._folder, self._task, self._request = folder, task, request
        self._journal = None
        if folder is None:
            return
        if host.index == 0:  # this also removes a last line that was cut off
            self.read()
        barrier()
        self.read()
        barrier()
        self._journal = journal.Journal(folder / f"{task}.{host.index}.jsonl", request)

    def read(self) -> None:
        """Takes over the predictions that all processes have written."""
        if self._folder is not None:
            for path in sorted(self._folder.glob(f"{self._task}.*.jsonl")):
                for prediction in journal.read(path, self._request, COMMAND):
                    known = self.by_record.get(prediction["record"])
                    if known is None or "unreadable" in known:
                        self.by_record[prediction["record"]] = _with_arrays(prediction)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Takes predictions of this process, and appends them to its file."""
        self.by_record |= {each["record"]: _with_arrays(each) for each in predictions}
        if self._journal is not None:
            self._journal.write(predictions)

    def has(self, record: int) -> bool:
        """Whether a record has a prediction; one whose image could not be read has none."""
        return record in self.by_record and "unreadable" not in self.by_record[record]

    def discard(self, record: int) -> None:
        """Forgets what is known of a record, if anything is."""
        self.by_record.pop(record, None)


def _with_arrays(prediction: Prediction) -> Prediction:
    arrays = {
        name: np.array(prediction[name], dtype)
        for name, dtype in ARRAYS.items()
        if name in prediction
    }
    return prediction | arrays
