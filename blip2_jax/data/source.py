"""What a source of records is: a sequence with random access, so that resuming is exact."""

from typing import Any, Protocol

from blip2_jax.data.faults import Skipped

Record = dict[str, Any]  # see `Source`


class Source(Protocol):
    """Records by number.

    A record is a dict: `image` (encoded bytes), `id`, `captions` (list of texts), maybe `questions`
    (list of {"question", "answers" or "answer", ...}), `image_number` where several records show
    one image, and `part`, the name of a mixture's part.

    Attributes:
      faults: what was left out when the source was opened, by reason; its `total` is the number of
        records with those left out.
      notes: parts of records that were left out, by reason.
      by_split: whether the records are those of one split, of several that are there.
      in_order: whether records are to be read in their own order, each once.
    """

    faults: Skipped
    notes: Skipped
    by_split: bool = False
    in_order: bool = False

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """A record.

        Raises:
          RecordError: it cannot be read.
          IndexError: there is no such number, which ends a `for` loop.
        """

    def without_image(self, index: int) -> Record:
        """A record without its image, which is not read where that can be avoided.

        Raises:
          RecordError: the record cannot be read.
        """
        return {key: value for key, value in self[index].items() if key != "image"}

    def where(self, index: int) -> str:
        """A record's file or row, for reports."""
        return f"record {index}"

    @property
    def image_numbers(self) -> int:
        """What all `image_number` are below."""
        return len(self)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last record number of each part, end excluded."""
        return [(0, len(self))]

    def identity(self) -> dict[str, Any]:
        """What decides which records these are, for a run to find them the same when it goes on.

        Folders are no part of it: data may move.
        """
        return {"records": len(self)}


def skipped_at_start(source: Source, max_share: float | None = None) -> Skipped:
    """A count that begins with what the source left out.

    Args:
      source: any.
      max_share: of all records that may be skipped; None: any.

    Raises:
      TooManySkipped: the source left out more than that already.
    """
    skipped = Skipped(len(source), max_share)
    skipped.merge(source.faults)
    skipped.total += skipped.count
    skipped.check()
    return skipped
