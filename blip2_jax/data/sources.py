"""Where records come from: sequences with random access, so that order and resume are exact.

A source has a length, records by number, and `where(number)`, which names a record's place in
reports. A record is a dict: `image` (encoded bytes), `id`, `captions` (list of texts), maybe
`questions` (list of {"question", "answers" or "answer", ...}), `image_number` where several
records show one image, and `part`, the name of a mixture's part. A record that cannot be read
raises RecordError.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2_jax.data import files, folders, lists, tars
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.prepared import PREPARED
from blip2_jax.runtime import atomic, digest

SCHEMES = ("weight", "size", "sqrt_size")  # how the parts of a mixture are weighted


def open_files(
    path: str | Sequence[str],
    *,
    images: str = "",
    split: str = "",
    form: str = "image",
    columns: str = "",
    index_folder: str = "",
) -> Any:
    """The source for what a path holds: a prepared folder, tars, lists, or images beside texts.

    Args:
      path: a file, folder, glob or braces (see `files.expand`), or several; `{split}` in it
        stands for `split`.
      images: folder of the images that lists name; "": the list's own.
      split: of a prepared folder, of a folder with a list a split, or of a list that holds several.
      form: of lists: a record an "image" or a "caption".
      columns: of lists: which column holds what; see `columns.Columns`.
      index_folder: where indexes of tars are kept; see `tars.TarSource`.

    Raises:
      ValueError: nothing there that can be read.
    """
    paths = [path] if isinstance(path, str) else list(path)
    paths = [files.with_split(p, split) for p in paths if p]
    if not paths:
        raise ValueError("No path of data is given.")
    if len(paths) == 1 and is_prepared(paths[0]):
        return TfdsSource(paths[0], split)
    found = [folders.look(p, split, tars.NOTE) for p in paths]
    # An archive that is gone is known by its index (see `tars.ensure_index`).
    archives = {path.removesuffix(tars.NOTE) for part in found for path in part.archives}
    if archives:  # img2dataset leaves .parquet and .json beside them, which say the same
        return tars.TarSource(sorted(archives), index_folder=index_folder)
    options: dict[str, Any] = {"split": split, "form": form, "columns": columns}
    beside = [folder for part in found for folder in part.pairs]
    if beside:
        if len(found) > 1:
            raise ValueError(f"{beside[0]} holds images beside texts; give that folder alone.")
        return lists.ListSource(folders.pairs(beside[0]), beside[0], **options)
    source = lists.ListSource([path for part in found for path in part.lists], images, **options)
    source.by_split |= any(part.by_split for part in found)
    return source


def is_prepared(folder: str) -> bool:
    """Whether `blip2 prepare` or TFDS wrote this folder."""
    return bool(_prepared_folders(folder))


def _prepared_folders(folder: str) -> list[str]:
    """Folders of data sets of TFDS; Hugging Face's `datasets` has a dataset_info.json too."""
    found = set(files.below(folder))
    notes = [path for path in found if path.rpartition("/")[2] == "dataset_info.json"]
    parents = sorted(path.removesuffix("dataset_info.json") for path in notes)
    return [files.join(folder, p).rstrip("/") for p in parents if f"{p}features.json" in found]


