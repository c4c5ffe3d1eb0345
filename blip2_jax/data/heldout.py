"""A split that is to be scored: every image once, in order, with all that is known of it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.data import files, lists, loader, sources
from blip2_jax.data.faults import RecordError
from blip2_jax.data.lists import Row


class Heldout:
    """What is known of each image; the images themselves are read when they are needed.

    Args:
      data: `source`, `dir`, `images`, `split`, `form`, `index_dir`, `first` and `most_unreadable`,
        as in `configs/eval/default.py`.

    Attributes:
      records: one an image, without the image.
      left_out: what the source could not use of its rows, and why; "" if nothing.

    Raises:
      ValueError: there are no records, or more images are missing than may be.
    """

    def __init__(self, data: Any):
        self.data, self.name = data, f"{data.source} {data.split} ({data.dir})"
        self.source = loader.open_source(data, data.split)
        count = min(data.first or len(self.source), len(self.source))
        self.most_unreadable = int(data.most_unreadable * count)
        self._check_files(count)
        self.records = lists.Packed(self._facts(number) for number in range(count))
        if not count:
            raise ValueError(f"{self.name} has no records.")
        faults = getattr(self.source, "faults", None)
        self.left_out = " ".join(faults.text().split()) if faults and faults.count else ""

    def _facts(self, number: int) -> Row:
        try:
            return sources.facts(self.source, number)
        except RecordError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _check_files(self, count: int) -> None:
        """Looks for the images before a model is loaded."""
        if not isinstance(self.source, lists.ListSource) or not files.is_local(self.source.images):
            return
        paths = (self.source.where(number) for number in range(count))
        missing = [path for path in paths if not Path(path).is_file()]
        if len(missing) > self.most_unreadable:
            raise ValueError(
                f"{self.name}: {len(missing)} of {count} images are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Put them there, "
                "name their folder in data.images, or allow a share with data.most_unreadable; "
                "scores are then without them."
            )

    def __len__(self) -> int:
        return len(self.records)

    def identity(self) -> Row:
        """What decides what is asked here; a journal belongs to it."""
        data = {key: self.data[key] for key in ("source", "split", "first")}
        return data | json.loads(json.dumps(sources.identity(self.source)))

    def questions(self, number: int) -> list[Row]:
        """An image's questions, each with an id."""
        record = self.records[number]
        return [
            {**question, "id": question.get("question_id", f"{record['id']}/{i}")}
            for i, question in enumerate(record.get("questions", []))
        ]

    def batches(
        self, rows: Sequence[int], size: int, batch_size: int, threads: int
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[tuple[int, str]]]]:
        """Numbers and images, uint8[size, size, 3], batch by batch; and what cannot be read."""
        with loader.scored_batches(
            self.source, size, batch_size, rows=rows, threads=threads
        ) as batches:
            for batch in batches:
                real, valid = batch["index"] >= 0, batch["valid"]
                faults = [
                    (int(n), sources.place(self.source, int(n)))
                    for n in batch["index"][real & ~valid]
                ]
                yield batch["index"][valid].tolist(), list(batch["image"][valid]), faults
