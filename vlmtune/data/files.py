"""Readers: rows of a data file by index, whatever holds them. Nobody here knows what a row means; that is `rows`.

    .jsonl        `JsonLines`   by byte offset       .tar                   `archives.Tar`      by byte offset
    .json         `JsonList`    in memory            .parquet               `tables.Parquet`    by row group
    .csv .tsv     `Table`       by byte offset       save_to_disk, hub:…    `tables.ArrowTable` memory-mapped

A folder of .parquet, .tar, .jsonl, .csv or .tsv files is read as one data set, `Chain`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from vlmtune.data.archives import Tar
from vlmtune.data.index import IndexWriter, file_index, identity_of, open_unchanged, stamp_of
from vlmtune.data.rows import CONTENT, Row
from vlmtune.data.strict_json import loads
from vlmtune.data.tables import Parquet, open_hub, open_saved
from vlmtune.types import VlmtuneError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".tar", ".parquet")
LONGEST_LINE = 1 << 28  # bytes; a longer "line" is a file without line breaks, and would be read into memory whole
LARGE_LIST = 100_000_000  # bytes of a .json file from which on its memory is worth a word
UTF8_BOM = b"\xef\xbb\xbf"
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip


class Reader(Protocol):
    """Rows by index, equal in any process.

    name: for logs; container: what holds the rows, for people; folder: where relative image paths start, None for data
    that lies nowhere in particular; size: rows, at least one; identity: a text that other contents do not have. `row`
    raises VlmtuneError naming file and row.
    """

    name: str
    container: str
    folder: Path | None
    size: int
    identity: str

    def row(self, index: int) -> Row: ...


def open_reader(path: Path | str, split: str = "train", cache: Path | None = None) -> Reader:
    """The reader of a file, a folder, or `hub:owner/name`.

    split: of a folder or hub data set that has several; cache: folder of the indexes (None: not kept). Raises
    VlmtuneError for what does not exist, holds no rows, or is of no known kind.
    """
    if str(path).startswith("hub:"):
        return open_hub(str(path), split)
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, split, cache)
    if not path.is_file():
        raise VlmtuneError(f"data file {path} does not exist.{_remedy(path)}")
    if split != "train":
        raise VlmtuneError(f"data file {path} has no split {split!r}: a file is its own split; name the file of it.")
    return _open_file(path, cache)


def _open_file(path: Path, cache: Path | None) -> Reader:
    if path.suffix not in ENDINGS:
        unpack = "; unpack it first" if path.suffix in (".gz", ".zst", ".bz2", ".xz", ".zip", ".tgz") else ""
        raise VlmtuneError(
            f"data file {path}: unknown ending {path.suffix!r}{unpack}; use .jsonl or .json, {', '.join(ENDINGS[2:])}."
        )
    if path.suffix == ".parquet":
        reader: Reader = Parquet(path)
    elif path.suffix == ".tar":
        reader = Tar(path, cache)
    elif path.suffix == ".json":
        reader = JsonList(path)
    elif path.suffix == ".jsonl":
        reader = JsonLines(path, cache)
    else:
        reader = Table(path, cache)
    if reader.size == 0:
        raise VlmtuneError(f"data file {path} holds no rows.")
    return reader


class JsonLines:
    """One JSON object per line, read by byte offset; blank lines do not count."""

    container = "JSONL"

    def __init__(self, path: Path, cache: Path | None = None):
        self.path, self.name, self.folder, self.identity = path, path.name, path.parent, identity_of(path)
        self._stamp = stamp_of(path)
        self._lines = file_index(path, "lines", {"lines": (np.int64, 2)}, self._index, cache)["lines"]
        self.size = len(self._lines)

    def row(self, index: int) -> Row:
        line, offset = (int(v) for v in self._lines[index])
        with open_unchanged(self.path, self._stamp) as file:
            file.seek(offset)
            text = file.readline()
        origin = f"{self.path}:{line}"
        return Row(loads(text, origin, "mend or remove the line"), origin, f"{self.path.stem}/{index}")

    def _index(self, writer: IndexWriter) -> None:
        """(line number from 1, byte offset) of every line that is not blank."""
        offset = number = 0
        with self.path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise VlmtuneError(
                        f"{self.path}:{number}: the line is longer than {LONGEST_LINE:,} bytes; a .jsonl file has one "
                        "conversation per line, a list of them is a .json file."
                    )
                if not line.isspace():
                    writer.add("lines", (number, offset))
                offset += len(line)


class JsonList:
    """One list of objects, held in memory: there is no reading a part of it."""

    def __init__(self, path: Path):
        self.path, self.name, self.folder, self.identity = path, path.name, path.parent, identity_of(path)
        size = path.stat().st_size
        self.container = "JSON list" + (
            f" of {size / 1e6:,.0f} MB held in memory by every process (as .jsonl it would stay on disk)"
            if size >= LARGE_LIST
            else ""
        )
        remedy = "mend it, or name it .jsonl if it has one object per line"
        self._rows = loads(path.read_bytes(), str(path), remedy)
        if not isinstance(self._rows, list):
            raise VlmtuneError(
                f"{path}: a .json data file is a list of conversations, this is a {type(self._rows).__name__}."
            )
        self.size = len(self._rows)

    def row(self, index: int) -> Row:
        return Row(self._rows[index], f"{self.path}:{index + 1}", f"{self.path.stem}/{index}")


class Table:
    """Comma- or tab-separated records under a header, quoted as in RFC 4180, in UTF-8; read by byte offset.

    Every record is parsed once when the index is built, so a ragged one is found before training. An empty cell is an
    absent field.
    """

    def __init__(self, path: Path, cache: Path | None = None):
        self.path, self.name, self.folder, self.identity = path, path.name, path.parent, identity_of(path)
        self.container, self._separator = ("CSV", ",") if path.suffix == ".csv" else ("TSV", "\t")
        self._stamp = stamp_of(path)
        with path.open("rb") as file:
            self._header = [name.strip() for name in next(self._records(file), (0, 0, []))[2]]
        self._check_header()
        self._lines = file_index(path, "table", {"lines": (np.int64, 2)}, self._index, cache)["lines"]
        self.size = len(self._lines)

    def row(self, index: int) -> Row:
        line, offset = (int(v) for v in self._lines[index])
        with open_unchanged(self.path, self._stamp) as file:
            file.seek(offset)
            _, _, cells = next(self._records(file, line - 1))
        value = {name: cell for name, cell in zip(self._header, cells, strict=True) if cell}
        return Row(value, f"{self.path}:{line}", f"{self.path.stem}/{index}")

    def _index(self, writer: IndexWriter) -> None:
        """(line number from 1, byte offset) of every record below the header."""
        with self.path.open("rb") as file:
            records = self._records(file)
            next(records, None)
            for line, offset, cells in records:
                if len(cells) != len(self._header):
                    raise VlmtuneError(
                        f"{self.path}:{line}: {len(cells)} cells under a header of {len(self._header)}; quote cells "
                        "that hold separators or line breaks."
                    )
                writer.add("lines", (line, offset))

    def _records(self, file: BinaryIO, line: int = 0) -> Iterator[tuple[int, int, list[str]]]:
        """(first line, byte offset, cells) from where the file stands, `line` lines having been read; no blank ones."""
        first, start = line, file.tell()
        end = start

        def lines() -> Iterator[str]:
            nonlocal line, end
            while text := file.readline(LONGEST_LINE):
                line += 1
                end += len(text)
                try:
                    yield text.removeprefix(UTF8_BOM if line == 1 else b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise VlmtuneError(
                        f"{self.path}:{line}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
                    ) from error

        reader = csv.reader(lines(), delimiter=self._separator, strict=True)
        while True:
            try:
                with _long_cells():
                    cells = next(reader, None)
            except csv.Error as error:
                raise VlmtuneError(
                    f"{self.path}:{first + 1}: not valid {self.container} ({error}); put cells with quotes into quotes "
                    'and double those inside ("").'
                ) from error
            if cells is None:
                return
            if cells:
                yield first + 1, start, cells
            first, start = line, end

    def _check_header(self) -> None:
        header = self._header
        if not header:
            return  # an empty file; it holds no rows, and that is what the complaint says
        doubled = next((name for name in header if header.count(name) > 1), None)
        if doubled is not None:
            raise VlmtuneError(f"{self.path}:1: column {doubled!r} stands in the header twice; rename one.")
        kind = next((name for name in CONTENT if name in header), None)
        needed = {"question": ({"answer", "boxes"}, "answer"), "caption": ({"image", "images"}, "image")}
        if kind is None or (kind in needed and not needed[kind][0] & set(header)):
            lacking = "question and answer" if kind is None else needed[kind][1]
            raise VlmtuneError(
                f"{self.path}:1: the header lacks {lacking} (it has {', '.join(header)[:200]}); name the columns "
                "image, question, answer."
            )


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells may hold an image in base64; Python's limit of 131,072 characters is a setting of the whole process."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---- folders ----------------------------------------------------------------------------------------------------


class Chain:
    """Several files as one: rows in the order of the files."""

    def __init__(self, folder: Path, readers: Sequence[Reader]):
        self.name, self.folder = folder.name, folder
        self.identity = "\n".join(reader.identity for reader in readers)
        self._readers = readers
        self._ends = np.cumsum([reader.size for reader in readers])
        self.size = int(self._ends[-1])
        self.container = f"{readers[0].container} in {len(readers)} files"

    def row(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self._readers[number].row(index - before)


def _remedy(path: Path) -> str:
    if "demo-data" in path.parts:
        return " The demo's files are written by: vlmtune scenes runs/demo-data (make demo does it)."
    return " Relative paths start where the command runs." if not path.is_absolute() else ""


def _open_folder(folder: Path, split: str, cache: Path | None) -> Reader:
    """What `datasets` saved, or data files of one kind, in the order of their names."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return open_saved(folder, split)
    endings = tuple(ending for ending in ENDINGS if ending != ".json")  # those lie beside images in numbers
    files = sorted(
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(endings) and not name.startswith((".", "_"))
    )
    if not files:
        raise VlmtuneError(
            f"data folder {folder} holds nothing that can be read; it needs {', '.join(endings)} files, or what "
            "save_to_disk of datasets writes."
        )
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        raise VlmtuneError(
            f"data folder {folder} mixes {' and '.join(kinds)} files; name the file, or a folder of one kind."
        )
    chosen = _files_of_split(folder, files, split)
    readers = [_open_file(file, cache) for file in chosen]
    return readers[0] if len(readers) == 1 else Chain(folder, readers)


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Files whose name (train-00000-of-00002.parquet), or a folder above it, begins with the split; all, if none do."""
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    known = sorted({name for name in splits.values() if name})
    if not known and split == "train":
        return files
    chosen = [file for file, name in splits.items() if name == SPLIT_NAMES.get(split, split)]
    if not chosen:
        raise VlmtuneError(f"data folder {folder} has no split {split!r}; its files name {', '.join(known) or 'none'}.")
    nameless = next((file for file, name in splits.items() if name is None), None)
    if nameless is not None:
        raise VlmtuneError(
            f"data folder {folder}: {nameless.name} names no split, as other files there do; rename or move it."
        )
    return chosen


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        found = re.match(rf"({'|'.join(SPLIT_NAMES)})(?=[-_.]|$)", part)
        if found:
            return SPLIT_NAMES[found[1]]
    return None