class Mixture:
    """Several sources as one, numbered through.

    Args:
      parts: the sources, by name.
      scheme: "weight": by `weights`; "size": by number of records; "sqrt_size": by its root.
      weights: of each part, for "weight".

    Attributes:
      ranges: first and last record number of each part, end excluded.
      weights: shares, sum 1.
    """

    def __init__(
        self, parts: dict[str, Any], scheme: str = "size", weights: dict[str, float] | None = None
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
        self.ranges = list(zip([0, *ends[:-1]], ends, strict=True))
        images = np.cumsum([getattr(part, "image_numbers", len(part)) for part in self.parts])
        self._first_image = [0, *images.tolist()]
        self.faults = Skipped()
        for part in self.parts:
            if hasattr(part, "faults"):
                self.faults.merge(part.faults)
        self.faults.total = len(self) + self.faults.count

    def __len__(self) -> int:
        return self.ranges[-1][1]

    def part_of(self, index: int) -> int:
        """Which part a record belongs to."""
        return next(n for n, (_, end) in enumerate(self.ranges) if index < end)

    def where(self, index: int) -> str:
        """A record's place, as its part names it."""
        part = self.part_of(index)
        return place(self.parts[part], index - self.ranges[part][0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = self.part_of(index)
        index -= self.ranges[part][0]
        record = self.parts[part][index]
        number = self._first_image[part] + record.get("image_number", index)
        return {**record, "image_number": number, "part": self.names[part]}


class Mismatched:
    """A source, a share of whose records have the captions of another: web-like noise.

    Which ones, and whose, depends on the source's length and the share alone, so a run sees the
    same wrong pair every time it comes by.

    Args:
      source: records with `captions`.
      share: of records, 0..1.
    """

    def __init__(self, source: Any, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"config.data.mismatched is {share}; it is a share, 0 to 1.")
        order = np.random.default_rng(0).permutation(len(source))
        count = round(share * len(source))
        self._source = source
        self._captions_of = dict(
            zip(order[:count].tolist(), np.roll(order, 1)[:count].tolist(), strict=True)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        if index not in self._captions_of:
            return record
        return {**record, "captions": facts(self._source, self._captions_of[index])["captions"]}

    def __getattr__(self, name: str) -> Any:  # all else is the source's
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)


def identity(source: Any) -> dict[str, Any]:
    """What decides which records a source has, for a run to find them the same when it goes on.

    Folders are no part of it: data may move.
    """
    if isinstance(source, Mixture):
        parts = zip(source.names, source.parts, source.weights, strict=True)
        return {name: {**identity(part), "weight": weight} for name, part, weight in parts}
    if hasattr(source, "identity"):
        return dict(source.identity())
    found = {"records": len(source)}
    return {**found, "digest": source.digest()} if hasattr(source, "digest") else found


def facts(source: Any, index: int) -> dict[str, Any]:
    """A record without its image, which is not read where that can be avoided.

    Raises:
      RecordError: the record cannot be read.
    """
    record = source.row(index) if hasattr(source, "row") else source[index]
    return {key: value for key, value in record.items() if key != "image"}


def place(source: Any, index: int) -> str:
    """A record's place, for reports."""
    try:
        return source.where(index) if hasattr(source, "where") else f"record {index}"
    except RecordError as error:
        return error.where or f"record {index}"


class TfdsSource:
    """A split of a prepared TFDS folder (ArrayRecord); images stay encoded, text becomes `str`.

    A remote folder is copied into the cache first (see `files.local_copy`).
    """

    def __init__(self, folder: str | Path, split: str):
        import tensorflow_datasets as tfds  # needs no TensorFlow for ArrayRecord

        if not files.is_local(str(folder)):
            folder = files.local_copy(str(folder))
        self.name = f"{folder} {split}"
        self.by_split = True
        there = _prepared_folders(str(folder))
        if not there:
            if folders.is_saved(str(folder)):
                raise ValueError(
                    f"{folder} was saved by Hugging Face's datasets; read it with "
                    "data.source=files, or blip2 prepare --source=files."
                )
            raise ValueError(
                f"No prepared data in {folder}. Make it with: "
                f"blip2 prepare --source=digits --out={folder} (the embedded world), or from "
                "your own with --source=files."
            )
        builder = tfds.builder_from_directory(there[0])
        if split not in builder.info.splits:
            raise ValueError(
                f"No split {split!r} in {folder}; there are {', '.join(builder.info.splits)}."
            )
        self._records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        # Numbers of images go up to what it says, those skipped included.
        record = Path(folder) / PREPARED
        again = f"Run the blip2 prepare --out={folder} that made it again."
        known = atomic.read_json(record, again) if record.is_file() else {}
        known = known.get("splits", {}).get(split, {})
        self.image_numbers = known.get("image_numbers", len(self._records))
        self._files = [str(path) for path in builder.info.splits[split].filepaths]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        try:
            record = self._records[index]
        except Exception as error:  # the readers' errors have no common class
            raise RecordError("cannot be read", f"{self.where(index)}: {error}"[:300]) from error
        return _as_text(record)

    def digest(self) -> str:
        """Of the split's files."""
        return digest.of_files(self._files)

    def where(self, index: int) -> str:
        """Folder, split and number of a record."""
        return f"{self.name}[{index}]"


def _as_text(record: dict[str, Any]) -> dict[str, Any]:
    """bytes -> str everywhere but in `image`; TFDS's dict of lists -> list of dicts."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if key == "image":
            out[key] = value
        elif key == "extra":  # what `blip2 prepare` keeps beside the captions
            out |= json.loads(_decode(value) or "{}")
        elif isinstance(value, dict):
            columns = {name: [_decode(v) for v in values] for name, values in value.items()}
            rows = zip(*columns.values(), strict=True)
            out[key] = [dict(zip(columns, row, strict=True)) for row in rows]
        elif isinstance(value, (list, tuple)) or getattr(value, "ndim", None):
            out[key] = [_decode(v) for v in value]
        else:
            out[key] = _decode(value)
    return out


def _decode(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
