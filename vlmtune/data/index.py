"""Where the rows of a file begin: written once, memory-mapped by every process, never a Python list.

    <cache>/<kind>-<path>-<content>/   index.json (what it was built from, and bytes per column)  <column>.bin

<path> is a digest of the absolute path and <content> of size and modification time: reading a terabyte to know that it
has not changed would cost more than the index saves. A folder is written under another name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vlmtune.types import VlmtuneError

FORMAT = 1  # in every digest: an index written by other code is never taken for one of ours
BLOCK = 65_536  # numbers held back before they go to disk


class Stamp(NamedTuple):
    """What stands for the contents of a file."""

    size: int
    mtime_ns: int


Columns = Mapping[str, tuple[type, int]]
"""Column name -> (NumPy scalar type, numbers per row; 0 for a flat array)."""


class IndexWriter:
    """Appends numbers to columns on disk with a bounded buffer."""

    def __init__(self, folder: Path, columns: Columns):
        self._held = {name: array(np.dtype(scalar).char) for name, (scalar, _) in columns.items()}
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in columns}

    def add(self, column: str, numbers: Iterable[int]) -> None:
        held = self._held[column]
        held.extend(numbers)
        if len(held) >= BLOCK:
            self._flush(column)

    def _flush(self, column: str) -> None:
        self._held[column].tofile(self._files[column])
        del self._held[column][:]

    def close(self) -> dict[str, int]:
        """Bytes per column."""
        sizes = {}
        for name, file in self._files.items():
            self._flush(name)
            sizes[name] = file.tell()
            file.close()
        return sizes


def stamp_of(path: Path) -> Stamp:
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def identity_of(path: Path) -> str:
    """A text that another file, or other contents of this one, do not have."""
    return f"{os.path.abspath(path)} {' '.join(map(str, stamp_of(path)))}"


def open_unchanged(path: Path, stamp: Stamp) -> BinaryIO:
    """Open for reading by offset. Raises VlmtuneError if the file is gone or is not the one that was indexed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise VlmtuneError(f"{path} cannot be read any more ({error.strerror}); put it back.") from error
    status = os.fstat(file.fileno())
    if Stamp(status.st_size, status.st_mtime_ns) != stamp:
        file.close()
        raise VlmtuneError(f"{path} changed while it was in use; start again when nothing writes to it.")
    return file


def file_index(
    path: Path, kind: str, columns: Columns, build: Callable[[IndexWriter], None], cache: Path | None
) -> dict[str, np.ndarray]:
    """The memory-mapped columns of the index of `path`, built by `build` unless the cache holds them.

    cache: folder of all indexes; None: the index lives as long as the mapping. Raises VlmtuneError if the cache cannot
    be written, and what `build` raises about the file.
    """
    stamp = stamp_of(path)
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="vlmtune-index-") as scratch:
            sizes = _write(Path(scratch), path, stamp, columns, build)
            return _map(Path(scratch), columns, sizes)  # the mapping outlives the names of the files
    place = f"{kind}-{_digest(os.path.abspath(path))}"
    folder = cache / f"{place}-{_digest(f'{FORMAT} {stamp.size} {stamp.mtime_ns}')}"
    sizes = _sizes(folder, columns)
    if sizes is None:
        draft = _draft(folder)
        try:
            sizes = _write(draft, path, stamp, columns, build)
            _publish(draft, folder, columns)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        for old in cache.glob(f"{place}-*"):  # of earlier contents; who has one mapped keeps it
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return _map(folder, columns, sizes)


def _write(folder: Path, path: Path, stamp: Stamp, columns: Columns, build) -> dict[str, int]:
    writer = IndexWriter(folder, columns)
    try:
        build(writer)
    finally:
        sizes = writer.close()
    if stamp_of(path) != stamp:
        raise VlmtuneError(f"{path} changed while it was indexed; start again when nothing writes to it.")
    described = {"format": FORMAT, "path": os.path.abspath(path), **stamp._asdict(), "bytes": sizes}
    (folder / "index.json").write_text(json.dumps(described))
    return sizes


def _publish(draft: Path, folder: Path, columns: Columns) -> None:
    """Give a complete index its name. Whoever else built the same one meanwhile has equal bytes: theirs may stay."""
    if folder.exists() and _sizes(folder, columns) is None:
        shutil.rmtree(folder)
    try:
        os.rename(draft, folder)
    except OSError:
        if _sizes(folder, columns) is None:
            raise


def _sizes(folder: Path, columns: Columns) -> dict[str, int] | None:
    """Bytes per column of a whole index; None if it is absent or damaged, and then it is built again."""
    try:
        sizes = json.loads((folder / "index.json").read_text())["bytes"]
        whole = all((folder / f"{name}.bin").stat().st_size == sizes[name] for name in columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sizes if whole else None


def _map(folder: Path, columns: Columns, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    mapped = {}
    for name, (scalar, width) in columns.items():
        if sizes[name]:
            column = np.memmap(folder / f"{name}.bin", dtype=scalar, mode="r")
        else:
            column = np.empty(0, dtype=scalar)  # an empty file cannot be mapped
        mapped[name] = column.reshape(-1, width) if width else column
    return mapped


def keep_rows(folder: Path, numbers: np.ndarray, rows: Sequence[dict]) -> None:
    """Keep one number per row, and a dict for each of a few, in a new folder of the cache. Raises VlmtuneError."""
    draft = _draft(folder)
    try:
        np.save(draft / "numbers.npy", numbers)
        (draft / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if folder.exists() and kept_rows(folder) is None:
            shutil.rmtree(folder)
        with suppress(OSError):  # somebody else kept the same meanwhile
            os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def kept_rows(folder: Path) -> tuple[np.ndarray, list[dict]] | None:
    """What `keep_rows` wrote; None if there is nothing, or it is damaged."""
    try:
        lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        return np.load(folder / "numbers.npy", mmap_mode="r"), [json.loads(line) for line in lines]
    except (OSError, ValueError, EOFError):
        return None


def _draft(folder: Path) -> Path:
    """An empty folder beside `folder`, to be renamed to it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise VlmtuneError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); set VLMTUNE_CACHE to a folder that can "
            "be."
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
