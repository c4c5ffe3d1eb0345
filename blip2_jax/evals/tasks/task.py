"""What all tasks share: a data set read with a model, and lines that survive a kill."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data import transforms
from blip2_jax.data.containers import Row
from blip2_jax.data.heldout import Heldout
from blip2_jax.evals import submissions
from blip2_jax.inference.pipeline import Blip2
from blip2_jax.runtime import journal, run_dir
from blip2_jax.runtime.distributed import Host
from blip2_jax.runtime.metrics import Progress

# Keys of a task that may change when it goes on: they decide nothing of what is said.
SCORING = ("metric", "forms", "lemmatize", "scores", "by", "tokenizer", "examples")

Metrics = dict[str, float | str]
Rows = dict[int, Row]  # lines, by record number
COMMAND = "blip2 evaluate"
PACKED = {"texts": np.int32, "itc": np.float32, "itm": np.float32}  # in a line's long columns


class Lines:
    """What was said, by record number: in memory, and in a file of this process.

    Args:
      folder: where the files of all processes are; None: in memory only.
      name: of the task.
      request: all that decides what is said.
      host: which process this is, and of how many that share the work.
      meet: waits for all of these.

    Raises:
      ValueError: there are lines of another request.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        request: Row,
        host: Host,
        meet: Callable[[], None] = lambda: None,
    ):
        self.rows: Rows = {}
        self._folder, self._name, self._request = folder, name, request
        self._journal = None
        if folder is None:
            return
        if host.index == 0:  # which also mends what a kill has cut
            self.read()
        meet()
        self.read()
        meet()
        self._journal = journal.Journal(folder / f"{name}.{host.index}.jsonl", request)

    def read(self) -> None:
        """Takes over the lines of all processes."""
        if self._folder is not None:
            for path in sorted(self._folder.glob(f"{self._name}.*.jsonl")):
                for row in journal.read(path, self._request, COMMAND):
                    known = self.rows.get(row["row"])
                    if known is None or "unreadable" in known:
                        self.rows[row["row"]] = _packed(row)

    def add(self, rows: Sequence[Row]) -> None:
        """Takes lines of this process, and writes them down."""
        self.rows |= {row["row"]: _packed(row) for row in rows}
        if self._journal is not None:
            self._journal.write(rows)

    def done(self, number: int) -> bool:
        """Whether something was said about a record; what could not be read counts as not."""
        return number in self.rows and "unreadable" not in self.rows[number]


def _packed(row: Row) -> Row:
    return row | {name: np.array(row[name], kind) for name, kind in PACKED.items() if name in row}


