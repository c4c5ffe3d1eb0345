"""Lines of JSON that a long job appends as it goes, and reads when it is started again.

The first line says what was asked for. A file that answers another request is refused, so that
results of two settings never mix; a last line that a kill cut off is dropped.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2_jax.runtime import atomic
from blip2_jax.runtime.compare import differences

HEAD = b'{"request": '  # what every journal begins with


def read(path: Path, request: Mapping[str, Any], command: str) -> list[dict[str, Any]]:
    """The lines of a journal without its first; a line that was cut off is removed from the file.

    Args:
      path: the file; there may be none.
      request: what is asked for now.
      command: what writes such files, for messages.

    Raises:
      ValueError: the file answers another request, or is something else.
    """
    if not path.exists() or path.is_file() and not path.stat().st_size:
        return []
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} was not written by {command}; name another.") from error
    kept = whole[: whole.rfind(b"\n") + 1]
    if not kept and HEAD.startswith(whole[: len(HEAD)]):  # its first line was cut
        path.unlink()
        return []
    documents: list[dict[str, Any]] = []
    try:
        for line in kept.split(b"\n")[:-1] or [whole]:
            documents.append(json.loads(line))
        first, *records = documents
        before = first["request"]
    except (ValueError, KeyError, TypeError) as error:
        if kept.startswith(HEAD) and documents:
            raise ValueError(
                f"{path}, line {len(documents) + 1} is damaged ({error}). Remove that line, whose "
                "images are then done again, or the file."
            ) from error
        raise ValueError(f"{path} was not written by {command}; name another.") from error
    now = json.loads(json.dumps(request))
    if before != now:
        lines = differences("request", before, now, ignored=())
        raise ValueError(
            f"{path} was written by another request; name another file, or remove it:\n"
            + "\n".join(lines)
        )
    if kept != whole:
        atomic.write_bytes(path, kept)
    return records


class Journal:
    """A journal, open for more lines.

    Args:
      path: the file; its folder is made.
      request: what its first line says, if it is new.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")
        if not self._file.tell():
            self.write([{"request": request}])

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines; they are with the operating system when this returns."""
        self._file.write(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        )
        self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
