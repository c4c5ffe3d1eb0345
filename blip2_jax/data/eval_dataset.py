"""A split that is scored: every image once, in order, with its captions and questions."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip2_jax.data import lists, loader, sources, texts
from blip2_jax.data.containers import Row
from blip2_jax.data.faults import RecordError
from blip2_jax.runtime.watchdog import alive


class EvalDataset:
    """The records of a split; images are read when they are needed.

    Args:
      data: `source`, `dir`, `images`, `split`, `form`, `columns`, `index_dir`, `first`,
        `max_unreadable` and more, as in `configs/eval/default.py`.

    Attributes:
      records: one an image, without the image.
      left_out: rows, and parts of rows, that the source could not use, and why; "" if none.

    Raises:
      ValueError: there are no records, or more images are missing than may be.
    """

    def __init__(self, data: Any):
        self.data, self.name = data, f"{data.source} {data.split} ({data.dir})"
        self.source = sources.open_source(data, data.split)
        count = min(data.first or len(self.source), len(self.source))
        self.max_unreadable = int(data.max_unreadable * count)
        self.records = lists.Packed(self._record(number) for number in range(count))
        if not count:
            raise ValueError(f"{self.name} has no records.")
        self._check_files(count)
        counts = [skipped for skipped in (self.source.faults, self.source.notes) if skipped.count]
        self.left_out = "; ".join(" ".join(skipped.text().split()) for skipped in counts)

    def _record(self, number: int) -> Row:
        alive()
        try:
            record = self.source.without_image(number)
            return texts.folded(record) if self.data.fold_whitespace else record
        except RecordError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _check_files(self, count: int) -> None:
        """Looks for the images before a model is loaded."""
        if not isinstance(self.source, lists.ListSource):
            return
        numbers = (number for number in range(count) if self.source.is_missing(number))
        missing = [self.source.where(number) for number in numbers]
        if len(missing) > self.max_unreadable:
            raise ValueError(
                f"{self.name}: {len(missing)} of {count} images are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Put them there, "
                "name their folder in data.images, or allow a share with data.max_unreadable; "
                "scores are then without them."
            )

    def __len__(self) -> int:
        return len(self.records)

    def identity(self) -> Row:
        """What decides which predictions are made; saved ones are held to it."""
        data = {key: self.data[key] for key in ("source", "split", "first")}
        return data | json.loads(json.dumps(self.source.identity()))

    def questions(self, number: int) -> list[Row]:
        """An image's questions, each with an id."""
        record = self.records[number]
        return [
            {**question, "id": question.get("question_id", f"{record['id']}/{i}")}
            for i, question in enumerate(record.get("questions", []))
        ]

    def batches(
        self, numbers: Sequence[int], size: int, batch_size: int, threads: int, **resizing: Any
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[tuple[int, str]]]]:
        """Numbers and images, uint8[size, size, 3], batch by batch; and what cannot be read.

        `resizing`: see `transforms.resize`.
        """
        with loader.scored_batches(
            self.source,
            size,
            batch_size,
            numbers=numbers,
            threads=threads,
            alpha_background=self.data.alpha_background,
            **resizing,
        ) as batches:
            for batch in batches:
                real, valid = batch["index"] >= 0, batch["valid"]
                faults = [
                    (int(n), self.source.where(int(n))) for n in batch["index"][real & ~valid]
                ]
                yield batch["index"][valid].tolist(), list(batch["image"][valid]), faults
