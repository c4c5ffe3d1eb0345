"""Files of rows: JSON, JSONL, CSV, TSV, Parquet and Arrow, each row with its place.

A container is read here and nothing is understood: what a row means is `fields`' business, and
which layout a JSON document has is `layouts`'. A row that cannot be read is a RecordError in its
place, and never joined with its neighbours.
"""

import csv
import functools
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from blip2_jax.data import files
from blip2_jax.data.faults import RecordError

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif".split()
)
DELIMITERS = (",", ";", "|", "\t")
QUOTED = (",", ";")  # delimiters of tables in which quotes group; in others they are text
GROUPS_KEPT = 4  # row groups of Parquet whose images are held in memory, of all files together
_SURROGATES = re.compile("[\ud800-\udfff]")  # what is no text, or half a character


class Line(NamedTuple):
    """A row, or what is wrong with it, and where it stands."""

    where: str
    row: Row | RecordError


class StoredImage(NamedTuple):
    """An image whose bytes are in a column of a Parquet or Arrow file; see `StoredImages`."""

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


def table(path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]) -> Contents:
    """The rows of a file of columns.

    Args:
      path: local or remote.
      known: whether a column of that name is of use; binary files leave out all others.
      is_image: whether a column of that name may hold images.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
    kind = suffix(path)
    if kind == ".parquet":
        return _parquet(path, known, is_image)
    if kind in (".arrow", ".feather"):
        return _arrow(path, known, is_image)
    usual = "\t" if kind == ".tsv" else ","
    return _separated(decode(read(path)), path, usual, known, is_image)


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


# ---------------------------------------------------------------------------------------- tables


def _separated(
    text: str,
    path: str,
    usual: str,
    known: Callable[[str], bool],
    is_image: Callable[[str], bool],
) -> Contents:
    """CSV and TSV, whatever stands between the columns."""
    lines = text.split("\n")
    start = next((n for n, line in enumerate(lines) if line.strip()), 0)
    hint = re.fullmatch(r"sep=(.)", lines[start].strip())  # Excel's
    if hint:
        start = min(start + 1, len(lines) - 1)
    delimiter = hint[1] if hint else _delimiter(lines[start], usual, known)
    columns = [name.strip() for name in _split(lines[start], delimiter)]
    if delimiter in QUOTED:
        image = next((n for n, name in enumerate(columns) if is_image(name)), 0)
        rows = _quoted_rows(lines, start + 1, delimiter, len(columns), image)
    else:
        rows = _plain_rows(lines, start + 1, delimiter)
    return Contents([name for name in columns if name], _named(rows, columns, path))


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
    """CSV's rows; a quote that is opened and not closed in its row costs that row alone.

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


def _named(rows: Iterable[Split], columns: list[str], path: str) -> Iterator[Line]:
    for number, values in rows:
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


# --------------------------------------------------------------------------------- binary tables


def _binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _stored_columns(schema: Any, is_image: Callable[[str], bool]) -> dict[str, str]:
    """Columns that hold images' bytes -> where in them; Hugging Face has {"bytes", "path"}."""
    from pyarrow import types

    found = {}
    for field in schema:
        if not is_image(field.name):
            continue
        if _binary(field.type):
            found[field.name] = field.name
        elif types.is_struct(field.type):
            child = field.type.get_field_index("bytes")
            if child >= 0 and _binary(field.type.field(child).type):
                found[field.name] = f"{field.name}.bytes"
    return found


