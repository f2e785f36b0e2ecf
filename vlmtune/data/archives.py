"""WebDataset shards: the members of a .tar that share a key are one row.

Only offsets are kept; a member is read when its row is. Nothing is extracted or unpickled: members are images, .json
and .txt, and every other ending is left alone and named in the log.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from vlmtune.data.index import IndexWriter, file_index, identity_of, open_unchanged, stamp_of
from vlmtune.data.rows import CONTENT, Row
from vlmtune.data.strict_json import loads
from vlmtune.types import VlmtuneError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BLOCK = 512  # bytes: headers and contents of a tar begin at multiples of it

COLUMNS = {
    "members": (np.int64, 4),  # offset and size of the contents; begin and end of the name in `names`
    "samples": (np.int64, 0),  # number of the member after the last one of each sample
    "names": (np.uint8, 0),  # all names in UTF-8
    "ignored": (np.uint8, 0),  # endings of members that are not read, separated by spaces
}


class Tar:
    """Row i: the i-th run of neighbouring members with one key (the name up to the first dot of its last part).

    `.json` is the row, `.txt` its caption, and images come with it in the order of the archive.
    """

    def __init__(self, path: Path, cache: Path | None = None):
        self.path, self.name, self.folder, self.identity = path, path.name, path.parent, identity_of(path)
        self._stamp = stamp_of(path)
        index = file_index(path, "tar", COLUMNS, self._index, cache)
        self._members, self._samples, self._names = index["members"], index["samples"], index["names"]
        self.size = len(self._samples)
        ignored = bytes(index["ignored"]).decode()
        self.container = "WebDataset tar" + (f" (members not read: {ignored})" if ignored else "")

    def row(self, index: int) -> Row:
        first = int(self._samples[index - 1]) if index else 0
        value, caption, attached, key = {}, None, {}, ""
        with open_unchanged(self.path, self._stamp) as file:
            for member in range(first, int(self._samples[index])):
                offset, size, begin, end = (int(v) for v in self._members[member])
                name = bytes(self._names[begin:end]).decode("utf-8")
                key, ending = _key_and_ending(name)
                data = os.pread(file.fileno(), size, offset)
                place = f"{self.path}:{name}"
                if ending == ".json":
                    value = loads(data, place, "mend or remove the member")
                elif ending == ".txt":
                    caption = _text(data, place)
                else:
                    attached[name] = data
        origin = f"{self.path}:{key}"
        if isinstance(value, dict) and caption is not None and not any(name in value for name in CONTENT[:-1]):
            value = value | {"caption": caption}
        if not value:
            raise VlmtuneError(
                f"{origin}: no .json or .txt beside {next(iter(attached))}; add what it shows or remove it."
            )
        return Row(value, origin, f"{self.path.stem}/{key}", attached)

    def _index(self, writer: IndexWriter) -> None:
        last_key, members, names, seen = None, 0, 0, set()
        ignored: set[str] = set()
        with self.path.open("rb") as file:
            for info in self._walk(file):
                key, ending = _key_and_ending(info.name)
                if ending not in (".json", ".txt", *IMAGES):
                    ignored.add(ending or "without ending")
                    continue
                if key != last_key:
                    if members:
                        writer.add("samples", (members,))
                    last_key, seen = key, set()
                if ending in (".json", ".txt") and ending in seen:
                    raise VlmtuneError(f"{self.path}:{key}: two {ending} members of one key; rename one.")
                seen.add(ending)
                name = info.name.encode("utf-8")
                writer.add("members", (info.offset_data, info.size, names, names + len(name)))
                writer.add("names", name)
                members, names = members + 1, names + len(name)
        if members:
            writer.add("samples", (members,))
        writer.add("ignored", " ".join(sorted(ignored)).encode())

    def _walk(self, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
        """Every regular member. Raises VlmtuneError for damage, and for members that no honest data set has."""
        total, end = os.fstat(file.fileno()).st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep all of them in memory
                    end = info.offset_data
                    if info.isdir():
                        continue
                    self._check_member(info)
                    end += -(-info.size // BLOCK) * BLOCK
                    if end > total:
                        raise VlmtuneError(f"{self.path}: truncated inside {info.name}; copy the file again.")
                    yield info
        except (tarfile.TarError, UnicodeError, ValueError) as error:
            raise VlmtuneError(f"{self.path}: not a tar file, or damaged ({error}); copy it again.") from error
        # tarfile takes a broken header for the end, and stops at the first end mark of archives joined by `cat`
        file.seek(end)
        if end + BLOCK > total:
            raise VlmtuneError(f"{self.path}: truncated, the end mark of a tar is missing; copy the file again.")
        while block := file.read(1 << 16):
            if block.strip(b"\0"):
                raise VlmtuneError(
                    f"{self.path}: bytes after byte {end:,} are no members: a damaged header, or several archives "
                    "joined; make it again, one file per archive, in a folder."
                )

    def _check_member(self, info: tarfile.TarInfo) -> None:
        name = PurePosixPath(info.name)
        info.name.encode("utf-8")  # tarfile reads a name in another encoding as surrogates; `_walk` names the archive
        if name.is_absolute() or ".." in name.parts or "\0" in info.name:
            raise VlmtuneError(
                f"{self.path}: member {info.name!r} leaves the archive; make the tar with relative names."
            )
        if not info.isreg() or info.sparse is not None:
            raise VlmtuneError(
                f"{self.path}: member {info.name!r} is a link, a device or sparse; put plain files into the archive."
            )


def _key_and_ending(name: str) -> tuple[str, str]:
    """ "a/0001.left.JPG" -> ("a/0001", ".jpg")."""
    folder, slash, last = name.rpartition("/")
    key, dot, rest = last.partition(".")
    return folder + slash + key, (dot + rest.rpartition(".")[2]).lower()


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise VlmtuneError(f"{place}: not UTF-8 ({error.reason}); save it as UTF-8.") from error
