"""Short hashes of the contents of files, whatever their paths and times."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 16  # bytes
MAX_BLOCKS = 1024  # read of all files together: 64 MiB


def of_bytes(*parts: bytes) -> str:
    """16 hexadecimal digits (BLAKE2b), of all parts after one another."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def of_text(text: str) -> str:
    """As `of_bytes`."""
    return of_bytes(text.encode())


def of_files(paths: Iterable[str | Path]) -> str:
    """A hash of files' sizes and contents, in their order; names are no part of it.

    Up to 64 MiB are read of all of them together: all of what is small; of more than that, blocks
    at even distances, the first and the last of each file among them. A file that was exchanged
    by mistake has another size or other blocks.

    Args:
      paths: local files.

    Raises:
      OSError: one cannot be read.
    """
    files = [(path, os.path.getsize(path)) for path in paths]
    blocks = sum(-(-size // BLOCK) for _, size in files)
    digest = hashlib.blake2b(digest_size=8)
    for path, size in files:
        count = -(-size // BLOCK)
        kept = count if blocks <= MAX_BLOCKS else min(count, 2 + MAX_BLOCKS * count // blocks)
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for number in range(kept):
                file.seek(BLOCK * (number * (count - 1) // max(kept - 1, 1)))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
