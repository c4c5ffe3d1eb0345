"""Tar archives of image-text pairs (webdataset, img2dataset) with random access.

Each archive is scanned once; what is found is kept in a small index, 32 bytes a record, that is
mapped into memory and shared by all processes. From there on a record is one read at a known
place, so shuffling is global and resuming exact. Nothing is ever extracted.

    00000.tar   KEY.jpg  KEY.txt  KEY.json  KEY2.jpg ...     in any order
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from blip2_jax.data import fields, files, folders, lists
from blip2_jax.data.columns import Columns
from blip2_jax.data.containers import IMAGE_SUFFIXES
from blip2_jax.data.faults import RecordError, Skipped
from blip2_jax.data.source import Record, Source
from blip2_jax.runtime import digest
from blip2_jax.runtime.watchdog import alive

NOTE = ".idx.json"  # what an index has beside it
PARTS = ("image", "text", "meta")  # of a record
PART_OF = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(folders.TEXTS, "text"),
    "json": "meta",
}
COLUMNS = Columns()
BLOCK = 512  # bytes; headers and contents of a tar begin at multiples of it
MAX_BETWEEN = 1 << 18  # bytes of other members that are read along rather than stepped over
FORMAT = 3  # of the index; another number here makes all of them anew
INDEX = np.dtype(
    [
        ("image", "<u4"), ("image_size", "<u4"),  # block where the content begins, bytes of it
        ("text", "<u4"), ("text_size", "<u4"),  # size 0: there is none
        ("meta", "<u4"), ("meta_size", "<u4"),
        ("key", "<u8"),  # hash of the key
    ]
)  # fmt: skip


# ------------------------------------------------------------------------------------- scanning


class Member(NamedTuple):
    """A regular file in a tar: where its content begins, in bytes, and how long it is."""

    name: str
    offset: int
    size: int


def scan(file: Any, size: int) -> Iterator[Member | RecordError]:
    """The members of an open tar, without reading their contents.

    Understands ustar, GNU long names and base-256 sizes, and pax headers. What is damaged comes as
    a RecordError; nothing that follows a damaged header can be found.
    """
    at, name, long_size = 0, None, None
    if not size:
        yield RecordError("empty file")
        return
    seek, read = file.seek, file.read
    while True:
        seek(at)
        header = read(BLOCK)
        if len(header) < BLOCK:
            yield RecordError("archive cut short")
            return
        if header == bytes(BLOCK):
            return
        length = _number(header[124:136])
        if length is None or (header[257:262] != b"ustar" and not _is_old_header(header)):
            yield RecordError("damaged archive")
            return
        kind = header[156:157]
        start = at + BLOCK
        at = start + -(-length // BLOCK) * BLOCK
        if kind in (b"L", b"x"):  # the name, or name and size, of the member that follows
            if length > 1 << 20:
                yield RecordError("damaged archive")
                return
            text = read(length)
            if kind == b"L":
                name = text.rstrip(b"\0").decode(errors="replace")
            else:
                name, long_size = _pax(text, name)
            continue
        if long_size is not None:
            length, at = long_size, start + -(-long_size // BLOCK) * BLOCK
        if kind in (b"0", b"\0"):
            if start + length > size:
                yield RecordError("archive cut short", name or _name(header))
                return
            yield Member(name or _name(header), start, length)
        name, long_size = None, None
        if at == size:
            yield RecordError("archive cut short")  # no end mark
            return


def _number(field: bytes) -> int | None:
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        if field[0] & 0x80:  # GNU's base 256, for sizes from 8 GiB
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return None


def _is_old_header(header: bytes) -> bool:
    """Whether the checksum is right, which is all that the format before ustar has."""
    return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0].decode(errors="replace")
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0].decode(errors="replace") + "/" + name
    return name


def _pax(text: bytes, name: str | None) -> tuple[str | None, int | None]:
    """`path` and `size` of a pax header; its lines are "LENGTH KEY=VALUE"."""
    size = None
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = value.decode(errors="replace")
        elif key == b"size" and value.isdigit():
            size = int(value)
        text = text[int(length) :]
    return name, size


def index(file: Any, size: int, where: str) -> tuple[np.ndarray, Skipped]:
    """The records of an open tar, and what in it is none.

    Args:
      file: seekable, in bytes.
      size: of the file.
      where: its path, for reports.
    """
    faults = Skipped()
    groups: dict[str, list[Parts]] = {}
    for member in scan(file, size):
        alive()
        if isinstance(member, RecordError):
            faults.add(member.reason, f"{where}:{member.where}" if member.where else where)
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem:  # .DS_Store and the like
            continue
        key = f"{folder}/{stem}" if folder else stem
        middle, _, suffix = suffix.rpartition(".")
        part = (middle, PART_OF.get(suffix.lower(), suffix))
        of_key = groups.setdefault(key, [{}])
        free = next((parts for parts in of_key if part not in parts), None)
        if free is None:  # the key occurs again
            of_key.append(free := {})
        free[part] = (member.offset // BLOCK, member.size)
    entries: list[tuple[int, ...]] = []
    for key, of_key in groups.items():
        first, *again = of_key
        for name, parts in _records(key, first, faults, where):
            fault = _fault(parts)
            if fault:
                faults.add(fault, f"{where}:{name}")
                continue
            flat = [n for part in PARTS for n in parts.get(part, (0, 0))]
            entries.append((*flat, int(digest.of_text(name), 16)))
        for _ in again:
            faults.add("duplicated key", f"{where}:{key}")
    entries.sort()
    faults.total = len(entries) + faults.count
    return np.array(entries, INDEX), faults


Parts = dict[tuple[str, str], tuple[int, int]]  # middle of a name, kind -> block, bytes


def _records(
    key: str, parts: Parts, faults: Skipped, where: str
) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The records in the members of one key, by name.

    k.jpg k.txt k.json             one
    k.input.jpg k.txt              one, whose image has a longer suffix
    k.v1.jpg k.v1.txt k.v2.jpg ... one a middle part: dots belong to the name
    k.jpg k.seg.png k.txt          one; the image that is called like the key
    """
    images = [middle for middle, part in parts if part == "image"]
    texts = {middle for middle, part in parts if part in ("text", "meta")}
    if "" in images:
        wanted = ["", *(middle for middle in images if middle and middle in texts)]
    else:
        wanted = images
    if not wanted:
        other = sorted({part for _, part in parts if part.isalnum() and part not in PARTS})[:3]
        kinds = f" (members end in .{', .'.join(other)})" if other else ""
        faults.add(f"no image{kinds}", f"{where}:{key}")
    elif len(wanted) > 1 and not set(wanted) & texts:
        names = ", ".join(f"{key}.{middle}".rstrip(".") for middle in sorted(wanted))
        faults.add("several images of one key", f"{where}:{names}")
    else:
        for middle in wanted:
            members = {}
            for part in PARTS:
                middles = [m for m, kind in parts if kind == part]
                if middle in middles:
                    members[part] = parts[middle, part]
                elif len(wanted) == 1 and (len(middles) == 1 or "" in middles):
                    members[part] = parts["" if "" in middles else middles[0], part]
            yield f"{key}.{middle}".rstrip("."), members


