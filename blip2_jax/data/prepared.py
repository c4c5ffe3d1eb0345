"""Prepared data: a folder that `blip2 prepare` or TFDS wrote, and the note that it is complete."""

import json
from pathlib import Path
from typing import Any

from blip2_jax.data import files, folders
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.source import Record, Source
from blip2_jax.runtime import atomic, digest

PREPARED = "prepared.json"


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A note of `blip2 prepare`; {} where there is none.

    Raises:
      ValueError: it is damaged.
    """
    path = files.join(folder, name)
    try:
        return dict(json.loads(files.read(path)))
    except RecordError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove the folder and prepare it again, or name another "
            "--out."
        ) from error


def is_prepared(folder: str) -> bool:
    """Whether `blip2 prepare` or TFDS wrote this folder."""
    return bool(_prepared_folders(folder))


def _prepared_folders(folder: str) -> list[str]:
    """Folders of data sets of TFDS; Hugging Face's `datasets` has a dataset_info.json too."""
    paths = set(files.below(folder))
    notes = [path for path in paths if path.rpartition("/")[2] == "dataset_info.json"]
    parents = sorted(path.removesuffix("dataset_info.json") for path in notes)
    return [files.join(folder, p).rstrip("/") for p in parents if f"{p}features.json" in paths]


class TfdsSource(Source):
    """A split of a prepared TFDS folder (ArrayRecord); images stay encoded, text becomes `str`.

    A remote folder is copied into the cache first (see `files.local_copy`).
    """

    def __init__(self, folder: str | Path, split: str):
        import tensorflow_datasets as tfds  # needs no TensorFlow for ArrayRecord

        if not files.is_local(str(folder)):
            folder = files.local_copy(str(folder))
        self.name = f"{folder} {split}"
        self.by_split = True
        self.faults, self.notes = Skipped(), Skipped()
        prepared_folders = _prepared_folders(str(folder))
        if not prepared_folders:
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
        builder = tfds.builder_from_directory(prepared_folders[0])
        if split not in builder.info.splits:
            raise ValueError(
                f"No split {split!r} in {folder}; there are {', '.join(builder.info.splits)}."
            )
        self._records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        # Numbers of images go up to what it says, those skipped included.
        note = Path(folder) / PREPARED
        again = f"Run the blip2 prepare --out={folder} that made it again."
        known = atomic.read_json(note, again) if note.is_file() else {}
        known = known.get("splits", {}).get(split, {})
        self._image_numbers = known.get("image_numbers", len(self._records))
        self._files = [str(path) for path in builder.info.splits[split].filepaths]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        try:
            record = self._records[index]
        except Exception as error:  # the readers' errors have no common class
            raise RecordError("cannot be read", f"{self.where(index)}: {error}"[:300]) from error
        return _as_text(record)

    @property
    def image_numbers(self) -> int:
        """See `Source`."""
        return int(self._image_numbers)

    def where(self, index: int) -> str:
        """See `Source`."""
        return f"{self.name}[{index}]"

    def identity(self) -> dict[str, Any]:
        """See `Source`; with a digest of the split's files."""
        return {"records": len(self), "digest": digest.of_files(self._files)}


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
            entries = zip(*columns.values(), strict=True)
            out[key] = [dict(zip(columns, entry, strict=True)) for entry in entries]
        elif isinstance(value, (list, tuple)) or getattr(value, "ndim", None):
            out[key] = [_decode(v) for v in value]
        else:
            out[key] = _decode(value)
    return out


def _decode(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
