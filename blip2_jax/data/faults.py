"""Records that cannot be read: their errors, counts by reason, and the bound on their share."""

import base64
import collections
import zlib
from typing import Any


class RecordError(ValueError):
    """A record that cannot be used.

    Args:
      reason: a short text; equal for equal causes, so that it can be counted.
      where: the file, archive member or row.
    """

    def __init__(self, reason: str, where: str = ""):
        super().__init__(f"{reason} ({where})" if where else reason)
        self.reason, self.where = reason, where

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.where)


class TooManySkipped(ValueError):
    """More than the bounded share of the records cannot be read."""


class Skipped:
    """Counts what was skipped, by reason; `check` stops a run that skips too much.

    Args:
      total: number of records there are.
      max_share: of them that may be unreadable; None: any.
    """

    EXAMPLES = 5  # places that are kept of each reason

    def __init__(self, total: int = 0, max_share: float | None = None):
        self.total, self.max_share = total, max_share
        self.by_reason: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}
        self._met: collections.Counter[str] = collections.Counter()  # by number, in `_seen`
        self._seen = bytearray()  # a bit for each record

    @property
    def count(self) -> int:
        """Different records that were skipped so far."""
        return self.by_reason.total()

    def add(self, reason: str, where: str = "", *, index: int | None = None) -> None:
        """Counts one record; one of the same `index` is counted once."""
        if index is not None:
            byte, bit = index // 8, 1 << index % 8
            self._seen.extend(bytes(max(0, byte + 1 - len(self._seen))))
            if self._seen[byte] & bit:
                return
            self._seen[byte] |= bit
            self._met[reason] += 1
        self.by_reason[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.EXAMPLES:
            examples.append(where)

    def check(self) -> None:
        """Raises TooManySkipped if more than the bounded share has been skipped."""
        if self.max_share is not None and self.count > max(1, self.max_share * self.total):
            raise TooManySkipped(
                f"{self.count} of {self.total} records cannot be read, more than the share of "
                f"{self.max_share:g} that a run may skip (config.data.max_skipped). Mend the data, "
                "or leave out what is broken with blip2 prepare.\n" + self.text()
            )

    def merge(self, other: "Skipped | dict[str, Any]") -> None:
        """Adds what another count (or its `to_json`) holds."""
        other = other.to_json() if isinstance(other, Skipped) else other
        for reason, counted in other.items():
            self.by_reason[reason] += counted["count"]
            examples = self.examples.setdefault(reason, [])
            examples += counted["examples"][: self.EXAMPLES - len(examples)]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{reason: {"count", "examples"}}, the most frequent first."""
        return {
            reason: {"count": n, "examples": self.examples.get(reason, [])}
            for reason, n in self.by_reason.most_common()
        }

    def met(self) -> dict[str, Any]:
        """What was counted by `index`, as JSON holds it, for `resume`."""
        counted = self.to_json()
        by_reason = {reason: {**counted[reason], "count": n} for reason, n in self._met.items()}
        seen = base64.b85encode(zlib.compress(self._seen)).decode()
        return {"by_reason": by_reason, "seen": seen}

    def resume(self, met: dict[str, Any]) -> None:
        """Goes on from what another count had met; this one has met nothing yet."""
        self._seen = bytearray(zlib.decompress(base64.b85decode(met["seen"])))
        self._met.update({reason: of["count"] for reason, of in met["by_reason"].items()})
        self.merge(met["by_reason"])

    def text(self) -> str:
        """One line a reason, with some of the places."""
        lines = []
        for reason, counted in self.to_json().items():
            examples = [where for where in counted["examples"] if where]
            more = ", ..." if counted["count"] > len(examples) else ""
            lines.append(
                f"  {counted['count']} x {reason}"
                + f": {', '.join(examples)}{more}" * bool(examples)
            )
        return "\n".join(lines)

    def report(self) -> None:
        """Prints what was skipped and why, if anything was."""
        if self.count:
            print(f"Skipped {self.count} of {self.total} records:\n{self.text()}")
