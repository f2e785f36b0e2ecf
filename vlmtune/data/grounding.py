"""How a model family writes boxes, and how what it wrote is read back (SPEC A8, B11).

Everywhere else in vlmtune a box is `types.Box`: x1, y1, x2, y2 in pixels of the upright original. Only the classes here
know that Qwen2-VL and Qwen3-VL count to 1000, that Qwen2.5-VL counts pixels *of the resized image*, or that a 32 x 32
grid is made of tokens of its own. Each class does both directions, so training and inference cannot disagree.

Round trip: a coordinate inside the image comes back within half a bin, that is W/2000 ("norm1000"), half a resized
pixel ("pixels") or W/64 ("bins"), at 0 and at W too.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmtune.types import Box, ImageGeometry, VlmtuneError

# Innermost pairs only: of "<box><box>...</box>" the first opening is noise. Linear in the length of the text, because
# the scan that starts at one opening stops at the next.
_TAGGED = re.compile(r"<box>((?:(?!<box>).)*?)</box>", re.DOTALL)

# At most six digits each: int() refuses very long ones, and no image is a million pixels wide. ASCII digits only.
_NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)\s*"
_ONE_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_BOX_LIST = re.compile(rf"\s*\[\s*{_ONE_BOX.pattern}(?:\s*,\s*{_ONE_BOX.pattern})*\s*\]\s*")

_ONE_BIN = re.compile(r"<loc_([0-9]{2})>")
_BIN_LIST = re.compile(r"\s*(?:<loc_[0-9]{2}>\s*)+")


class Coordinates(ABC):
    """One convention for boxes, both directions. A new convention says how the inside of a tag is written and read."""

    name: str

    def render(self, boxes: Sequence[Box], geometry: ImageGeometry, region: bool = False) -> str:
        """The boxes (original pixels) as this model writes them, in `<region>` or `<box>` tags; "" when there are none.

        What sticks out of the image is clipped to it. VlmtuneError: a box that is not finite or has x2 < x1 or y2 < y1.
        """
        if not boxes:
            return ""
        tag = "region" if region else "box"
        inside = self._write([_clipped(box, geometry) for box in boxes], geometry)
        return f"<{tag}>{inside}</{tag}>"

    def parse(self, text: str, geometry: ImageGeometry) -> list[Box]:
        """Every box in the `<box>` tags of a reply, in original pixels; never raises.

        A tag whose inside does not follow the convention gives no box. Neither does a box with x2 < x1 or y2 < y1, or
        one that lies outside the image altogether; one that sticks out is clipped to the image. `<region>` tags are
        what a question refers to, not answers, and are not read.
        """
        boxes = []
        for match in _TAGGED.finditer(text):
            for x1, y1, x2, y2 in self._read(match.group(1), geometry):
                ordered = x1 <= x2 and y1 <= y2
                inside = x1 <= geometry.width and y1 <= geometry.height and x2 >= 0 and y2 >= 0
                if ordered and inside:
                    boxes.append(_clipped((x1, y1, x2, y2), geometry))
        return boxes

    def tokens(self) -> list[str]:
        """Tokens the tokenizer must learn for this convention.

        Add them as ordinary tokens: special ones vanish from text that is decoded with `skip_special_tokens=True`.
        """
        return []

    @abstractmethod
    def _write(self, boxes: list[Box], geometry: ImageGeometry) -> str:
        """Clipped boxes in original pixels -> the inside of one tag."""

    @abstractmethod
    def _read(self, inside: str, geometry: ImageGeometry) -> list[Box]:
        """The inside of one tag -> boxes in original pixels, [] when malformed."""


@dataclass(frozen=True)
class IntegerList(Coordinates):
    """`[[x1,y1,x2,y2],[...]]` with integers from 0 to `extent(geometry)`, which is (steps across, steps down)."""

    name: str
    extent: Callable[[ImageGeometry], tuple[int, int]]

    def _write(self, boxes: list[Box], geometry: ImageGeometry) -> str:
        across, down = self.extent(geometry)
        scales = (across / geometry.width, down / geometry.height) * 2
        rows = (",".join(str(round(value * scale)) for value, scale in zip(box, scales, strict=True)) for box in boxes)
        return "[" + ",".join(f"[{row}]" for row in rows) + "]"

    def _read(self, inside: str, geometry: ImageGeometry) -> list[Box]:
        if not _BOX_LIST.fullmatch(inside):
            return []
        across, down = self.extent(geometry)
        scale_x, scale_y = geometry.width / across, geometry.height / down
        return [
            (float(x1) * scale_x, float(y1) * scale_y, float(x2) * scale_x, float(y2) * scale_y)
            for x1, y1, x2, y2 in _ONE_BOX.findall(inside)
        ]


@dataclass(frozen=True)
class BinTokens(Coordinates):
    """Four tokens per box, `<loc_03><loc_07><loc_12><loc_15>` = x1 y1 x2 y2 on a grid of `count` x `count` cells.

    Bin i covers [i, i + 1) * W / count and stands for its centre; the last one includes W, half a bin from its centre.
    """

    name: str
    count: int = 32

    def tokens(self) -> list[str]:
        return ["<box>", "</box>", "<region>", "</region>", *(self._token(index) for index in range(self.count))]

    def _token(self, index: int) -> str:
        return f"<loc_{index:02d}>"

    def _write(self, boxes: list[Box], geometry: ImageGeometry) -> str:
        sides = (geometry.width, geometry.height) * 2
        return "".join(
            self._token(min(int(value / side * self.count), self.count - 1))
            for box in boxes
            for value, side in zip(box, sides, strict=True)
        )

    def _read(self, inside: str, geometry: ImageGeometry) -> list[Box]:
        if not _BIN_LIST.fullmatch(inside):
            return []
        bins = [int(digits) for digits in _ONE_BIN.findall(inside)]
        if len(bins) % 4 or max(bins) >= self.count:
            return []
        cell_x, cell_y = geometry.width / self.count, geometry.height / self.count
        values = [(index + 0.5) * (cell_x, cell_y)[place % 2] for place, index in enumerate(bins)]
        return [tuple(values[start : start + 4]) for start in range(0, len(values), 4)]


_CONVENTIONS: tuple[Coordinates, ...] = (
    IntegerList("norm1000", extent=lambda geometry: (1000, 1000)),
    IntegerList("pixels", extent=lambda geometry: (geometry.resized_width, geometry.resized_height)),
    BinTokens("bins"),
)


def coordinates(name: str) -> Coordinates:
    """The convention called `name`: "norm1000" (Qwen2-VL, Qwen3-VL), "pixels" (Qwen2.5-VL) or "bins" (32 x 32 tokens).

    VlmtuneError: no such convention.
    """
    known = {convention.name: convention for convention in _CONVENTIONS}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(known)}."
        raise VlmtuneError(f"Unknown coordinate convention {name!r}; {remedy}")
    return known[name]


def _clipped(box: Box, geometry: ImageGeometry) -> Box:
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box) or x2 < x1 or y2 < y1:
        raise VlmtuneError(f"Box {tuple(box)} is not x1 <= x2, y1 <= y2 in finite pixels; correct it in the data.")
    width, height = geometry.width, geometry.height
    return (_between(x1, width), _between(y1, height), _between(x2, width), _between(y2, height))


def _between(value: float, side: int) -> float:
    return min(max(float(value), 0.0), float(side))
