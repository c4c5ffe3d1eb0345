"""Lists of images with texts, as sources of records.

Whatever holds a list (`containers`) and however it is laid out (`layouts`), its rows are understood
in one place (`fields`). Every row is used, or counted with its reason and place:

    rows read = rows used + rows skipped
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from blip2_jax.data import arrow, fields, files, layouts
from blip2_jax.data.columns import Columns
from blip2_jax.data.containers import IMAGE_SUFFIXES, Contents, Line, Row, StoredImage
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.folders import same_split
from blip2_jax.data.source import Record, Source
from blip2_jax.runtime.watchdog import alive

FORMS = {"image": None, "caption": "captions", "question": "questions"}  # what makes a record
MAX_BYTES = 256 << 20  # of one image file


class Packed:
    """Many small JSON values in two arrays: a million rows cost what their text does."""

    def __init__(self, values: Iterable[Any]):
        parts, ends, end = [], [], 0
        for value in values:
            part = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
            end += len(part)
            parts.append(part)
            ends.append(end)
        self._data = b"".join(parts)
        self._ends = np.array([0, *ends], np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """A hash of all values."""
        return hashlib.blake2b(self._data, digest_size=8).hexdigest()

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._data[self._ends[index] : self._ends[index + 1]])


class Counts(NamedTuple):
    """How many rows there were: `read` = `used` + `skipped`."""

    read: int
    used: int
    skipped: int
    other_splits: int  # rows of these are not among those that were read


class Parsed(NamedTuple):
    """A row as a record, or the reason why there is none."""

    where: str
    split: str | None
    record: fields.Record | RecordError


class ImageNames:
    """Finds files of images by their names, their names without suffix, or COCO's numbers."""

    def __init__(self, folder: str):
        self.folder = folder
        self._paths: dict[str, str | None] | None = None  # None: several files have that name

    def find(self, hints: Iterable[str]) -> str:
        """The path, below the folder, of the first of some names that is there.

        Raises:
          RecordError: none is there, or several files have the name.
        """
        if self._paths is None:
            self._paths = self._list()
        names = list(hints)
        for name in names:
            if name in self._paths:
                path = self._paths[name]
                if path is None:
                    raise RecordError("several image files have its name", name)
                return path
        raise RecordError("no image file for its id, key or URL", names[0])

    def _list(self) -> dict[str, str | None]:
        by_name: dict[str, str | None] = {}
        numbers: dict[str, str | None] = {}
        for path in files.below(self.folder):
            name = path.rpartition("/")[2]
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            for key in {name, stem}:
                by_name[key] = None if key in by_name else path
            number = stem.rpartition("_")[2]
            if number.isdigit() and number != stem:  # COCO_val2014_000000000042
                numbers[number] = None if number in numbers else path
        return {**numbers, **by_name}