def _fault(parts: dict[str, tuple[int, int]]) -> str:
    """What is wrong with the members of a record; "" if nothing is."""
    if not parts["image"][1]:
        return "empty file"
    if max(size for _, size in parts.values()) > lists.MAX_BYTES:
        return f"file of more than {lists.MAX_BYTES} bytes"
    if not parts.get("text", (0, 0))[1] and not parts.get("meta", (0, 0))[1]:
        return "no caption"
    return ""


# ---------------------------------------------------------------------------------------- source


def _identity(path: str) -> dict[str, Any]:
    """What tells a changed archive from the one that was indexed."""
    if files.is_local(path):
        stat = os.stat(path)
        return {"format": FORMAT, "size": stat.st_size, "changed": stat.st_mtime_ns}
    fs, inner = files.filesystem(path)
    info = fs.info(inner)
    changed = info.get("etag") or info.get("mtime") or info.get("created")
    return {"format": FORMAT, "size": info["size"], "changed": str(changed)}


def _index_path(path: str, folder: str) -> Path:
    """Beside a local archive, or in `folder`."""
    if folder:
        return Path(folder) / f"{digest.of_text(os.path.abspath(path))}.idx"
    if files.is_local(path) and os.access(os.path.dirname(path) or ".", os.W_OK):
        return Path(f"{path}.idx")
    return files.cache_folder("tars") / f"{digest.of_text(path)}.idx"


class Index(NamedTuple):
    """The index of an archive.

    Attributes:
      path: its file.
      records: their number.
      faults: what was left out (`Skipped.to_json`).
      digest: of the keys and sizes of all members that are used.
    """

    path: Path
    records: int
    faults: dict[str, Any]
    digest: str


def _load(target: Path, identity: dict[str, Any]) -> Index | None:
    """What there is; None where it is of another archive, or damaged."""
    try:
        note = json.loads(Path(f"{target}.json").read_text())
        if {key: note[key] for key in identity} != identity:
            return None
        index = Index(target, note["records"], note["faults"], note["digest"])
        entries = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None
    return index if entries.shape == (index.records,) and entries.dtype == INDEX else None


def _digest(entries: np.ndarray) -> str:
    columns = [entries[name].tobytes() for name in ("image_size", "text_size", "meta_size", "key")]
    return digest.of_bytes(*columns)


