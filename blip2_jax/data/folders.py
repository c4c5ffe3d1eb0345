"""What a folder holds: archives, lists, a saved data set, or images beside texts."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from blip2_jax.data import containers, fields, files
from blip2_jax.data.containers import IMAGE_SUFFIXES, Line
from blip2_jax.data.faults import RecordError

TEXTS = ("txt", "caption", "text", "cap")  # suffixes of files that hold a caption
ARCHIVE = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
NO_LISTS = ("_stats.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Splits that are called differently in different places, and what "train" of Karpathy's takes in.
SPLITS = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}
TRAIN = ("train", "restval")
_SPLIT = re.compile(
    rf"(?:^|[-_.])({'|'.join((*SPLITS, *SPLITS.values(), 'restval'))})\d*(?=$|[-_.])"
)


class FolderContents(NamedTuple):
    """What a path stands for.

    Attributes:
      archives: tars, or the notes beside indexes of those that are gone.
      lists: files of rows.
      pairs: folders of images beside texts.
      by_split: whether the folder holds other splits too, which are not among these.
    """

    archives: list[str]
    lists: list[str]
    pairs: list[str]
    by_split: bool = False


def same_split(wanted: str, there: Iterable[str]) -> set[str]:
    """Those of the splits that are there that `wanted` stands for: by its own name, else by
    another for the same ("validation" for "val")."""
    there, wanted = set(there), wanted.strip().lower()
    names = TRAIN if wanted == "train" else (wanted,)
    exact = {split for split in there if split.lower() in names}
    usual = SPLITS.get(wanted, wanted)
    return exact or {split for split in there if SPLITS.get(split.lower(), split.lower()) == usual}


def contents(path: str, split: str, note: str) -> FolderContents:
    """What a file, folder or pattern stands for.

    Args:
      path: local or remote.
      split: which is wanted, where a folder holds several; "": all.
      note: what the names of notes beside tars end in.

    Raises:
      ValueError: nothing that can be read is there, or not this split.
    """
    fs, inner = files.filesystem(path)
    if not fs.isdir(inner):
        return _sorted_out(files.expand(path), note)
    saved = _saved(path, split)
    if saved is not None:
        return saved
    unstrip = (lambda p: p) if files.is_local(path) else fs.unstrip_protocol
    inside = sorted(unstrip(p) for p in fs.ls(inner, detail=False))
    archives = [p for p in inside if p.endswith((ARCHIVE, ARCHIVE + note))]
    if archives:
        return FolderContents(archives, [], [])
    if _has_pairs(inside):
        return FolderContents([], [], [path])
    lists = [
        p for p in inside if p.lower().endswith(containers.SUFFIXES) and not p.endswith(NO_LISTS)
    ]
    if lists:
        return _of_split(lists, split, path)
    packed = [p for p in inside if p.endswith(COMPRESSED)]
    if packed:
        raise ValueError(unpack(packed[0]))
    for folder in (p for p in inside if fs.isdir(files.filesystem(p)[1])):
        if folder.rstrip("/").endswith("/data"):  # a repository of the Hugging Face hub
            return contents(folder, split, note)
    if _has_pairs(files.below(path)):  # img2dataset's folders 00000, 00001, ...
        return FolderContents([], [], [path])
    raise ValueError(
        f"{path}: no tars, no lists ({', '.join(containers.SUFFIXES)}) and no images beside texts "
        "of the same name (a.jpg, a.txt) are in this folder."
    )


def _sorted_out(paths: list[str], note: str) -> FolderContents:
    packed = [p for p in paths if p.lower().endswith(COMPRESSED)]
    if packed:
        raise ValueError(unpack(packed[0]))
    archives = [p for p in paths if p.endswith((ARCHIVE, ARCHIVE + note))]
    return FolderContents(
        archives, [p for p in paths if p not in archives] if not archives else [], []
    )


def unpack(path: str) -> str:
    """How a compressed archive becomes one that can be read at any place."""
    return (
        f"{path} is compressed, and cannot be read from the middle. Make a plain tar of it: "
        f"gunzip (or bunzip2, unxz, unzstd) {path}; images in it are compressed already."
    )


def _of_split(lists: list[str], split: str, folder: str) -> FolderContents:
    """Of lists all of which have a split in their names, those of one."""
    names = {path: _SPLIT.search(path.rsplit("/", 1)[-1].lower()) for path in lists}
    there = {path: match[1] for path, match in names.items() if match}
    if not split or len(there) < len(lists) or len(set(there.values())) < 2:
        return FolderContents([], lists, [])
    wanted = same_split(split, there.values())
    if not wanted:
        raise ValueError(
            f"{folder} has no list of the split {split!r}; there are "
            f"{', '.join(sorted(set(there.values())))}."
        )
    return FolderContents([], [path for path in lists if there[path] in wanted], [], by_split=True)


# --------------------------------------------------------------------------------- `save_to_disk`


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` of Hugging Face's `datasets` wrote a folder."""
    return any(files.exists(files.join(folder, n)) for n in ("dataset_dict.json", "state.json"))


