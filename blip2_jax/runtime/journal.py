"""Lines of JSON that a long job appends as it goes, and finds again when it is started anew.

The first line says what was asked for. A file that answers another request is refused, so that
results of two settings never mix; a last line that a kill cut off is dropped.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2_jax.runtime.compare import differences


def read(path: Path, request: Mapping[str, Any], command: str) -> list[dict[str, Any]]:
    """The lines of a journal without its first; a line that was cut off is removed from the file.

    Args:
      path: the file; there may be none.
      request: what is asked for now.
      command: what writes such files, for messages.

    Raises:
      ValueError: the file answers another request, or is something else.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    whole = path.read_text(encoding="utf-8")
    kept = whole[: whole.rfind("\n") + 1]
    try:
        # Not splitlines(): texts may hold U+2028, which JSON need not escape.
        first, *rows = map(json.loads, kept.split("\n")[:-1] or [whole])
        before = first["request"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by {command}; name another.") from error
    now = json.loads(json.dumps(request))
    if before != now:
        lines = differences("request", before, now, ignored=())
        raise ValueError(
            f"{path} was written by another request; name another place, or remove it:\n"
            + "\n".join(lines)
        )
    if kept != whole:
        draft = path.with_name(f"{path.name}.partial")
        draft.write_text(kept, encoding="utf-8")
        os.replace(draft, path)
    return rows


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

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines; they are with the operating system when this returns."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
