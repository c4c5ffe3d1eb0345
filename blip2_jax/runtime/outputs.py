"""Outputs of commands: nothing is overwritten or deleted that was not written here.

What was written is noted in a file beside it (`RECEIPT`): each file's size and, of small ones, its
digest. What is not in the note, or was changed since, is the user's and stays.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blip2_jax.runtime import atomic

RECEIPT = "written_by_blip2_jax.json"
SMALL = 1 << 20  # bytes of a file whose content is looked at, not only its size
EXCHANGE = 2  # Linux's RENAME_EXCHANGE


class Taken(ValueError):
    """A destination that holds something that was not written here; the message says what to do."""


def _signature(path: Path) -> dict[str, Any]:
    """A file's size and, of a small one, its digest."""
    size = path.stat().st_size
    if size > SMALL:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _noted(folder: Path) -> dict[str, list[Any]]:
    """Name -> signatures that a file may have; a file that is being replaced has two."""
    try:
        document = json.loads((folder / RECEIPT).read_text())
        return dict(document["files"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise Taken(
            f"{folder / RECEIPT} is damaged ({error}); remove it, or name another."
        ) from error


def _note(folder: Path, files: Mapping[str, list[Any]]) -> None:
    atomic.write_json(folder / RECEIPT, {"files": files}, indent=1)


def _foreign(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of some files of a folder that are there and not as they were written here."""
    noted = _noted(folder)
    return [
        name
        for name in names
        if (path := folder / name).is_symlink()
        or path.exists()
        and not (path.is_file() and _signature(path) in noted.get(name, []))
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ------------------------------------------------------------------------------- whole folders


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuses to write a folder over anything but what was written here.

    Args:
      folder: need not be there.
      overwrite: whether what was written here may be replaced.

    Raises:
      Taken: it holds other files, or may not be replaced; it is a file.
    """
    folder = folder.resolve()
    if not folder.exists():
        return
    if not folder.is_dir():
        raise Taken(f"{folder} is a file, and a folder is to be written; name another path.")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise Taken(f"{folder} is where this command runs; name a new folder inside it.")
    there = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    ]
    foreign = [name for name in _foreign(folder, there) if name != RECEIPT]
    if foreign:
        raise Taken(
            f"{folder} holds what this command did not write ({_some(foreign)}); name a new "
            "folder, or move that away."
        )
    if there and not overwrite:
        raise Taken(
            f"{folder} holds what was written before; name a new folder, or replace it with "
            "--overwrite."
        )


@contextlib.contextmanager
def replacing_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A draft that replaces a folder in one step when all went well, and is removed otherwise.

    Killed at any moment, the folder is what it was, or what it was to be.

    Args:
      folder: see `check_folder`.
      overwrite: whether what was written here may be replaced.

    Raises:
      Taken: see `check_folder`.
    """
    check_folder(folder, overwrite=overwrite)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(folder)
    draft.mkdir()
    try:
        _note(draft, {})
        yield draft
        files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
        names = [(str(path.relative_to(draft)), path) for path in files if path.name != RECEIPT]
        _note(draft, {name: [_signature(path)] for name, path in names})
        check_folder(folder, overwrite=overwrite)  # again, because the block may have taken long
        _swap(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(target: Path) -> Path:
    """A name beside a target for what is not whole yet; what killed processes left there goes."""
    ending = f"@{socket.gethostname()}.partial"
    start = f".{target.name}."
    for left in target.parent.glob(f"{glob.escape(start)}*{glob.escape(ending)}"):
        process = left.name.removeprefix(start).removesuffix(ending)
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return target.with_name(f"{start}{os.getpid()}{ending}")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(draft: Path, folder: Path) -> None:
    """Puts a draft in a folder's place; what was there is under the draft's name afterwards."""
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(draft, folder)  # onto an empty folder too
        return
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(draft), os.fsencode(folder))
    if hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        if libc.renameat2(here, names[0], here, names[1], EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    # Where the file system has no exchange, the old one is found beside for a moment.
    old = draft.with_name(f"{draft.name}.old")
    os.rename(folder, old)
    os.rename(draft, folder)
    os.rename(old, draft)


# ------------------------------------------------------------------------------- single files


class Own:
    """Files in a folder that holds other things too (a workdir), each of which is replaced whole.

    Args:
      folder: it is there.
      command: what writes them, for messages.
    """

    def __init__(self, folder: Path, command: str):
        self.folder, self.command = folder, command

    def check(self, *names: str) -> None:
        """Refuses to go on if one of these files is there and was not written here.

        Raises:
          Taken: naming them.
        """
        foreign = _foreign(self.folder, names)
        if foreign:
            raise Taken(
                f"{self.folder} has files that {self.command} would write, and did not "
                f"({_some(foreign)}); move them away, or name another folder."
            )

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A draft that takes the place of a file, by its path inside the folder.

        Raises:
          Taken: what is there was not written here.
        """
        self.check(name)
        with atomic.replacing(self.folder / name) as draft:
            yield draft
            noted = _noted(self.folder)
            # Before the new one stands there: a kill in between leaves the old one known as well.
            noted[name] = [_signature(draft), *noted.get(name, [])[:1]]
            _note(self.folder, noted)
