"""Tables of text: CSV and TSV, each row with the number of its line."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator

from blip2_jax.data import containers
from blip2_jax.data.containers import IMAGE_SUFFIXES, Contents, Line, Row, decode, is_text, suffix
from blip2_jax.data.faults import RecordError

DELIMITERS = (",", ";", "|", "\t")
QUOTED = (",", ";")  # delimiters of tables in which quotes group; in others they are text


def read(path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]) -> Contents:
    """The rows of a file of CSV or TSV, with any of `DELIMITERS` between the columns.

    Args:
      path: local or remote.
      known: whether a column of that name is of use.
      is_image: whether a column of that name may hold images.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
    usual = "\t" if suffix(path) == ".tsv" else ","
    lines = decode(containers.read(path)).split("\n")
    start = next((n for n, line in enumerate(lines) if line.strip()), 0)
    hint = re.fullmatch(r"sep=(.)", lines[start].strip())  # Excel's
    if hint:
        start = min(start + 1, len(lines) - 1)
    delimiter = hint[1] if hint else _delimiter(lines[start], usual, known)
    columns = [name.strip() for name in _split(lines[start], delimiter)]
    if delimiter in QUOTED:
        image = next((n for n, name in enumerate(columns) if is_image(name)), 0)
        split_rows = _quoted_rows(lines, start + 1, delimiter, len(columns), image)
    else:
        split_rows = _plain_rows(lines, start + 1, delimiter)
    return Contents([name for name in columns if name], _named(split_rows, columns, path))


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter in QUOTED:
        try:
            return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:  # a value beyond `csv.field_size_limit`
            return [line]
    return [_unquoted(value) for value in line.split(delimiter)]


def _delimiter(header: str, usual: str, known: Callable[[str], bool]) -> str:
    """The delimiter that cuts a header into names that are known, or into the most names."""

    def fit(delimiter: str) -> tuple[int, int, bool]:
        names = _split(header, delimiter)
        return sum(map(known, names)), len(names), delimiter == usual

    return max(DELIMITERS, key=fit)


def _unquoted(value: str) -> str:
    """A value without the quotes that some writers put around it whole, doubling those inside."""
    value = value.strip(" ")
    inner = value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return value


Split = tuple[int, list[str] | RecordError]  # number of a row's first line, its values


def _plain_rows(lines: list[str], start: int, delimiter: str) -> Iterator[Split]:
    for number in range(start, len(lines)):
        if lines[number].strip("\n "):
            yield number, _split(lines[number], delimiter)


def _quoted_rows(
    lines: list[str], start: int, delimiter: str, width: int, image: int
) -> Iterator[Split]:
    """Rows of CSV; a quote that is not closed makes one row unreadable, and not those after it.

    Args:
      lines: of the file.
      start: the first line after the header.
      delimiter: between values.
      width: number of columns.
      image: number of the column that names images.
    """
    while start < len(lines):
        rest = (lines[number] + "\n" for number in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True)
        first, after = start, start
        try:
            for values in reader:
                first, after = after, start + reader.line_num
                several = lines[first:after]
                if len(several) > 1 and _holds_rows(several, delimiter, width, image):
                    raise csv.Error
                if values:
                    yield first, values
                first = after
        except csv.Error:
            line = lines[first]
            if start + reader.line_num == first + 1 and line.count('"') % 2 == 0:
                # Closed, and followed by more text: `"STOP" sign`, as pandas reads it.
                yield first, _split(line, delimiter)
            else:
                yield first, RecordError("quote that is not closed")
            start = first + 1
        else:
            return


def _holds_rows(lines: list[str], delimiter: str, width: int, image: int) -> bool:
    """Whether lines that quotes join are rows of their own, two or more of them.

    Captions may go over several lines, so quotes alone do not tell. A row is known by an image's
    name in it, or by having the right number of values, with none or one word for the image.
    """
    count = 0
    for line in lines:
        values = [value.strip(' "') for value in line.split(delimiter)]
        named = any(value.rpartition(".")[2].lower() in IMAGE_SUFFIXES for value in values)
        fits = len(values) == width and len(values[image].split()) < 2
        count += named or fits
    return count > 1


def _named(split_rows: Iterable[Split], columns: list[str], path: str) -> Iterator[Line]:
    for number, values in split_rows:
        where = f"{path}:{number + 1}"
        if isinstance(values, RecordError):
            yield Line(where, RecordError(values.reason, where))
            continue
        extra = values[len(columns) :]
        if len(values) < len(columns) or any(value.strip() for value in extra):
            yield Line(where, RecordError("wrong number of columns", where))
        elif not all(map(is_text, values)):
            yield Line(where, RecordError("not UTF-8", where))
        else:
            yield Line(where, _row_of(columns, values))


def _row_of(columns: list[str], values: list[str]) -> Row:
    """A row of a table; columns of one name give a list."""
    row: Row = {}
    for name, value in zip(columns, values, strict=False):
        if name in row:
            known = row[name]
            row[name] = [*(known if isinstance(known, list) else [known]), value]
        elif name:
            row[name] = value
    return row
