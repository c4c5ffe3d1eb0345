"""What a file of rows gives: rows, each with where it stands; and JSON and text.

Files are read here, in `delimited` (CSV, TSV) and in `arrow` (Parquet, Arrow) without regard to
what a row means, which `fields` says, or which layout a JSON document has, which `layouts` says. A
row that cannot be read is a RecordError in its place, and never joined with its neighbours.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from blip2_jax.data import files
from blip2_jax.data.faults import RecordError

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif".split()
)
_SURROGATES = re.compile("[\ud800-\udfff]")  # what is no text, or half a character


class Line(NamedTuple):
    """A row, or the error of one that cannot be read, and its file and number."""

    where: str
    row: Row | RecordError


class StoredImage(NamedTuple):
    """An image whose bytes are in a column of a Parquet or Arrow file; see `arrow.StoredImages`."""

    path: str
    row: int  # in the whole file
    column: str  # dots lead into a struct


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      columns: all that it has, in order; empty where every row brings its own (JSON).
      lines: the rows, which are read on the way.
    """

    columns: list[str]
    lines: Iterator[Line]


def suffix(path: str) -> str:
    """What a path ends in, in lower case, with the dot."""
    return "." + path.rsplit(".", 1)[-1].lower()


def read(path: str) -> bytes:
    """A whole list; ValueError if it cannot be read."""
    try:
        return files.read(path)
    except RecordError as error:
        raise ValueError(str(error)) from error


# ------------------------------------------------------------------------------------------ text


def decode(data: bytes) -> str:
    """Text with `\\n` at the ends of lines: UTF-8, UTF-16 or UTF-32, with a byte order mark or not.

    What cannot be decoded becomes lone surrogates, for which `is_text` looks row by row.
    """
    encoding = json.detect_encoding(data)
    width = 4 if "32" in encoding else 2 if "16" in encoding else 1
    whole = len(data) // width * width
    try:
        text = data[:whole].decode(encoding, "surrogatepass" if width > 1 else "surrogateescape")
        text += "\udc80" * (whole < len(data))  # the last row is not whole
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # joined files have several


def is_text(text: str) -> bool:
    """Whether all of it was decoded."""
    return not _SURROGATES.search(text)


def parse(text: str) -> Any:
    """JSON as a value.

    Raises:
      RecordError: it is none; the reason is `not JSON`, or `not UTF-8`.
    """
    if not is_text(text):
        raise RecordError("not UTF-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON") from error


def _json_lines(text: str, path: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield as_row(parse(line), where)
        except RecordError as error:
            yield Line(where, RecordError(error.reason, where))


def as_row(value: Any, where: str) -> Line:
    """A JSON value as a row, which is an object."""
    return Line(
        where, value if isinstance(value, dict) else RecordError("not a JSON object", where)
    )


def document(path: str) -> Any:
    """The value of a JSON file, or an iterator of `Line` where it has one a line.

    What a file is shows in it: names are not always right.

    Raises:
      ValueError: it is neither.
    """
    text = decode(read(path))
    first = text.lstrip().split("\n", 1)[0]
    by_line = suffix(path) != ".json" and not first.startswith("[")
    if not by_line:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            if suffix(path) == ".json" and not _is_object(first):
                deep = isinstance(error, RecursionError)
                reason = "nested too deeply" if deep else error
                raise ValueError(f"{path} is not JSON: {reason}.") from error
    return _json_lines(text, path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse(line), dict)
    except RecordError:
        return False
