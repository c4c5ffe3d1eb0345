"""Files that are on disk whole or not at all, and what is read back of them.

A file is written under another name, brought to the disk, and then takes the place of the one
before it, in one step: a kill, a full disk or a power cut leaves the old file or the new one.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file of ours that is not as it was written: cut short by a crash, or changed since."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside `path`, whose folder is made, that takes its place when the block ends well.

    After an exception `path` is as it was, and the draft is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; its folder is made."""
    with replacing(path) as draft:
        draft.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) whole or not at all; its folder is made."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any, indent: int | None = 2) -> None:
    """Writes a JSON document, texts as they are, whole or not at all; its folder is made."""
    write_text(path, json.dumps(document, ensure_ascii=False, indent=indent) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: the file, which must be there.
      remedy: what to do if it is damaged, as a sentence.

    Raises:
      DamagedFile: it is cut short, empty, or something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise DamagedFile(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(document, dict):
        raise DamagedFile(f"{path} is damaged (it holds no JSON object). {remedy}")
    return document
