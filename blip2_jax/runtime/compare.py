"""Says, entry by entry, how two JSON documents differ."""

from collections.abc import Collection, Mapping
from typing import Any

# How a run is executed, which may change when it is resumed; all else is what it computes.
EXECUTION = frozenset(
    {
        "config.distributed",
        "config.faults",
        "config.mesh",
        "config.profile",
        "config.data.threads",
        "config.data.workers",
        "config.data.index_dir",
    }
)


def differences(
    name: str, saved: Any, wanted: Any, ignored: Collection[str] = EXECUTION
) -> list[str]:
    """One line for every entry, however deep, that is not the same in both and not `ignored`."""
    if name in ignored:
        return []
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in sorted(saved.keys() | wanted.keys()):
            lines += differences(f"{name}.{key}", saved.get(key), wanted.get(key), ignored)
        return lines
    return [] if saved == wanted else [f"  {name}: {saved!r} saved, {wanted!r} now"]
