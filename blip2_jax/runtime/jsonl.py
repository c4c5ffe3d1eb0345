"""Files of one JSON object a line, each with the `step` that it is of."""

import json
import sys
from pathlib import Path
from typing import Any

from blip2_jax.runtime import atomic


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file.

    A last line that a killed process left unfinished is skipped; others that are damaged, by a
    crash of the machine or by hand, are skipped and reported.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record.get("step"), int):
                raise ValueError("no step")
            records.append(record)
        except (ValueError, AttributeError):
            if number < len(lines):
                print(
                    f"{path}, line {number} is damaged and left out: {line[:80]!r}", file=sys.stderr
                )
    return records


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines of later steps from a file; returns those that are kept."""
    if not path.exists():
        return []
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    atomic.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