def ensure_index(path: str, folder: str = "") -> Index:
    """The index of an archive, made where there is none or the archive has changed.

    Raises:
      RecordError: the archive cannot be read, or is not there and was never indexed.
    """
    target = _index_path(path, folder)
    try:
        identity = _identity(path)
    except FileNotFoundError as error:
        # An archive that vanished keeps its numbers: a run that goes on without it misses its
        # records, and finds all others where they were.
        known = _load(target, {"format": FORMAT})
        if known is None:
            raise RecordError("no such file", path) from error
        return known
    try:
        made = _load(target, identity)
        if made is None:
            if files.is_local(path):
                with open(path, "rb", buffering=1 << 16) as file:
                    entries, faults = index(file, identity["size"], path)
            else:
                fs, inner = files.filesystem(path)
                with fs.open(inner, "rb", block_size=4 << 20, cache_type="readahead") as file:
                    entries, faults = index(file, identity["size"], path)
            made = Index(target, len(entries), faults.to_json(), _digest(entries))
            buffer = io.BytesIO()
            np.save(buffer, entries)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write(str(target), buffer.getvalue())  # before the note that says it is there
            note = {**identity, "records": made.records, "faults": made.faults}
            note["digest"] = made.digest
            files.write(f"{target}.json", json.dumps(note).encode())
    except OSError as error:
        raise RecordError(files.reason(error), path) from error
    return made


class TarSource(Source):
    """Records of tar archives.

    Args:
      paths: the archives, local or remote.
      index_folder: where indexes are kept; "": beside local archives where that can be written,
        else in the cache folder.
      threads: remote archives that are scanned at the same time; the time of local ones goes into
        Python, which more threads would only make slower.

    Attributes:
      faults: what was left out already, by reason.
    """

    def __init__(self, paths: Sequence[str], *, index_folder: str = "", threads: int = 8):
        self.paths: list[str] = []
        self.faults, self.notes = Skipped(), Skipped()
        self._indexes: list[Path] = []
        self._digests: list[str] = []
        counts: list[int] = []

        def prepare(path: str) -> Index | RecordError:
            try:
                return ensure_index(path, index_folder)
            except RecordError as error:
                return error

        local = all(map(files.is_local, paths))
        with ThreadPoolExecutor(1 if local else threads) as pool:
            results = pool.map(prepare, paths)
            bar = tqdm(results, total=len(paths), desc="tar indexes", leave=False, delay=2)
            for path, result in zip(paths, bar, strict=True):
                if isinstance(result, RecordError):
                    self.faults.add(result.reason, result.where)
                    continue
                self.faults.merge(result.faults)
                if result.records:
                    self.paths.append(path)
                    self._indexes.append(result.path)
                    self._digests.append(result.digest)
                    counts.append(result.records)
        if not counts:
            raise ValueError(
                f"{paths[0]}{', ...' * (len(paths) > 1)}: not one record that can be used.\n"
                + self.faults.text()
            )
        self._ends = np.cumsum(counts)
        self._map()
        self._ranges = files.Ranges()
        self.faults.total = len(self) + self.faults.count

    def _map(self) -> None:
        self._maps = [np.load(path, mmap_mode="r", allow_pickle=False) for path in self._indexes]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # a worker process maps the same files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, position: int) -> tuple[str, np.void]:
        shard = int(np.searchsorted(self._ends, position, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self.paths[shard], self._maps[shard][position - first]

    def identity(self) -> dict[str, Any]:
        """See `Source`; with a digest of the keys and sizes of all members that are used."""
        return {"records": len(self), "digest": digest.of_text(" ".join(self._digests))}

    def keys(self) -> np.ndarray:
        """The hash of each record's key, uint64[N]."""
        return np.concatenate([entries["key"] for entries in self._maps])

    def where(self, index: int) -> str:
        """Archive and member of a record's image."""
        path, row = self._find(index)
        try:
            header = self._ranges.read(path, (int(row["image"]) - 1) * BLOCK, BLOCK)
        except RecordError:
            return path
        return f"{path}:{_name(header)}"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")  # which ends a `for` loop
        path, row = self._find(index)
        parts = {name: (int(row[name]) * BLOCK, int(row[f"{name}_size"])) for name in PARTS}
        parts = {name: part for name, part in parts.items() if part[1]}
        header = (parts["image"][0] - BLOCK, BLOCK)
        spans = {**parts, "header": header}
        first = min(start for start, _ in spans.values())
        last = max(start + size for start, size in spans.values())
        if last - first < sum(size for _, size in spans.values()) + MAX_BETWEEN:
            data = self._ranges.read(path, first, last - first)  # one read for all of them
            get = {name: data[start - first :][:size] for name, (start, size) in spans.items()}
        else:
            get = {name: self._ranges.read(path, *span) for name, span in spans.items()}
        name = _name(get["header"])
        return _record(get, name, f"{path}:{name}")


def _record(parts: dict[str, bytes], name: str, where: str) -> dict[str, Any]:
    """Members' contents as a record."""
    try:
        row = fields.pair(parts.get("meta", b""), parts.get("text", b""))
        key = row.get("key", name.rpartition("/")[2].rpartition(".")[0])
        parsed = fields.read({**row, "image": name, "image_id": key}, COLUMNS)
    except RecordError as error:
        raise RecordError(error.reason, error.where or where) from error
    return {**parsed.record, "image": parts["image"]}
