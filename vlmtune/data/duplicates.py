"""Rows and images that occur twice, in one split or in training and held-out data, from 16-byte digests (SPEC H1).

Exact duplicates only: the same turns, the same pixels after decoding. A picture that was resized or compressed anew is
another picture. Memory: 72 bytes per row and 44 per image, however large they are, and a few times that to compare.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.data.check import CODES, DIGEST, CheckedRow, RowFinding
from vlmtune.data.sources import FileSource
from vlmtune.types import Sample

TRAIN = "train"
"""The split of every source of data.train."""

SENTENCES = {
    "duplicate_row": "{here}: the same conversation about the same pixels as {first}; remove one of them.",
    "leak": "{here}: this held-out sample is in the training data, {first}; remove it from one of them.",
    "contradiction": "{here}: the same question about the same pictures as {first}, with another reply; which is true?",
    "duplicate_image": "{here}: an image of it has the same pixels as another file, of {first}; check which is meant.",
    "leak_image": "{here}: an image of it is in the training data, {first}; hold out all samples of an image.",
}


@dataclass(frozen=True)
class SplitSource:
    """name: unique among all sources; split: `TRAIN`, or "eval/" and the held-out group."""

    source: FileSource
    name: str
    split: str


@dataclass(frozen=True)
class _Twice:
    """What stands at position `first` occurs again at `again`; leaks: the one is training data, the other held out."""

    first: int
    again: int
    leaks: bool


class _Seen:
    """Digests of some bytes each, with the source and the row where each was seen, in the order of adding."""

    def __init__(self):
        self._digests, self._sources, self._rows = bytearray(), array("i"), array("q")

    def add(self, digests: bytes, source: int, row: int) -> None:
        self._digests += digests
        self._sources.append(source)
        self._rows.append(row)

    def digests(self, size: int) -> np.ndarray:
        """uint64[n, size / 8]; size: bytes of each."""
        return np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, size // 8)

    def sources(self) -> np.ndarray:
        return np.array(self._sources, dtype=np.int64)

    def place(self, position: int) -> tuple[int, int]:
        """(number of the source, row)"""
        return self._sources[position], self._rows[position]


class Duplicates:
    """Collects the digests of all rows, and then tells which occur twice. Sources of `TRAIN` come first."""

    def __init__(self, sources: Sequence[SplitSource]):
        self._sources = sources
        names = list(dict.fromkeys([TRAIN, *(source.split for source in sources)]))
        self._split_of = np.array([names.index(source.split) for source in sources], dtype=np.uint64)
        self._contents, self._images, self._asked = _Seen(), _Seen(), _Seen()

    def add(self, source: int, checked: CheckedRow) -> None:
        """source: its number in the list of sources."""
        if checked.content is not None:
            self._contents.add(checked.content, source, checked.row)
        if checked.asked is not None:
            self._asked.add(checked.asked, source, checked.row)
        for image in checked.images:
            self._images.add(image.pixels + image.file, source, checked.row)

    def findings(self) -> Iterator[RowFinding]:
        """In the order of sources and rows. A row that is there twice as a whole is not reported for its images again.

        VlmtuneError: a row that could be read a moment ago cannot be read any more.
        """
        contents, images, asked = self._contents, self._images, self._asked
        found = [
            (contents.place(twice.again), "leak" if twice.leaks else "duplicate_row", contents.place(twice.first))
            for twice in self._same_contents()
        ]
        whole = {here for here, _, _ in found}
        found += [
            (images.place(twice.again), "leak_image" if twice.leaks else "duplicate_image", images.place(twice.first))
            for twice in self._same_pixels()
            if images.place(twice.again) not in whole
        ]
        found += [(asked.place(again), "contradiction", asked.place(first)) for first, again in self._other_replies()]
        for entry in sorted(set(found)):
            yield self._finding(*entry)

    def _same_contents(self) -> Iterator[_Twice]:
        split = self._split_of[self._contents.sources()]
        return _repeated(self._contents.digests(DIGEST), split)

    def _same_pixels(self) -> Iterator[_Twice]:
        digests = self._images.digests(2 * DIGEST)
        split = self._split_of[self._images.sources()]
        # questions about one picture name one file again and again, on purpose: each file counts once in its split
        kept = np.flatnonzero(first_equal(np.column_stack([digests, split])) == np.arange(len(split)))
        for twice in _repeated(digests[kept, : DIGEST // 8], split[kept]):
            yield _Twice(int(kept[twice.first]), int(kept[twice.again]), twice.leaks)

    def _other_replies(self) -> Iterator[tuple[int, int]]:
        """Positions of a question and of the same one with another reply, in one split."""
        digests = self._asked.digests(2 * DIGEST)
        split = self._split_of[self._asked.sources()]
        first = first_equal(np.column_stack([digests[:, : DIGEST // 8], split]))
        reply = digests[:, DIGEST // 8 :]
        for position in np.flatnonzero((reply != reply[first]).any(axis=1)):
            yield int(first[position]), int(position)

    def _finding(self, here: tuple[int, int], code: str, first: tuple[int, int]) -> RowFinding:
        sample, other = self._sample(here), self._sample(first)
        sentence = SENTENCES[code].format(
            here=f"{sample.origin} (sample {sample.id})", first=f"{other.origin} (sample {other.id})"
        )
        name, row = self._sources[here[0]].name, here[1]
        return RowFinding(code, CODES[code][0], name, row, sample.origin, sample.id, sentence)

    def _sample(self, place: tuple[int, int]) -> Sample:
        return self._sources[place[0]].source[place[1]]


def first_equal(keys: np.ndarray) -> np.ndarray:
    """int64[n]: the position of the first row of keys uint64[n, words] that is equal to this one."""
    order = np.lexsort(keys.T)  # stable: equal keys stay in their order
    sorted_keys = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _repeated(digests: np.ndarray, split: np.ndarray) -> Iterator[_Twice]:
    """digests uint64[n, words]; split uint64[n], 0 for training data, which comes first."""
    everywhere = first_equal(digests)
    within = first_equal(np.column_stack([digests, split]))
    for position in np.flatnonzero((split > 0) & (split[everywhere] == 0)):
        yield _Twice(int(everywhere[position]), int(position), leaks=True)
    for position in np.flatnonzero(within != np.arange(len(within))):
        yield _Twice(int(within[position]), int(position), leaks=False)
