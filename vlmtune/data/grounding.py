"""How a model family writes boxes and points, and how what it wrote is read back (SPEC A8, B11).

Only the classes here know that Qwen2-VL and Qwen3-VL count to 1000, that Qwen2.5-VL counts pixels *of the resized
image*, that PaliGemma puts y before x, or that a grid is made of tokens of its own. Each does both directions, so
training and inference cannot disagree. `docs/decisions/0008-coordinates.md` says why they look as they do.

Round trip: what the model sees comes back within half a bin of the canvas, edges included.

    name       a box (16, 12, 320, 480) in 640 x 480                              half a bin
    norm1000   <box>[[25,25,500,1000]]</box>                                      W / 2000
    pixels     <box>[[16,12,320,480]]</box>, pixels of the resized image          half a resized pixel
    bins       <box><loc_00><loc_00><loc_16><loc_31></box>                        W / 64
    bins1000   <box><loc_025><loc_025><loc_500><loc_999></box>                    W / 2000
    markup     <box><x>0.025</x><y>0.025</y><x>0.500</x><y>1.000</y></box>        W / 2000
    paligemma  <loc0026><loc0026><loc1023><loc0512>, that is y1 x1 y2 x2          W / 2046
    kosmos2    <object><patch_index_0000><patch_index_1007></object>              W / 64
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from vlmtune.data.coordinates import TAGS, Coordinates, Row, Tag, Tagged, row_length
from vlmtune.types import ImageGeometry, VlmtuneError

# At most six digits each: int() refuses very long ones, and no image is a million pixels wide. ASCII digits only.
_NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)\s*"


def _numbers(count: int) -> str:
    return ",".join([_NUMBER] * count)


_ONE_ROW = {length: re.compile(rf"\[{_numbers(length)}\]") for length in (2, 4)}
_ROW_LIST = {
    length: re.compile(rf"\s*\[\s*{row.pattern}(?:\s*,\s*{row.pattern})*\s*\]\s*") for length, row in _ONE_ROW.items()
}

# What the Qwen models write unasked: Qwen2-VL's special tokens, the JSON of Qwen2.5-VL and Qwen3-VL, Qwen2.5-VL's XML.
_PUBLISHED_BOX = re.compile(
    rf"<\|box_start\|>\s*\({_numbers(2)}\)\s*,\s*\({_numbers(2)}\)\s*<\|box_end\|>"
    rf'|"bbox_2d"\s*:\s*\[{_numbers(4)}\]'
)
_PUBLISHED_POINT = re.compile(
    rf'"point_2d"\s*:\s*\[(?P<json>{_numbers(2)})\]'
    rf'|<points?(?P<xml>(?:\s+x[0-9]{{0,3}}="{_NUMBER}"\s+y[0-9]{{0,3}}="{_NUMBER}")+)[\s>]'
)
_XML_POINT = re.compile(rf'x[0-9]{{0,3}}="{_NUMBER}"\s+y[0-9]{{0,3}}="{_NUMBER}"')


@dataclass(frozen=True)
class IntegerList(Tagged):
    """`[[x1,y1,x2,y2],[...]]` with integers from 0 to `extent(geometry)`, which is (steps across, steps down).

    Replies may also be in the forms that the Qwen families publish; their numbers count alike.
    """

    name: str
    extent: Callable[[ImageGeometry], tuple[int, int]]

    number: ClassVar = re.compile(r"[0-9]+")

    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        return self.extent(geometry)

    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        extent = self.extent(geometry)
        lists = (",".join(str(round(value * extent[n % 2])) for n, value in enumerate(row)) for row in rows)
        return "[" + ",".join(f"[{numbers}]" for numbers in lists) + "]"

    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        if not _ROW_LIST[length].fullmatch(inside):
            return []
        return [self._row(numbers, geometry) for numbers in _ONE_ROW[length].findall(inside)]

    def _located(self, tag: Tag, text: str, geometry: ImageGeometry) -> Iterable[tuple[int, Row]]:
        found = [*super()._located(tag, text, geometry)]
        if tag == "box":
            for match in _PUBLISHED_BOX.finditer(text):
                numbers = [number for number in match.groups() if number is not None]
                found.append((match.start(), self._row(numbers, geometry)))
        elif tag == "point":
            for match in _PUBLISHED_POINT.finditer(text):
                pairs = [re.findall(_NUMBER, match["json"])] if match["json"] else _XML_POINT.findall(match["xml"])
                found += [(match.start(), self._row(pair, geometry)) for pair in pairs]
        return sorted(found, key=lambda place: place[0])  # stable: rows of one match stay in order

    def _row(self, numbers: Iterable[str], geometry: ImageGeometry) -> Row:
        extent = self.extent(geometry)
        return tuple(float(number) / extent[n % 2] for n, number in enumerate(numbers))


@dataclass(frozen=True)
class BinTokens(Tagged):
    """A token per number, `<loc_03><loc_07><loc_12><loc_15>` = x1 y1 x2 y2 on a grid of `count` x `count` cells.

    Bin i covers [i, i + 1) / count and stands for its centre; the last one includes the edge, half a bin from its
    centre. `tokenised_tags`: tags that are tokens as well; the others are written as text.
    """

    name: str
    count: int
    tokenised_tags: tuple[Tag, ...] = TAGS

    number: ClassVar = re.compile(r"<loc_")

    def tokens(self) -> list[str]:
        tags = [token for tag in self.tokenised_tags for token in (f"<{tag}>", f"</{tag}>")]
        return tags + [self._token(index) for index in range(self.count)]

    def numbers(self) -> dict[str, float]:
        """Token of every number -> the fraction of the canvas it stands for."""
        return {self._token(index): (index + 0.5) / self.count for index in range(self.count)}

    @property
    def _digits(self) -> int:
        return len(str(self.count - 1))

    def _token(self, index: int) -> str:
        return f"<loc_{index:0{self._digits}d}>"

    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        return self.count, self.count

    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        return "".join(self._token(_cell(value, self.count)) for row in rows for value in row)

    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        indices = _indices(inside, rf"<loc_([0-9]{{{self._digits}}})>", self.count)
        return _rows([(index + 0.5) / self.count for index in indices], length)


@dataclass(frozen=True)
class Markup(Tagged):
    """`<x>0.123</x><y>0.456</y>`: fractions of the canvas with three decimals; a box is two such pairs."""

    name: str

    number: ClassVar = re.compile(r"(?<=>)[0-9.]+")

    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        return 1000, 1000

    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        return "".join(
            f"<x>{u:.3f}</x><y>{v:.3f}</y>" for row in rows for u, v in zip(row[::2], row[1::2], strict=True)
        )

    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        pair = rf"<x>{_NUMBER}</x>\s*<y>{_NUMBER}</y>"
        if not re.fullmatch(rf"\s*(?:{pair}\s*)+", inside):
            return []
        return _rows([float(number) for numbers in re.findall(pair, inside) for number in numbers], length)


@dataclass(frozen=True)
class PatchIndices(Tagged):
    """Kosmos-2: the cells of a 32 x 32 grid, counted row by row; a box is its upper left and its lower right cell.

    `<object>` stands around a box, a region included, and `</delimiter_of_multi_objects/>` between two boxes. A cell
    stands for its centre. Points and clicks, which Kosmos-2 has not, are one cell each.
    """

    name: str
    side: int = 32

    names: ClassVar = {"box": "object", "region": "object", "point": "point", "click": "click"}
    DELIMITER: ClassVar = "</delimiter_of_multi_objects/>"
    number: ClassVar = re.compile(r"<patch_index_")
    numbers_of_a_box: ClassVar = 2

    def tokens(self) -> list[str]:
        tags = [token for name in dict.fromkeys(self.names.values()) for token in (f"<{name}>", f"</{name}>")]
        return [*tags, self.DELIMITER, *(self._token(index) for index in range(self.side**2))]

    def _token(self, index: int) -> str:
        return f"<patch_index_{index:04d}>"

    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        return self.side, self.side

    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        if len(rows[0]) == 2:
            return "".join(self._token(self._index(*row)) for row in rows)
        return self.DELIMITER.join(self._corners(*row) for row in rows)

    def _corners(self, u1: float, v1: float, u2: float, v2: float) -> str:
        first = _cell(u1, self.side), _cell(v1, self.side)
        # the last cell that the box touches; a box that ends where a cell begins does not touch that cell
        last = [max(start, math.ceil(end * self.side) - 1) for start, end in zip(first, (u2, v2), strict=True)]
        return "".join(self._token(row * self.side + column) for column, row in (first, last))

    def _index(self, u: float, v: float) -> int:
        return _cell(v, self.side) * self.side + _cell(u, self.side)

    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        boxes = inside.split(self.DELIMITER) if length == 4 else [inside]
        indices = [_indices(box, r"<patch_index_([0-9]{4})>", self.side**2) for box in boxes]
        if length == 4 and any(len(corners) != 2 for corners in indices):
            return []
        centres = [
            (place + 0.5) / self.side
            for cells in indices
            for index in cells
            for place in (index % self.side, index // self.side)
        ]
        return _rows(centres, length)


@dataclass(frozen=True)
class LocationTokens(Tagged):
    """PaliGemma: four bare tokens `<loc0000>` to `<loc1023>` per box, y1 x1 y2 x2, and " ; " between two boxes.

    Token i is i / 1023 of the canvas. A region is written like a box. Points and clicks, which PaliGemma has not, are
    two tokens (y x) in tags, so that two points are never taken for a box.
    """

    name: str
    count: int = 1024

    names: ClassVar = {"point": "point", "click": "click"}
    RUN: ClassVar = re.compile(r"(?:<loc[0-9]{4}>\s*)+")
    number: ClassVar = re.compile(r"<loc")

    def tokens(self) -> list[str]:
        return [self._token(index) for index in range(self.count)]

    def without_places(self, text: str) -> str:
        return self.RUN.sub("", super().without_places(text))

    def _token(self, index: int) -> str:
        return f"<loc{index:04d}>"

    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        return self.count - 1, self.count - 1

    def _write(self, tag: Tag, rows: list[Row], geometry: ImageGeometry) -> str:
        if row_length(tag) == 2:
            return super()._write(tag, rows, geometry)
        return " ; ".join(self._write_inside([row], geometry) for row in rows)

    def _read(self, tag: Tag, text: str, geometry: ImageGeometry) -> list[Row]:
        if row_length(tag) == 2:
            return super()._read(tag, text, geometry)
        runs = self.RUN.findall(super().without_places(text))  # not the tokens of points
        return [row for run in runs for row in self._read_inside(run, 4, geometry)]

    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        return "".join(
            self._token(round(value * (self.count - 1)))
            for row in rows
            for u, v in zip(row[::2], row[1::2], strict=True)
            for value in (v, u)
        )

    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        values = [index / (self.count - 1) for index in _indices(inside, r"<loc([0-9]{4})>", self.count)]
        return [tuple(row[n ^ 1] for n in range(length)) for row in _rows(values, length)]  # y x -> x y


_CONVENTIONS: tuple[Coordinates, ...] = (
    IntegerList("norm1000", extent=lambda geometry: (1000, 1000)),
    IntegerList("pixels", extent=lambda geometry: (geometry.resized_width, geometry.resized_height)),
    # the embedded model's vocabulary has the tags of boxes and regions only
    BinTokens("bins", 32, tokenised_tags=("box", "region")),
    BinTokens("bins1000", 1000),
    Markup("markup"),
    LocationTokens("paligemma"),
    PatchIndices("kosmos2"),
)


def convention_names() -> tuple[str, ...]:
    return tuple(convention.name for convention in _CONVENTIONS)


def coordinates(name: str) -> Coordinates:
    """The convention called `name`, one of `convention_names()`; the table above shows what each looks like.

    VlmtuneError: no such convention.
    """
    known = {convention.name: convention for convention in _CONVENTIONS}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(known)}."
        raise VlmtuneError(f"Unknown coordinate convention {name!r}; {remedy}")
    return known[name]


def _cell(fraction: float, count: int) -> int:
    return min(int(fraction * count), count - 1)


def _indices(text: str, token: str, count: int) -> list[int]:
    """The numbers of a text that consists of such tokens and white space; [] when it does not, or one is too large."""
    if not re.fullmatch(rf"\s*(?:{token}\s*)+", text):
        return []
    indices = [int(digits) for digits in re.findall(token, text)]
    return indices if max(indices) < count else []


def _rows(values: list[float], length: int) -> list[Row]:
    """Values cut into rows; [] when they do not come out even."""
    if len(values) % length:
        return []
    return [tuple(values[start : start + length]) for start in range(0, len(values), length)]
