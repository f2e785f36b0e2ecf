"""What data a run read, in a few bytes: a model card names it, and anybody can tell whether theirs is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import VlmtuneError

WHOLE = 256 * 2**20  # bytes of a file that is read from end to end: below a second
BLOCKS, BLOCK = 256, 64 * 2**10
"""Of a larger one: evenly spread, its first and last bytes with them. Another file shows; a changed letter may not."""


@dataclass(frozen=True)
class Fingerprint:
    """files, bytes: of the data files themselves, images that they only name are not read. sha256: of their contents,
    in the order of their paths. whole: False where parts of a large file were left out."""

    files: int
    bytes: int
    sha256: str
    whole: bool


def fingerprint(paths: Sequence[Path]) -> Fingerprint:
    """Of these files. Raises VlmtuneError for one that cannot be read."""
    total, size, whole = hashlib.sha256(), 0, True
    for path in sorted(paths):
        try:
            each = path.stat().st_size
            digest = _digest(path, each)
        except OSError as error:
            raise VlmtuneError(f"{path} cannot be read ({error.strerror}); put it back.") from error
        total.update(digest)
        size, whole = size + each, whole and each <= WHOLE
    # of one file it is the sha256 that every other tool shows
    sha256 = digest.hex() if len(paths) == 1 else total.hexdigest()
    return Fingerprint(len(paths), size, sha256, whole)


def _digest(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        parts = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            parts.update(file.read(BLOCK))
        return parts.digest()
