"""Counts and histograms of what prepared records hold."""

import collections
import io
from collections.abc import Callable
from typing import Any

from PIL import Image

SAMPLES = 3  # pictures of each shard that the report may show


class Tally:
    """Counts of what records hold, in bins that fit for any data set.

    Attributes:
      records, bytes, captions, questions, words: totals.
      bins: name -> {lower end of the bin: count}.
    """

    BINS: dict[str, Callable[[dict[str, Any], Image.Image, int], list[float]]] = {
        "width (pixels)": lambda record, image, size: [min(image.width // 64 * 64, 4096)],
        "height (pixels)": lambda record, image, size: [min(image.height // 64 * 64, 4096)],
        "width / height": lambda record, image, size: [
            min(max(round(4 * image.width / image.height) / 4, 0.25), 4)
        ],
        "kilobytes": lambda record, image, size: [2 ** max(0, int(size / 1024).bit_length() - 1)],
        "words of a caption": lambda record, image, size: [
            min(len(caption.split()), 60) for caption in record["captions"]
        ],
        "captions of an image": lambda record, image, size: [min(len(record["captions"]), 60)],
    }
    TOTALS = ("records", "bytes", "captions", "questions", "words")

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.bins = {name: collections.Counter[str]() for name in self.BINS}
        self.samples: list[dict[str, Any]] = []

    @property
    def records(self) -> int:
        """How many were counted."""
        return self.totals["records"]

    def add(self, record: dict[str, Any], image: Image.Image, size: int) -> None:
        """Counts a record, its decoded image and the bytes that it is stored in."""
        captions = record["captions"]
        self.totals.update(
            records=1,
            bytes=size,
            captions=len(captions),
            questions=len(record.get("questions", [])),
            words=sum(len(caption.split()) for caption in captions),
        )
        for name, of in self.BINS.items():
            self.bins[name].update(map(str, of(record, image, size)))
        if len(self.samples) < SAMPLES:
            small = image.copy()
            small.thumbnail((192, 192))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            texts = captions[:2] + [q["question"] for q in record.get("questions", [])[:1]]
            self.samples.append({"image": out.getvalue().hex(), "texts": texts})

    def merge(self, note: dict[str, Any]) -> None:
        """Adds what `to_json` gave elsewhere."""
        self.totals.update(note["totals"])
        for name, counts in note["bins"].items():
            self.bins[name].update(counts)
        self.samples += note["samples"]

    def to_json(self) -> dict[str, Any]:
        """All counts; `merge` takes them."""
        return {
            "totals": {name: self.totals[name] for name in self.TOTALS},
            "bins": {name: dict(counts) for name, counts in self.bins.items()},
            "samples": self.samples,
        }
