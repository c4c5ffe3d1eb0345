"""Files, local or remote: every path may be one that fsspec knows (`gs://...`, `s3://...`).

Remote stores need their fsspec driver: `pip install 'blip2_jax[gcs]'` for `gs://`.
"""

import glob
import os
import re
import threading
from pathlib import Path
from typing import Any

import fsspec

from blip2_jax.data.faults import RecordError
from blip2_jax.runtime import atomic, digest
from blip2_jax.runtime.watchdog import alive

MAX_OPEN = 256  # files that are kept open; below the usual limit of 1,024 for a process
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a path, and the path as it wants it.

    Raises:
      ValueError: there is no driver for the path's protocol; says what to install.
    """
    if is_local(path):  # as it is: "::" and the like mean nothing
        fs = fsspec.filesystem("file")
        return fs, os.path.abspath(os.path.expanduser(path))
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = "blip2_jax[gcs]" if path.startswith(("gs://", "gcs://")) else "its fsspec driver"
        raise ValueError(f"{path}: pip install '{extra}' ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_local(path: str) -> bool:
    """Whether a path names a file of this machine, a mounted one included."""
    return "://" not in path


def join(folder: str, name: str) -> str:
    """The path of `name` in a folder, local or remote; "" is where we are."""
    return f"{folder.rstrip('/')}/{name}" if folder else name


def inside(path: str, folder: str) -> bool:
    """Whether a path is one of a folder; "" is where we are."""
    if is_local(path) != is_local(folder):
        return False
    if is_local(path):
        path, folder = os.path.abspath(path), os.path.abspath(folder)
    return path.startswith(folder.rstrip("/") + "/") and ".." not in path.split("/")


def exists(path: str) -> bool:
    """Whether there is a file or folder of exactly this name."""
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def _literal(fs: Any, path: str) -> tuple[str, str]:
    """A pattern in two: folders that are there under their own names, and the rest."""
    folder, _, rest = path.rpartition("/")
    while glob.has_magic(folder.replace("{", "[")) and not fs.isdir(folder):
        folder, _, part = folder.rpartition("/")
        rest = f"{part}/{rest}"
    return folder, rest


def matches(pattern: str) -> list[str]:
    """The files that a pattern (`*`, `?`, `[...]`) finds, sorted.

    Folders that are there under the pattern's own name are taken as they are: a `[` in them is no
    pattern.
    """
    fs, path = filesystem(pattern)
    unstrip = (lambda p: p) if is_local(pattern) else fs.unstrip_protocol
    folder, rest = _literal(fs, path)
    return sorted(unstrip(match) for match in fs.glob(f"{glob.escape(folder)}/{rest}"))


def below(folder: str) -> list[str]:
    """All files in a folder and its subfolders, as paths that begin in it, sorted."""
    fs, root = filesystem(folder)
    if not is_local(folder):
        paths = fs.find(root) if fs.isdir(root) else []
        return sorted(path.removeprefix(root).lstrip("/") for path in paths)
    paths, seen = [], set()
    for inside, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(inside) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(inside))
        paths += [os.path.relpath(os.path.join(inside, name), root) for name in names]
    return sorted(paths)


def with_split(pattern: str, split: str) -> str:
    """A pattern with `{split}` in it filled in, where no folder or file is called that."""
    parts = pattern.split("/")
    for n, part in enumerate(parts):
        if "{split}" in part and not exists("/".join(parts[: n + 1])):
            parts[n] = part.replace("{split}", split)
    return "/".join(parts)


def expand(pattern: str) -> list[str]:
    """The files that a path stands for, sorted: a file, webdataset's braces
    (`{00000..00331}.tar`), or a pattern (`*`). What is there under the whole name is that.

    Raises:
      ValueError: there are none.
    """
    fs, path = filesystem(pattern)
    if fs.isfile(path):
        return [pattern]
    braces = _BRACES.search(_literal(fs, path)[1])
    if braces:
        first, last = braces.groups()
        numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
        head, tail = pattern.rsplit(braces[0], 1)
        # Those that are missing are counted as lost by whoever reads them.
        return [f"{head}{number}{tail}" for number in numbers]
    paths = matches(pattern)
    if not paths:
        raise ValueError(f"{pattern}: no such file or folder.")
    return paths


def read(path: str, max_bytes: int | None = None) -> bytes:
    """A whole file.

    Raises:
      RecordError: it is not there, is empty, or is larger than `max_bytes`.
    """
    try:
        if is_local(path):
            with open(path, "rb") as file:
                data = file.read() if max_bytes is None else file.read(max_bytes + 1)
        else:
            fs, inner = filesystem(path)
            data = fs.cat_file(inner, end=None if max_bytes is None else max_bytes + 1)
    except OSError as error:
        raise RecordError(reason(error), path) from error
    if not data:
        raise RecordError("empty file", path)
    if max_bytes is not None and len(data) > max_bytes:
        raise RecordError(f"file of more than {max_bytes} bytes", path)
    return data


def reason(error: OSError) -> str:
    """What went wrong, in the same words for the same causes."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"cannot be read ({error.strerror or type(error).__name__})"


def write(path: str, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    fs, inner = filesystem(path)
    if not is_local(path):  # object stores show a file when it is complete
        fs.pipe_file(inner, data)
        return
    atomic.write_bytes(Path(inner), data)


def cache_folder(name: str) -> Path:
    """A folder for what can be made again; $BLIP2_CACHE or ~/.cache/blip2_jax."""
    root = os.environ.get("BLIP2_CACHE") or Path.home() / ".cache" / "blip2_jax"
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_copy(folder: str) -> str:
    """A remote folder's copy in the cache, fetched file by file where it is not there yet.

    ArrayRecord's reader opens local files only. A folder that is mounted (Cloud Storage FUSE) is
    a local path and needs none of this.
    """
    from tqdm import tqdm

    fs, root = filesystem(folder)
    target = cache_folder("data") / digest.of_text(folder)
    infos = fs.find(root, detail=True)
    if not infos:
        raise ValueError(f"{folder}: nothing there.")
    for path, info in tqdm(sorted(infos.items()), desc=f"fetching {folder}", unit=" files"):
        alive()
        local = target / path.removeprefix(root).lstrip("/")
        if local.is_file() and local.stat().st_size == info["size"]:
            continue
        with atomic.replacing(local) as draft:
            fs.get_file(path, str(draft))
    return str(target)


class Ranges:
    """Reads parts of files, from any number of threads; travels to worker processes."""

    def __init__(self) -> None:
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        del state  # open files and locks stay where they are
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on.

        Raises:
          RecordError: the file is not there any more, or ends before.
        """
        try:
            if is_local(path):
                data = self._pread(path, start, size)
            else:
                fs, inner = filesystem(path)
                data = fs.cat_file(inner, start=start, end=start + size)
        except OSError as error:
            raise RecordError(reason(error), path) from error
        if len(data) < size:
            raise RecordError("archive cut short", path)
        return data

    def _pread(self, path: str, start: int, size: int) -> bytes:
        file = self._open.get(path)
        if file is not None:
            return os.pread(file, size, start)
        file = os.open(path, os.O_RDONLY)
        with self._lock:
            keep = len(self._open) < MAX_OPEN and self._open.setdefault(path, file) == file
        try:
            return os.pread(file, size, start)
        finally:
            if not keep:
                os.close(file)

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            os.close(file)
