"""Says, entry by entry, how two JSON documents differ."""

from collections.abc import Mapping
from typing import Any


def differences(name: str, saved: Any, wanted: Any) -> list[str]:
    """One line for every entry, however deep, that is not the same in both."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in sorted(saved.keys() | wanted.keys()):
            lines += differences(f"{name}.{key}", saved.get(key), wanted.get(key))
        return lines
    return [] if saved == wanted else [f"  {name}: {saved!r} saved, {wanted!r} now"]
