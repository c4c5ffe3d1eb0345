"""Binary tables: Parquet and Arrow, each row with its number; and the images in their columns."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from blip2_jax.data import files
from blip2_jax.data.containers import Contents, Line, Row, StoredImage, suffix
from blip2_jax.data.faults import RecordError

GROUPS_KEPT = 4  # row groups of Parquet whose images are held in memory, of all files together


def _binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _stored_columns(schema: Any, is_image: Callable[[str], bool]) -> dict[str, str]:
    """Columns that hold images' bytes -> where in them; Hugging Face has {"bytes", "path"}."""
    from pyarrow import types

    stored = {}
    for field in schema:
        if not is_image(field.name):
            continue
        if _binary(field.type):
            stored[field.name] = field.name
        elif types.is_struct(field.type):
            child = field.type.get_field_index("bytes")
            if child >= 0 and _binary(field.type.field(child).type):
                stored[field.name] = f"{field.name}.bytes"
    return stored


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


def read_parquet(
    path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]
) -> Contents:
    """The rows of a file of Parquet.

    Args:
      path: local or remote.
      known: whether a column of that name is of use; all others are left out.
      is_image: whether a column of that name may hold images.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
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


def read_arrow(
    path: str, known: Callable[[str], bool], is_image: Callable[[str], bool]
) -> Contents:
    """The rows of a file of Arrow; see `read_parquet`."""
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
        metadata = pyarrow.parquet.read_metadata(file)
    sizes = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _row_group(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet

    fs, inner = files.filesystem(path)
    with fs.open(inner, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[column])
    return table.column(0)