def _binary_lines(
    batches: Iterator[Any], path: str, stored: dict[str, str], kind: str
) -> Iterator[Line]:
    """Rows of batches of Arrow, with marks where an image's bytes are."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for row in _values(batch):
                where = f"{path}[{number}]"
                if isinstance(row, dict):
                    row.pop("", None)  # see `_without_bytes`
                    for name, column in stored.items():
                        inner = row.get(name)
                        image = StoredImage(path, number, column)
                        row[name] = {**(inner if isinstance(inner, dict) else {}), "bytes": image}
                    yield Line(where, row)
                else:
                    yield Line(where, RecordError(row, where))
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failure(path, kind, error) from error


def _values(batch: Any) -> Iterator[Row | str]:
    """The rows of a batch, or the reason why one cannot be read.

    Validated first: pyarrow follows offsets of a damaged file wherever they lead.
    """
    import pyarrow

    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
        return
    except (pyarrow.ArrowException, ValueError, OverflowError):
        pass
    for number in range(batch.num_rows):
        try:
            one = batch.slice(number, 1)
            one.validate(full=True)
            (row,) = one.to_pylist()
            yield row
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            yield "not UTF-8" if "UTF" in str(error).upper() else "a value that cannot be read"


def _failure(path: str, kind: str, error: Exception) -> ValueError:
    return ValueError(f"{path} is not readable {kind}: {error}")


def _parquet(path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]) -> Contents:
    import pyarrow.parquet

    fs, inner = files.filesystem(path)
    try:
        with fs.open(inner, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            columns = [field.name for field in table.schema_arrow]
            leaves = [table.schema.column(n).path for n in range(len(table.schema))]
            # Paths alone, as `datasets` has them of images that it was given as files.
            empty = {leaf for n, leaf in enumerate(leaves) if _all_null(table.metadata, n)}
            stored = _stored_columns(table.schema_arrow, is_image)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failure(path, "Parquet", error) from error
    stored = {name: column for name, column in stored.items() if column not in empty}

    def batches() -> Iterator[Any]:
        names = [name for name in columns if known(name)]
        wanted = [
            leaf
            for leaf in leaves
            if leaf not in stored.values() and any(f"{leaf}.".startswith(f"{n}.") for n in names)
        ]
        with fs.open(inner, "rb") as file:
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(10_000, columns=wanted)

    return Contents(columns, _binary_lines(batches(), path, stored, "Parquet"))


def _all_null(metadata: Any, column: int) -> bool:
    """Whether the statistics of a column of Parquet say that it holds nothing."""
    groups = [metadata.row_group(n).column(column) for n in range(metadata.num_row_groups)]
    return all(
        group.statistics is not None and group.statistics.null_count == group.num_values
        for group in groups
    )


def arrow_table(path: str) -> Any:
    """A file of Arrow batches as a table: the stream that `datasets` writes, or Feather's file.

    A local one is mapped, so that only what is looked at is read.

    Raises:
      ValueError: it is neither.
    """
    import pyarrow

    try:
        if files.is_local(path):
            data = pyarrow.memory_map(path)
        else:
            data = pyarrow.BufferReader(files.read(path))
        try:
            return pyarrow.ipc.open_stream(data).read_all()
        except pyarrow.ArrowInvalid:
            data.seek(0)
            return pyarrow.ipc.open_file(data).read_all()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failure(path, "Arrow", error) from error


def _arrow(path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]) -> Contents:
    import pyarrow

    table = arrow_table(path)
    try:
        columns = list(table.column_names)
        stored = _stored_columns(table.schema, is_image)
        part = _without_bytes(table, known, stored)
    except (pyarrow.ArrowException, ValueError) as error:
        raise _failure(path, "Arrow", error) from error
    lines = _binary_lines(iter(part.to_batches(10_000)), path, stored, "Arrow")
    return Contents(columns, lines)


def _without_bytes(table: Any, known: Callable[[str], bool], stored: dict[str, str]) -> Any:
    """The known columns of a table of Arrow; of images only the paths.

    Where there are only paths, the column goes from `stored`.
    """
    import pyarrow
    import pyarrow.compute

    part = table.select([name for name in table.column_names if known(name) and name not in stored])
    for name, column in list(stored.items()):
        if "." not in column:
            continue
        kind = table.schema.field(name).type
        if pyarrow.compute.struct_field(table.column(name), "bytes").null_count == table.num_rows:
            del stored[name]
            part = part.append_column(name, table.column(name))
        elif kind.get_field_index("path") >= 0:
            paths = pyarrow.compute.struct_field(table.column(name), "path").combine_chunks()
            part = part.append_column(name, pyarrow.StructArray.from_arrays([paths], ["path"]))
    if not part.num_columns:  # nothing but images
        part = pyarrow.table({"": pyarrow.nulls(table.num_rows)})
    return part


class StoredImages:
    """Reads images out of Parquet and Arrow files, from any number of threads.

    Arrow is mapped, and any image is one read. Parquet holds images by the row group, and some
    groups are kept: reading in order is cheap, at random each image may cost a group.
    """

    def __init__(self) -> None:
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        del state  # every process opens its own
        self._lock = threading.Lock()
        self._arrow = functools.lru_cache(maxsize=None)(arrow_table)
        self._group = functools.lru_cache(maxsize=GROUPS_KEPT)(_row_group)
        self._starts = functools.lru_cache(maxsize=None)(_group_starts)

    def read(self, image: StoredImage) -> bytes:
        """The bytes of an image.

        Raises:
          RecordError: there are none, or the file cannot be read any more.
        """
        where = f"{image.path}[{image.row}]"
        try:
            with self._lock:
                name, _, inner = image.column.partition(".")
                if suffix(image.path) == ".parquet":
                    starts = self._starts(image.path)
                    group = next(n for n, start in enumerate(starts[1:]) if image.row < start)
                    column = self._group(image.path, group, image.column)
                    value = column[image.row - starts[group]]
                else:
                    value = self._arrow(image.path).column(name)[image.row]
                data = value.as_py() if value.is_valid else None
        except (OSError, ValueError, StopIteration, LookupError) as error:
            raise RecordError("cannot be read", f"{where}: {error}"[:300]) from error
        data = data.get(inner) if isinstance(data, dict) else data
        if not data:
            raise RecordError("empty file", where)
        return bytes(data)


def _group_starts(path: str) -> list[int]:
    """The first row of every row group, and the number of all."""
    import pyarrow.parquet

    fs, inner = files.filesystem(path)
    with fs.open(inner, "rb") as file:
        found = pyarrow.parquet.read_metadata(file)
    sizes = (found.row_group(n).num_rows for n in range(found.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _row_group(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet

    fs, inner = files.filesystem(path)
    with fs.open(inner, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[column])
    return table.column(0)