class ListSource(Source):
    """Records of lists and image folders.

    Args:
      lists: files, or rows themselves (dicts, or `Line`s).
      images: folder that the rows' paths begin in; "": each list's own. Rows cannot leave it.
      split: which rows, of lists that name a split in every row; "train" includes Karpathy's
        "restval", as in the papers. "": all.
      form: "image": a record an image, with all its captions and questions; "caption": a record
        a caption, as LAVIS trains on COCO; "question": a record a question.
      columns: which columns hold what, where their names are not known; see `columns.Columns`.

    Attributes:
      faults: rows that were left out, by reason.
      notes: parts of rows that are used (an empty answer, ...) that were left out, by reason.
      counts: how many rows there were.
      by_split: whether there were splits to choose from.

    Raises:
      ValueError: a list cannot be read, no row can be used, or there is no such split.
    """

    def __init__(
        self,
        lists: Iterable[str | Row | Line],
        images: str = "",
        *,
        split: str = "",
        form: str = "image",
        columns: str = "",
    ):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; known: {', '.join(FORMS)}.")
        self.columns = Columns(columns)
        self.images = images
        self.faults, self.notes = Skipped(), Skipped()
        self._split, self._splits = split.strip().lower(), set[str]()
        self._read = self._other = 0
        self._folders: list[str] = []  # of the lists
        self._files: list[str] = []  # that hold images themselves
        self._stored = arrow.StoredImages()
        self.name = images
        self._by_image: dict[Any, Row] = {}
        self._asked: set[str] = set()
        self._columns: dict[str, None] = {}
        self._take_all(lists)
        self._rows = Packed(self._by_image.values())
        self.columns.check_own(self._columns, self.name)
        del self._by_image, self._asked, self._columns
        skipped = self.faults.count
        self.counts = Counts(self._read, self._read - skipped, skipped, self._other)
        self.faults.total = self.notes.total = self._read
        if self._split and self._splits and not same_split(self._split, self._splits):
            raise ValueError(
                f"{self.name}: no split {split!r}; there are {', '.join(sorted(self._splits))} "
                "(columns split= reads all rows)."
            )
        if not len(self._rows):
            raise ValueError(f"{self.name}: not one row that can be used.\n{self.faults.text()}")
        self._field = FORMS[form]
        if self._field:
            counts = [len(self._rows[i].get(self._field, [])) for i in range(len(self._rows))]
            self._row_of = np.repeat(np.arange(len(counts)), counts)
            self._entry_of = np.concatenate([np.arange(n) for n in counts])
            if not len(self._row_of):
                raise ValueError(f"{self.name} has no {self._field}; form={form!r} needs them.")
        self.by_split = bool(self._split and self._splits)

    # ----------------------------------------------------------------------------- reading

    def _take_all(self, lists: Iterable[str | Row | Line]) -> None:
        lists = iter(lists)
        first = next(lists, None)
        if isinstance(first, str):
            self.name = first
            for path in (first, *lists):
                assert isinstance(path, str)
                self._take(layouts.read(path, self.columns), path)
        elif first is not None:
            self._take(Contents([], _lines((first, *lists))), files.join(self.images, ""))

    def _take(self, contents: Contents, path: str) -> None:
        """Reads the rows of one list."""
        columns = dict.fromkeys(contents.columns)
        parsed = []
        for where, row in contents.lines:
            alive()
            if isinstance(row, RecordError):
                parsed.append(Parsed(where, None, row))
                continue
            columns.update(dict.fromkeys(row))
            split = fields.split_of(row, self.columns) if self._split else None
            try:
                parsed.append(Parsed(where, split, fields.read(row, self.columns)))
            except RecordError as error:
                parsed.append(Parsed(where, split, RecordError(error.reason, where)))
        if columns and not any(isinstance(entry.record, fields.Record) for entry in parsed):
            self.columns.check(columns, path)
        self._columns |= columns
        folder = len(self._folders)
        self._folders.append(os.path.dirname(path))
        names = ImageNames(self.images or self._folders[-1] or ".")
        wanted = self._wanted(parsed)
        for where, split, record in parsed:
            if wanted is not None and split is not None and split not in wanted:
                if split:
                    self._other += 1
                    continue
                record = RecordError("no split named", where)
            elif wanted is not None and split is None and not isinstance(record, RecordError):
                record = RecordError("no split named", where)
            self._read += 1
            try:
                if isinstance(record, RecordError):
                    raise record
                self._keep(record, where, folder, names)
            except RecordError as error:
                self.faults.add(error.reason, error.where or where)

    def _wanted(self, parsed: list[Parsed]) -> set[str] | None:
        """The splits that are asked for; None where no row names one."""
        splits = {entry.split for entry in parsed if entry.split}
        self._splits |= splits
        return same_split(self._split, splits) if splits else None

    def _keep(self, parsed: fields.Record, where: str, folder: int, names: ImageNames) -> None:
        """Adds a record to those of its image.

        Raises:
          RecordError: it cannot be used.
        """
        record = parsed.record
        key: Any = None
        if parsed.stored is not None:
            if not isinstance(parsed.stored, StoredImage):
                raise RecordError("image bytes in a row that is not of a file", where)
            if not self._files or self._files[-1] != parsed.stored.path:
                self._files.append(parsed.stored.path)
            key = (len(self._files) - 1, parsed.stored.row, parsed.stored.column)
            record["stored"] = key
        elif record["image"] is None:
            record["image"] = names.find(parsed.hints)
        key = key or (folder, record["image"])
        self._refuse_duplicates(parsed, f"{where}: {record['image']}")
        for note in parsed.notes:
            self.notes.add(note, where)
        if folder:
            record["folder"] = folder
        known = self._by_image.setdefault(key, record)
        if known is not record:
            known["captions"] += record["captions"]
            if "questions" in record:
                known.setdefault("questions", []).extend(record["questions"])

    def _refuse_duplicates(self, parsed: fields.Record, where: str) -> None:
        """Takes out questions whose id was there before; RecordError if nothing is left."""
        questions = parsed.record.get("questions", [])
        new = []
        for question in questions:
            key = str(question.get("question_id", ""))
            if not key or key not in self._asked:
                new.append(question)
                self._asked |= {key} - {""}
        if len(new) < len(questions):
            if not new and not parsed.record["captions"]:
                raise RecordError("duplicated key", where)
            parsed.notes.append("duplicated question")
            parsed.record["questions"] = new

    # ---------------------------------------------------------------------------- records

    def __len__(self) -> int:
        return len(self._row_of if self._field else self._rows)

    @property
    def image_numbers(self) -> int:
        """See `Source`."""
        return len(self._rows)

    def identity(self) -> dict[str, Any]:
        """See `Source`; with a digest of the rows."""
        return {"records": len(self), "digest": self._rows.digest()}

    def _row(self, index: int) -> int:
        return int(self._row_of[index]) if self._field else index

    def where(self, index: int) -> str:
        """The image file of a record, or its row in a list that holds images."""
        try:
            return self._image_path(self._rows[self._row(index)])
        except RecordError as error:
            return error.where or super().where(index)

    def _image_path(self, row: Row) -> str:
        if "stored" in row:
            return f"{self._files[row['stored'][0]]}[{row['stored'][1]}]"
        return self._path(row["image"], self._folders[row.get("folder", 0)])

    def _path(self, image: str, folder: str) -> str:
        """Where an image is that a list in `folder` names.

        Raises:
          RecordError: outside the folder of images.
        """
        root = self.images or folder
        if "://" in image or image.startswith("/"):
            if not self.images and files.is_local(folder):
                return image  # the list is ours, and says where it is
            path = image
        elif os.path.normpath(image).startswith(".."):  # seen from where the list is
            path = files.join(folder, image)
        else:
            path = files.join(root, image)
        if files.inside(path, root):
            return os.path.normpath(path) if files.is_local(path) else path
        raise RecordError(
            f"path leaves the image folder {root or '.'}; name one that holds it with --images "
            "(in a config: data.images)",
            image,
        )

    def is_missing(self, index: int) -> bool:
        """Whether the file of a record's image is not there, as far as that is known at once."""
        row = self._rows[self._row(index)]
        path = self._image_path(row)
        return "stored" not in row and files.is_local(path) and not os.path.isfile(path)

    def without_image(self, index: int) -> Record:
        """See `Source`."""
        return {key: value for key, value in self._with_path(index).items() if key != "image"}

    def _with_path(self, index: int) -> Row:
        """A record with the path of its image."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        number = self._row(index)
        row = self._rows[number]
        if self._field:
            row[self._field] = [row[self._field][self._entry_of[index]]]
        row |= {"image": self._image_path(row), "image_number": number}
        return {key: value for key, value in row.items() if key not in ("stored", "folder")}

    def __getitem__(self, index: int) -> Record:
        row = self._with_path(index)
        stored = self._rows[row["image_number"]].get("stored")
        if stored:
            file, number, column = stored
            data = self._stored.read(StoredImage(self._files[file], number, column))
        else:
            data = files.read(row["image"], MAX_BYTES)
        return {**row, "image": data}


def _lines(entries: Iterable[Any]) -> Iterator[Line]:
    """Rows, each with where it stands."""
    for number, row in enumerate(entries):
        yield row if isinstance(row, Line) else Line(f"row {number}", row)
