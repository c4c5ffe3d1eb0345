"""Lists of images with texts: JSON, JSONL, CSV, TSV and Parquet, as people have them.

Rows become records by what their columns are called, so that LAVIS's files, COCO's and Karpathy's
own, VQA's questions, GQA's dict and a spreadsheet of two columns are all read as they are.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blip2_jax.data import files
from blip2_jax.data.faults import RecordError, Skipped

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
FORMS = {"image": None, "caption": "captions", "question": "questions"}  # what makes a record
MOST_BYTES = 256 << 20  # of one image file

# What columns are called, in files that are out there; the first one that a row has is taken.
IMAGE = ("image", "image_path", "filepath", "file_name", "filename", "path", "img_path", "img")
IMAGE_ID = ("image_id", "img_id", "imageId", "cocoid", "id")
CAPTION = ("captions", "caption", "sentences", "texts", "text")
QUESTION_KEYS = ("question_id", "question_type", "answer_type", "dataset", "choices")

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------- rows


def read_rows(path: str, split: str = "") -> Iterator[Row | RecordError]:
    """The rows of a file, in order; a row that cannot be read is a RecordError in its place.

    Args:
      path: local or remote.
      split: for files that hold several (Karpathy's): which one; "train" includes "restval", as
        in the papers.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
    suffix = "." + path.rsplit(".", 1)[-1].lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: lists end in {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        data = files.read(path)
    except RecordError as error:
        raise ValueError(str(error)) from error
    if suffix == ".json":
        yield from document_rows(_parse(data, path), path, split)
    elif suffix == ".jsonl":
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield _line_row(line, f"{path}:{number}")
    else:
        yield from _table_rows(data, path, "\t" if suffix == ".tsv" else ",")


def _parse(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    except ValueError as error:
        hint = " One JSON object a line? Then its name should end in .jsonl."
        hint = hint if "Extra data" in str(error) else ""
        raise ValueError(f"{path} is not JSON: {error}.{hint}") from error


def _line_row(line: bytes, where: str) -> Row | RecordError:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return RecordError("not UTF-8", where)
    except ValueError:
        return RecordError("not JSON", where)
    return row if isinstance(row, dict) else RecordError("not a JSON object", where)


def _table_rows(data: bytes, path: str, delimiter: str) -> Iterator[Row | RecordError]:
    text = data.decode("utf-8-sig", errors="surrogateescape")  # which marks what is not UTF-8
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name for name in reader.fieldnames or [] if name]
    if not set(columns) & {*IMAGE, *CAPTION, "url"}:
        raise ValueError(
            f"{path}: the first line names no column that is known ({', '.join(columns)[:80]}). "
            f"Name the columns there, e.g. image{delimiter}caption.".replace("\t", "<tab>")
        )
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            values = [v for v in row.values() if isinstance(v, str)]
            if None in row or None in row.values():
                yield RecordError("wrong number of columns", where)
            elif any("\udc80" <= c <= "\udcff" for v in values for c in v if c > "\udc7f"):
                yield RecordError("not UTF-8", where)
            else:
                yield row
    except csv.Error as error:
        yield RecordError(f"not a table ({error})", f"{path}:{reader.line_num}")


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow.parquet

    fs, inner = files.filesystem(path)
    try:
        with fs.open(inner, "rb") as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(10_000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable Parquet: {error}") from error


def document_rows(document: Any, path: str, split: str = "") -> Iterator[Row | RecordError]:
    """The rows of a whole JSON document, whichever of the published layouts it has."""
    if isinstance(document, list):
        for number, row in enumerate(document):
            where = f"{path}[{number}]"
            yield row if isinstance(row, dict) else RecordError("not a JSON object", where)
    elif not isinstance(document, dict):
        raise ValueError(f"{path}: a list of rows is wanted, this is {type(document).__name__}.")
    elif "images" in document and "annotations" in document:
        yield from _coco_rows(document)
    elif document.get("images") and "sentences" in document["images"][0]:
        yield from _karpathy_rows(document["images"], split)
    elif "questions" in document:
        yield from document_rows(document["questions"], path)
    elif document and all(isinstance(row, dict) for row in document.values()):
        for key, row in document.items():  # GQA: question id -> question
            yield {"question_id": key, **row}
    else:
        raise ValueError(
            f"{path}: rows in none of the known layouts (top-level keys: "
            f"{', '.join(list(document)[:6])}). A list of objects with 'image' and 'caption' works."
        )


def _coco_rows(document: Row) -> Iterator[Row]:
    """COCO's captions, and NoCaps': one row an image."""
    captions: dict[Any, list[str]] = {}
    for annotation in document["annotations"]:
        if "caption" in annotation:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in document["images"]:
        extra = {key: image[key] for key in ("domain", "open_images_id") if key in image}
        yield {
            "image": image["file_name"],
            "image_id": image["id"],
            "captions": captions.get(image["id"], []),
            **extra,
        }


def _karpathy_rows(images: list[Row], split: str) -> Iterator[Row]:
    """Karpathy's own files (COCO, Flickr30k): one row an image."""
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    known = {image.get("split") for image in images}
    if split and not known & set(wanted):
        raise ValueError(f"No split {split!r}; there are {', '.join(sorted(map(str, known)))}.")
    for image in images:
        if not split or image["split"] in wanted:
            yield {
                "image": files.join(image.get("filepath", ""), image["filename"]),
                "image_id": image.get("cocoid", image.get("imgid")),
                "captions": [sentence["raw"] for sentence in image["sentences"]],
            }


# ------------------------------------------------------------------------------------- meaning


def _first(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def captions_of(value: Any) -> list[str]:
    """The captions in a column: a text, a list of texts (also written as JSON), or COCO's
    sentences. Spaces around them and empty ones go."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a caption that begins with a bracket
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = (v.get("raw", v.get("caption")) if isinstance(v, dict) else v for v in values)
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def questions_of(row: Row) -> list[Row]:
    """The questions in a row, as a list of {"question", "answers", ...}."""
    if isinstance(row.get("questions"), list):
        return row["questions"]
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        return []
    answers = row.get("answers", row.get("answer", []))
    answers = answers if isinstance(answers, (list, tuple)) else [answers]
    texts = [a["answer"] if isinstance(a, dict) else a for a in answers]
    known = {key: row[key] for key in QUESTION_KEYS if row.get(key) is not None}
    if "fullAnswer" in row:
        known["full_answer"] = row["fullAnswer"]
    return [{"question": row["question"].strip(), "answers": [str(t) for t in texts], **known}]


def normalize(row: Row) -> Row:
    """A row as a record without its image: `image` (a path), `id`, `captions`, `questions`."""
    image = _first(row, IMAGE)
    if isinstance(image, dict):  # Hugging Face datasets: {"bytes", "path"}
        image = image.get("path")
    identity = _first(row, IMAGE_ID)
    record: Row = {
        "image": str(image) if image is not None else None,
        "id": str(identity if identity is not None else image),
        "captions": captions_of(_first(row, CAPTION)),
    }
    questions = questions_of(row)
    if questions:
        record["questions"] = questions
    extra = {key: row[key] for key in ("domain", "url", "scores") if row.get(key) is not None}
    return {**record, **extra}


# -------------------------------------------------------------------------------------- source


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


def _rows(lists: Iterable[str | Row | RecordError], split: str) -> Iterator[Row | RecordError]:
    """The rows of files, and rows themselves."""
    for entry in lists:
        if isinstance(entry, str):
            yield from read_rows(entry, split)
        else:
            yield entry


class ListSource:
    """Records of lists and image folders.

    Args:
      lists: files (see `read_rows`), or rows themselves.
      images: folder that the rows' paths begin in; "": the first list's. Rows cannot leave it.
      split: see `read_rows`.
      form: "image": a record an image, with all its captions and questions; "caption": a record
        a caption, as LAVIS trains on COCO; "question": a record a question.

    Attributes:
      faults: what was left out already, by reason.
    """

    def __init__(
        self,
        lists: Iterable[str | Row | RecordError],
        images: str = "",
        *,
        split: str = "",
        form: str = "image",
    ):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; known: {', '.join(FORMS)}.")
        first = None if isinstance(lists, Iterator) else next(iter(lists), None)
        path = first if isinstance(first, str) else ""
        self.name = path or images
        self.images = images or os.path.dirname(path)
        self.faults = Skipped()
        self._rows = Packed(self._records(_rows(lists, split)))
        self.faults.total = len(self._rows) + self.faults.count
        if not len(self._rows):
            raise ValueError(f"{self.name}: not one row that can be used.\n{self.faults.text()}")
        self._field = FORMS[form]
        if self._field:
            counts = [len(self._rows[i].get(self._field, [])) for i in range(len(self._rows))]
            self._row_of = np.repeat(np.arange(len(counts)), counts)
            self._entry_of = np.concatenate([np.arange(n) for n in counts])
            if not len(self._row_of):
                raise ValueError(f"{self.name} has no {self._field}; form={form!r} needs them.")
        self.image_numbers = len(self._rows)

    def _records(self, rows: Iterable[Row | RecordError]) -> list[Row]:
        by_image: dict[str, Row] = {}
        questions: set[str] = set()
        for number, row in enumerate(rows):
            where = f"row {number}"
            if isinstance(row, RecordError):
                self.faults.add(row.reason, row.where)
                continue
            record = normalize(row)
            if record["image"] is None:
                self.faults.add("no image named", where)
            elif not record["captions"] and not record.get("questions"):
                self.faults.add("empty caption", f"{where}: {record['image']}")
            elif any(str(q.get("question_id")) in questions for q in record.get("questions", [])):
                self.faults.add("duplicated key", f"{where}: {record['image']}")
            else:
                asked = record.get("questions", [])
                questions |= {str(q["question_id"]) for q in asked if "question_id" in q}
                known = by_image.setdefault(record["image"], record)
                if known is not record:
                    known["captions"] += record["captions"]
                    if asked:
                        known.setdefault("questions", []).extend(asked)
        return list(by_image.values())

    def __len__(self) -> int:
        return len(self._row_of if self._field else self._rows)

    def digest(self) -> str:
        """Of the rows."""
        return self._rows.digest()

    def _row(self, index: int) -> int:
        return int(self._row_of[index]) if self._field else index

    def where(self, index: int) -> str:
        """The image file of a record."""
        return self._path(self._rows[self._row(index)]["image"])

    def _path(self, image: str) -> str:
        path = image if "://" in image or image.startswith("/") else files.join(self.images, image)
        if files.is_local(path):
            path = os.path.normpath(path)
        root = self.images.rstrip("/") or ("/" if self.images else ".")
        inside = root in (".", "/") or path.startswith((os.path.normpath(root) + "/", root + "/"))
        if not inside or ".." in path.split("/"):
            raise RecordError(f"path leaves the image folder {self.images}", image)
        return path

    def row(self, index: int) -> Row:
        """A record with the path of its image, which is not read."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        number = self._row(index)
        row = self._rows[number]
        if self._field:
            row[self._field] = [row[self._field][self._entry_of[index]]]
        return {**row, "image": self._path(row["image"]), "image_number": number}

    def __getitem__(self, index: int) -> Row:
        row = self.row(index)
        return {**row, "image": files.read(row["image"], MOST_BYTES)}
