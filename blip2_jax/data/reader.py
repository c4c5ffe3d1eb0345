"""From record numbers to examples: what cannot be read is replaced, and noted in the example."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_jax.data import transforms
from blip2_jax.data.examples import Example, ExampleOf
from blip2_jax.data.faults import RecordError
from blip2_jax.data.source import Record, Source

MAX_REPLACED = 100  # records in a row that may be unreadable
FAULTS = "_faults"  # uint8[B, FAULTS_SIZE], on the way from where an example is made: JSON
FAULTS_SIZE = 1024
GOLDEN = (math.sqrt(5) - 1) / 2

Fault = tuple[int, str, str]  # record number, reason, file or row


class Reader:
    """(record number, rng) -> example; steps over records that cannot be read.

    The replacement is the record a golden share of the part further on, and so on: always the
    same, and those of a whole lost archive spread over the others.

    Raises:
      ValueError: 100 records in a row cannot be read.
    """

    def __init__(self, source: Source, example: ExampleOf):
        self.source, self.example = source, example
        self.ranges = source.ranges

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The example of a record, or of its replacement, with a note of what was wrong."""
        index = int(index)
        start, end = next(ends for ends in self.ranges if index < ends[1])
        faults: list[Fault] = []
        for _ in range(min(end - start, MAX_REPLACED)):
            # A copy of the generator's state: a replacement is drawn as its record would have been.
            state = rng.bit_generator.state
            try:
                return {**self.read(index, rng), FAULTS: pack_faults(faults)}
            except RecordError as error:
                faults.append((index, error.reason, error.where))
                rng.bit_generator.state = state
                index = start + (index - start + _stride(end - start)) % (end - start)
        raise ValueError(
            f"{len(faults)} records in a row cannot be read; the last: {faults[-1][1]} "
            f"({faults[-1][2]}). See with blip2 prepare --check what is wrong."
        )

    def read(self, index: int, rng: np.random.Generator) -> Example:
        """One example.

        Raises:
          RecordError: it cannot be made; names the place.
        """
        try:
            return self.example(self.source[index], index, rng)
        except RecordError as error:
            where = error.where or self.source.where(index)
            raise RecordError(error.reason, where) from error
        except KeyError as error:
            raise RecordError(f"no {error}", self.source.where(index)) from error
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", self.source.where(index)) from error


class Scored(Reader):
    """(index, rng) -> image of the record `numbers[index]`, `index`, `valid`; replaces nothing."""

    def __init__(
        self,
        source: Source,
        image_size: int,
        numbers: Sequence[int],
        resizing: Mapping[str, Any],
        alpha_background: str,
    ):
        super().__init__(source, self._image)
        self.image_size, self.numbers, self.resizing = image_size, numbers, resizing
        self.alpha_background = alpha_background

    def _image(self, record: Record, index: int, rng: np.random.Generator) -> Example:
        del index, rng
        image = transforms.decode_image(record["image"], self.alpha_background)
        return {"image": transforms.resize(image, self.image_size, **self.resizing)}

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The image of `numbers[index]`; black, and not valid, if unreadable or beyond the end."""
        faults: list[Fault] = []
        example: Example = {"image": np.zeros((self.image_size, self.image_size, 3), np.uint8)}
        row = self.numbers[index] if index < len(self.numbers) else -1
        valid = row >= 0
        if valid:
            try:
                example = self.read(row, rng)
            except RecordError as error:
                faults.append((row, error.reason, error.where))
                valid = False
        marks: Example = {
            "index": np.int32(row),
            "valid": np.bool_(valid),
            FAULTS: pack_faults(faults),
        }
        return {**example, **marks}


@functools.cache
def _stride(count: int) -> int:
    """About a golden share of `count`, and without a common divisor: reaches every record."""
    stride = max(1, round(GOLDEN * count))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def pack_faults(faults: list[Fault]) -> np.ndarray:
    """Faults as uint8[FAULTS_SIZE]; as many as it holds, long places cut from the left."""
    out = np.zeros(FAULTS_SIZE, np.uint8)
    if faults:
        kept = [(index, reason[:100], where[-200:]) for index, reason, where in faults]
        while len(text := json.dumps(kept).encode()) > FAULTS_SIZE:
            kept.pop()
        out[: len(text)] = np.frombuffer(text, np.uint8)
    return out


def unpack_faults(note: np.ndarray) -> list[Fault]:
    """What `pack_faults` packed."""
    return json.loads(note.tobytes().rstrip(b"\0")) if note[0] else []