class Task:
    """One data set, one kind of prediction.

    Args:
      name: its metrics begin with it.
      config: see `configs/eval/default.py`.
      dataset: what is read.
      threads: that decode images.

    Attributes:
      model: what reads the images; set it before predicting.
      between_batches: called before each batch is computed; may raise, to leave it there.
      meet: called before processes exchange something; waits for all of them.
    """

    kind = ""
    between_batches: Callable[[], None] = staticmethod(lambda: None)
    meet: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, name: str, config: ConfigDict, dataset: Heldout, threads: int):
        self.name, self.config, self.dataset, self.threads = name, config, dataset, threads
        self.model: Blip2 | None = None
        self.units = self._units()  # numbers of the records that something is to be said about
        if not self.units:
            raise ValueError(
                f"{name}: {dataset.name} has nothing for the task {config.task!r}: no record has "
                f"{'questions' if config.task in ('vqa', 'ranking') else 'captions'}."
            )

    @property
    def submission(self) -> str:
        """The server's form of its predictions, of `submissions.FIELDS`; "": there is none."""
        return ""

    @property
    def _reader(self) -> Blip2:
        """The model, which must have been set."""
        if self.model is None:
            raise ValueError(f"{self.name}: set `model` before predicting.")
        return self.model

    def _units(self) -> list[int]:
        return list(range(len(self.dataset)))

    def settings(self) -> Row:
        """All that decides the scores: the config, what it resolves to, the model, the data."""
        keep = {key: value for key, value in self.config.to_dict().items() if key != "data"}
        settings = json.loads(json.dumps(keep)) | {"data": self.dataset.identity()}
        if self.model is None:
            return settings
        model = self.model
        return settings | {
            "model": model.source,
            "weights": run_dir.stamp(model.source),
            "resolution": model.config.vit.image_size,
            "dtype": str(model.dtype),
        }

    def request(self) -> Row:
        """What decides what is said: the settings without those that only score it."""
        return {key: value for key, value in self.settings().items() if key not in SCORING}

    def predict(self, lines: Lines, host: Host) -> None:
        """Says something about each image that nothing was said about; this process's share."""
        todo = [number for number in self.units if not lines.done(number)]
        done = len(self.units) - len(todo)
        for number in todo:  # what could not be read is tried again
            lines.rows.pop(number, None)
        share = todo[host.index :: host.count]
        total = len(share) + done
        with Progress(total, initial=done, label=self.name, unit="image") as progress:
            for numbers, images, faults in self._batches(share):
                self._note(faults, lines)
                if numbers:
                    lines.add(self._describe(numbers, images))
                progress.update(len(numbers) + len(faults))

    def _batches(
        self, share: Sequence[int]
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[tuple[int, str]]]]:
        encoder, batch = self._reader.config.vit, self._reader.batch_size
        how = transforms.resizing_of(encoder)
        self.between_batches()
        if share:
            for found in self.dataset.batches(
                share, encoder.image_size, batch, self.threads, **how
            ):
                self.between_batches()
                yield found

    def _note(self, faults: list[tuple[int, str]], lines: Lines) -> None:
        lines.add([{"row": number, "unreadable": where} for number, where in faults])
        self._check_unreadable(lines.rows)

    def _check_unreadable(self, rows: Rows) -> None:
        bad = [row["unreadable"] for row in rows.values() if "unreadable" in row]
        if len(bad) > self.dataset.max_unreadable:
            raise ValueError(
                f"{self.name}: {len(bad)} of {len(self.dataset)} images cannot be read "
                f"({', '.join(bad[:3])}). Mend them and run the same command again, which goes on "
                "where it stopped, or allow a share with data.max_unreadable; scores are then "
                "without them."
            )

    def _describe(self, numbers: list[int], images: list[np.ndarray]) -> list[Row]:
        """A line for each image."""
        raise NotImplementedError

    def score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        """Metrics of what was said, and what could not be scored, with the reason.

        Raises:
          ValueError: something is missing.
        """
        self._check_unreadable(rows)  # those of all processes
        unreadable = [n for n, row in rows.items() if "unreadable" in row]
        missing = [n for n in self.units if n not in rows]
        if missing:
            raise ValueError(
                f"{self.name}: nothing was said about {len(missing)} of {len(self.units)} images "
                f"({', '.join(str(self.dataset.records[n]['id']) for n in missing[:3])}, ...)."
            )
        said = {n: rows[n] for n in self.units if "unreadable" not in rows[n]}
        metrics, left_out = self._score(said)
        metrics = {f"{self.name}/{name}": value for name, value in metrics.items()}
        if unreadable:
            metrics[f"{self.name}/unreadable"] = len(unreadable)
            left_out["images"] = f"{len(unreadable)} of {len(self.units)} cannot be read"
        if self.dataset.left_out:
            left_out["records"] = f"rows that are of no use ({self.dataset.left_out})"
        return metrics, {f"{self.name}/{name}": reason for name, reason in left_out.items()}

    def _score(self, rows: Rows) -> tuple[Metrics, dict[str, str]]:
        raise NotImplementedError

    def read(self, path: Path) -> Rows:
        """Lines from a file in a server's form, which something else may have written.

        Raises:
          ValueError: it is in another form, or not of exactly these images or questions.
        """
        if not self.submission:
            raise ValueError(f"{self.name}: no server takes files of {self.kind}; pass a --model.")
        return self._rows_of(submissions.read(path, self.submission))

    def _rows_of(self, predictions: dict[Any, str]) -> Rows:
        """Lines from texts by official id."""
        raise NotImplementedError

    def write(self, path: Path, rows: Rows) -> None:
        """Writes what was said, in a server's form where there is one."""
        submissions.write(path, self.submission, self.predictions(rows))

    def predictions(self, rows: Rows) -> dict[Any, str]:
        """Texts by official id."""
        raise NotImplementedError