def _saved(folder: str, split: str) -> FolderContents | None:
    """The Arrow files of a saved data set; None if it is none."""
    several = files.join(folder, "dataset_dict.json")
    if files.exists(several):
        there = _json(several).get("splits") or []
        wanted = same_split(split, there) if split else set(there)
        if not wanted:
            raise ValueError(f"{folder}: no split {split!r}; there are {', '.join(there)}.")
        parts = [_saved(files.join(folder, name), "") for name in there if name in wanted]
        lists = [path for part in parts if part is not None for path in part.lists]
        return FolderContents([], lists, [], by_split=bool(split))
    if not files.exists(files.join(folder, "state.json")):
        return None
    state = _json(files.join(folder, "state.json"))
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} holds a selection of its rows (an old version of `datasets` wrote it). Load "
            "it there, call flatten_indices() and save_to_disk again."
        )
    names = [entry.get("filename") for entry in state.get("_data_files") or []]
    own = state.get("_split")
    if split and own and not same_split(split, [own]):
        raise ValueError(f"{folder}: no split {split!r}; there is {own}.")
    return FolderContents(
        [], [files.join(folder, name) for name in names], [], by_split=bool(split and own)
    )


def _json(path: str) -> dict[str, Any]:
    try:
        document = json.loads(files.read(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}


# ---------------------------------------------------------------------------- images beside texts


def _stem(path: str) -> tuple[str, str]:
    """A path without its suffix, and the suffix."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if dot and stem else (path, "")


def _has_pairs(paths: Iterable[str]) -> bool:
    """Whether an image stands beside a text, or a JSON object, of the same name."""
    images, texts = set(), set()
    for stem, suffix in map(_stem, paths):
        if suffix in IMAGE_SUFFIXES:
            images.add(stem)
        elif suffix in (*TEXTS, "json"):
            texts.add(stem)
    return bool(images & texts)


def pairs(folder: str) -> Iterator[Line]:
    """A row for every image in a folder and below, of what stands beside it.

    ```
    a.jpg a.txt        a.jpg a.json        a.jpg a.txt a.json
    ```
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for path in files.below(folder):
        stem, suffix = _stem(path)
        part = "image" if suffix in IMAGE_SUFFIXES else "text" if suffix in TEXTS else suffix
        if part in ("image", "text", "json"):
            groups.setdefault(stem, {}).setdefault(part, []).append(path)
    for stem, parts in groups.items():
        where = files.join(folder, parts.get("image", [stem])[0])
        if "image" not in parts and "text" not in parts:
            continue  # a JSON file of its own: statistics, ...
        try:
            if "image" not in parts:
                raise RecordError("no image")
            if len(parts["image"]) > 1:
                raise RecordError("several images of one name")
            meta, text = (
                files.read(files.join(folder, parts[part][0])) if part in parts else b""
                for part in ("json", "text")
            )
            yield Line(where, {**fields.pair(meta, text), "image": parts["image"][0]})
        except RecordError as error:
            yield Line(where, RecordError(error.reason, error.where or where))
