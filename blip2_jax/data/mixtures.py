"""Several sources as one, and a source with wrong captions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from blip2_jax.data.faults import Skipped
from blip2_jax.data.source import Record, Source

SCHEMES = ("weight", "size", "sqrt_size")  # how the parts of a mixture are weighted


class Mixture(Source):
    """Several sources as one, numbered through.

    Args:
      parts: sources, by name.
      scheme: "weight": by `weights`; "size": by number of records; "sqrt_size": by its root.
      weights: of each part, for "weight".

    Attributes:
      weights: shares, sum 1.
    """

    def __init__(
        self,
        parts: Mapping[str, Source],
        scheme: str = "size",
        weights: dict[str, float] | None = None,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"mixture scheme {scheme!r}; known: {', '.join(SCHEMES)}.")
        sizes = np.array([len(part) for part in parts.values()], float)
        if scheme == "weight":
            sizes = np.array([(weights or {}).get(name, 1.0) for name in parts], float)
            if not (sizes > 0).all() or not np.isfinite(sizes).all():
                raise ValueError(f"Weights of a mixture must be above 0: {weights}.")
        elif scheme == "sqrt_size":
            sizes = np.sqrt(sizes)
        self.names, self.parts = list(parts), list(parts.values())
        self.weights = (sizes / sizes.sum()).tolist()
        ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self._ranges = list(zip([0, *ends[:-1]], ends, strict=True))
        images = np.cumsum([part.image_numbers for part in self.parts])
        self._first_image = [0, *images.tolist()]
        self.faults, self.notes = Skipped(), Skipped()
        for part in self.parts:
            self.faults.merge(part.faults)
            self.notes.merge(part.notes)
        self.faults.total = self.notes.total = len(self) + self.faults.count

    def __len__(self) -> int:
        return self._ranges[-1][1]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """See `Source`."""
        return self._ranges

    @property
    def image_numbers(self) -> int:
        """See `Source`."""
        return self._first_image[-1]

    def identity(self) -> dict[str, Any]:
        """See `Source`; of each part, with its weight."""
        parts = zip(self.names, self.parts, self.weights, strict=True)
        return {name: {**part.identity(), "weight": weight} for name, part, weight in parts}

    def part_of(self, index: int) -> int:
        """Which part a record belongs to."""
        return next(n for n, (_, end) in enumerate(self.ranges) if index < end)

    def where(self, index: int) -> str:
        """See `Source`."""
        part = self.part_of(index)
        return self.parts[part].where(index - self.ranges[part][0])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = self.part_of(index)
        index -= self.ranges[part][0]
        record = self.parts[part][index]
        number = self._first_image[part] + record.get("image_number", index)
        return {**record, "image_number": number, "part": self.names[part]}


class Mismatched(Source):
    """A source in which a share of the records has the captions of other records, as web data has.

    Which ones, and whose, depends on the source's length and the share alone, so a run sees the
    same wrong pair every time it comes by.

    Args:
      source: records with `captions`.
      share: of records, 0..1.
    """

    def __init__(self, source: Source, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"config.data.mismatched is {share}; it is a share, 0 to 1.")
        order = np.random.default_rng(0).permutation(len(source))
        count = round(share * len(source))
        self._source = source
        self.faults, self.notes = source.faults, source.notes
        self.by_split, self.in_order = source.by_split, source.in_order
        self._captions_of = dict(
            zip(order[:count].tolist(), np.roll(order, 1)[:count].tolist(), strict=True)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        if index not in self._captions_of:
            return record
        other = self._source.without_image(self._captions_of[index])
        return {**record, "captions": other["captions"]}

    def where(self, index: int) -> str:
        """See `Source`."""
        return self._source.where(index)

    @property
    def image_numbers(self) -> int:
        """See `Source`."""
        return self._source.image_numbers

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """See `Source`."""
        return self._source.ranges

    def identity(self) -> dict[str, Any]:
        """See `Source`; the share is the config's."""
        return self._source.identity()
