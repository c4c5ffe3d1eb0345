"""Where records come from: sequences with random access, so that order and resume are exact."""

from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.data import world


class TfdsSource:
    """A split of a prepared TFDS folder (ArrayRecord); images stay encoded, text becomes `str`."""

    def __init__(self, folder: str | Path, split: str):
        import tensorflow_datasets as tfds  # needs no TensorFlow for ArrayRecord

        folders = sorted(Path(folder).rglob("dataset_info.json"))
        if not folders:
            raise ValueError(
                f"No prepared data in {folder}. Make it with: "
                f"blip2 prepare --source=digits --out={folder}"
            )
        builder = tfds.builder_from_directory(folders[0].parent)
        if split not in builder.info.splits:
            raise ValueError(
                f"No split {split!r} in {folder}; there are {', '.join(builder.info.splits)}."
            )
        self._records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        return _as_text(self._records[index])


def _as_text(record: dict[str, Any]) -> dict[str, Any]:
    """bytes -> str everywhere but in `image`; TFDS's dict of lists -> list of dicts."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if key == "image":
            out[key] = value
        elif isinstance(value, dict):
            columns = {name: [_decode(v) for v in values] for name, values in value.items()}
            rows = zip(*columns.values(), strict=True)
            out[key] = [dict(zip(columns, row, strict=True)) for row in rows]
        elif isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
            out[key] = [_decode(v) for v in value]
        else:
            out[key] = _decode(value)
    return out


def _decode(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


class StorySource:
    """Stories of the embedded world, written as they are read: item i depends on (seed, i) alone.

    A small language model learns what belongs to what only if it meets that in an easy order.

    Args:
      kind: "stories" (`world.story`), "described_stories" (none of which lacks its description:
        what can be known is measured on them) or "easy_stories" (`world.easy_story`, and word
        lists).
      count: number of stories.
      seed: of all of them.
      warmup: share of the stories, from the first on, that are easier still: of "easy_stories"
        all are word lists there (and some afterwards); "stories" have two things at most.
    """

    LISTS = 0.15  # share of word lists among the easy stories after the warmup

    def __init__(self, kind: str, count: int, seed: int, warmup: float = 0.0):
        self.kind, self.count, self.seed, self.warmup = kind, count, seed, warmup

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"story {index} of {self.count}")
        rng = np.random.default_rng([self.seed, index])
        early = index < self.warmup * self.count
        if self.kind == "described_stories":
            return {"story": world.story(rng, undescribed=0.0)}
        if self.kind == "stories":
            return {"story": world.story(rng, most=2 if early else 3)}
        if early or rng.random() < self.LISTS:
            return {"story": world.word_list(rng)}
        return {"story": world.easy_story(rng)}
