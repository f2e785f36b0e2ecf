"""What every coordinate convention shares: typed places on one side, text on the other, the sample's geometry between.

Everywhere else in vlmtune a box is `types.Box` and a point `types.Point`, in pixels of the upright original. A
convention (`data/grounding.py`) writes and reads fractions of the model's canvas; the classes here turn those into
original pixels and back, with the resize, crop and padding of the sample at hand (`types.ImageGeometry`).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from vlmtune.types import Box, ImageGeometry, Point, VlmtuneError

Tag = Literal["box", "region", "point", "click"]
TAGS: tuple[Tag, ...] = ("box", "region", "point", "click")

Row = tuple[float, ...]
"""One place as fractions of the canvas: u1, v1, u2, v2 of a box or region, u, v of a point or click."""

SLACK = 1.0
"""Pixels by which data may miss its image: tools that count pixels inclusively or round end up this far outside."""

ROUNDING = 1e-6
"""Pixels that float64 may be off after a way there and back."""


def row_length(tag: Tag) -> int:
    return 4 if tag in ("box", "region") else 2


class Coordinates(ABC):
    """One convention, both directions. A new one says how the rows of a tag become text and are found in text."""

    name: str
    number: ClassVar[re.Pattern]
    """What one number looks like."""
    numbers_of_a_box: ClassVar[int] = 4

    def render(self, boxes: Sequence[Box], geometry: ImageGeometry, region: bool = False) -> str:
        """The boxes (original pixels) as this model writes them; "" when there are none.

        region: a place the text refers to instead of an answer. What the model does not see of a box (outside a crop)
        is cut off. VlmtuneError: a box that is not finite, has x2 < x1 or y2 < y1, sticks out of its image by more
        than a pixel, or of which the model sees nothing.
        """
        rows = [box_row(box, geometry) for box in boxes]
        return self._write("region" if region else "box", rows, geometry) if rows else ""

    def render_points(self, points: Sequence[Point], geometry: ImageGeometry, click: bool = False) -> str:
        """The points (original pixels) as this model writes them; "" when there are none.

        click: where somebody acts. VlmtuneError: a point that is not finite or that the model does not see.
        """
        rows = [_point_to_row(point, geometry) for point in points]
        return self._write("click" if click else "point", rows, geometry) if rows else ""

    def parse(self, text: str, geometry: ImageGeometry) -> list[Box]:
        """Every box that a reply answers, in original pixels and in the order of the text; never raises.

        What does not follow the convention gives no box. Neither does a box with x2 < x1 or y2 < y1, or one that lies
        outside the image altogether; one that sticks out is clipped to the image.
        """
        slack = self._slack(geometry)
        boxes = (_row_to_box(row, geometry, slack) for row in self._read("box", text, geometry))
        return [box for box in boxes if box is not None]

    def parse_points(self, text: str, geometry: ImageGeometry, click: bool = False) -> list[Point]:
        """Every point (or, with `click`, every click) of a reply, in original pixels and in order; never raises.

        What does not follow the convention gives no point, and neither does a point outside the image.
        """
        slack = self._slack(geometry)
        rows = self._read("click" if click else "point", text, geometry)
        points = (_row_to_point(row, geometry, slack) for row in rows)
        return [point for point in points if point is not None]

    def box_starts(self, text: str) -> list[int]:
        """Where the first number of every box begins in a text that `render` wrote."""
        return [match.start() for match in self.number.finditer(text)][:: self.numbers_of_a_box]

    def tokens(self) -> list[str]:
        """Tokens the tokenizer must have for this convention.

        They are ordinary added tokens: special ones vanish from text decoded with `skip_special_tokens=True`.
        """
        return []

    def _slack(self, geometry: ImageGeometry) -> Point:
        """Half a bin in original pixels: so far into a margin the edge of a padded image may have been written."""
        (left, top), (right, bottom) = geometry.to_original(0.0, 0.0), geometry.to_original(1.0, 1.0)
        across, down = self._bins(geometry)
        return (right - left) / across / 2 + ROUNDING, (bottom - top) / down / 2 + ROUNDING

    @abstractmethod
    def _bins(self, geometry: ImageGeometry) -> tuple[int, int]:
        """Into how many bins the canvas is divided: across, down."""

    @abstractmethod
    def without_places(self, text: str) -> str:
        """The text with everything this convention writes taken out, well formed inside or not."""

    @abstractmethod
    def _write(self, tag: Tag, rows: list[Row], geometry: ImageGeometry) -> str:
        """Rows with all fractions in [0, 1] -> text."""

    @abstractmethod
    def _read(self, tag: Tag, text: str, geometry: ImageGeometry) -> list[Row]:
        """Rows found in a reply, fractions of any finite size; what is malformed is left out."""


class Tagged(Coordinates):
    """A convention that puts its places between an opening and a closing tag.

    Of nested tags only the innermost pair counts: of "<box><box>…</box>" the first opening is noise. The search is
    linear in the length of the text, because what starts at one opening tag stops at the next.
    """

    names: ClassVar[dict[Tag, str]] = {tag: tag for tag in TAGS}

    def without_places(self, text: str) -> str:
        return _pair(*dict.fromkeys(self.names.values())).sub("", text)

    def _write(self, tag: Tag, rows: list[Row], geometry: ImageGeometry) -> str:
        return f"<{self.names[tag]}>{self._write_inside(rows, geometry)}</{self.names[tag]}>"

    def _read(self, tag: Tag, text: str, geometry: ImageGeometry) -> list[Row]:
        return [row for _, row in self._located(tag, text, geometry)]

    def _located(self, tag: Tag, text: str, geometry: ImageGeometry) -> Iterable[tuple[int, Row]]:
        """(place in the text, row)"""
        for match in _pair(self.names[tag]).finditer(text):
            for row in self._read_inside(match["inside"], row_length(tag), geometry):
                yield match.start(), row

    @abstractmethod
    def _write_inside(self, rows: list[Row], geometry: ImageGeometry) -> str:
        """Rows -> what stands between the tags."""

    @abstractmethod
    def _read_inside(self, inside: str, length: int, geometry: ImageGeometry) -> list[Row]:
        """What stands between the tags -> rows of `length` numbers, [] when malformed."""


def _pair(*names: str) -> re.Pattern:
    """A pair of tags of one of these names, with no opening tag of them in between (Python keeps compiled patterns)."""
    any_name = "|".join(map(re.escape, names))
    return re.compile(f"<(?P<name>{any_name})>(?P<inside>(?:(?!<(?:{any_name})>).)*?)</(?P=name)>", re.DOTALL)


# ---- original pixels <-> fractions of the canvas ------------------------------------------------------------------


def box_row(box: Box, geometry: ImageGeometry) -> Row:
    """A box in original pixels -> what the model sees of it, in fractions of the canvas. Raises as `render` does."""
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box) or x2 < x1 or y2 < y1:
        raise VlmtuneError(f"Box {tuple(box)} is not x1 <= x2, y1 <= y2 in finite pixels; correct it in the data.")
    width, height = geometry.width, geometry.height
    if min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        raise VlmtuneError(
            f"Box {tuple(box)} sticks out of its image of {width}x{height} pixels; correct it in the data "
            "(x1, y1, x2, y2 in pixels of the upright file).",
            code="box_outside",
        )
    inside = _clip(box, (0.0, 0.0, width, height))
    seen = _clip(box, geometry.visible)
    is_lost = any(
        inside[n + 2] < geometry.visible[n]
        or inside[n] > geometry.visible[n + 2]
        or (inside[n + 2] > inside[n] and seen[n + 2] <= seen[n])
        for n in (0, 1)
    )
    if is_lost:
        raise VlmtuneError(_unseen(f"Box {tuple(box)}", geometry))
    return _unit(*geometry.to_canvas(*seen[:2]), *geometry.to_canvas(*seen[2:]))


def _point_to_row(point: Point, geometry: ImageGeometry) -> Row:
    x, y = point
    if not (math.isfinite(x) and math.isfinite(y)):
        raise VlmtuneError(f"Point {tuple(point)} is not finite; correct it in the data.")
    if not _is_inside(point, (0.0, 0.0, geometry.width, geometry.height), (SLACK, SLACK)):
        raise VlmtuneError(
            f"Point {tuple(point)} lies outside its image of {geometry.width}x{geometry.height} pixels; correct it in "
            "the data (x, y in pixels of the upright file).",
            code="box_outside",
        )
    if not _is_inside(point, geometry.visible, (SLACK, SLACK)):
        raise VlmtuneError(_unseen(f"Point {tuple(point)}", geometry))
    return _unit(*geometry.to_canvas(*_move_inside(point, geometry.visible)))


def _row_to_box(row: Row, geometry: ImageGeometry, slack: Point) -> Box | None:
    x1, y1 = geometry.to_original(*row[:2])
    x2, y2 = geometry.to_original(*row[2:])
    image = (0.0, 0.0, float(geometry.width), float(geometry.height))
    is_ordered = x1 <= x2 and y1 <= y2
    touches = all(
        last >= -margin and first <= side + margin
        for first, last, side, margin in ((x1, x2, image[2], slack[0]), (y1, y2, image[3], slack[1]))
    )
    return _clip((x1, y1, x2, y2), image) if is_ordered and touches else None


def _row_to_point(row: Row, geometry: ImageGeometry, slack: Point) -> Point | None:
    image = (0.0, 0.0, float(geometry.width), float(geometry.height))
    point = geometry.to_original(*row)
    return _move_inside(point, image) if _is_inside(point, image, slack) else None


def _unseen(what: str, geometry: ImageGeometry) -> str:
    left, top, right, bottom = geometry.visible
    return (
        f"{what} lies outside what the model sees of its image of {geometry.width}x{geometry.height} pixels, which is "
        f"x {left:.1f} to {right:.1f} and y {top:.1f} to {bottom:.1f}: the image processor crops (do_center_crop); use "
        "one that does not crop, or remove the sample."
    )


def _clip(box: Box, bounds: Box) -> Box:
    return (*_move_inside(box[:2], bounds), *_move_inside(box[2:], bounds))


def _move_inside(point: Point, bounds: Box) -> Point:
    (x, y), (left, top, right, bottom) = point, bounds
    return min(max(float(x), left), right), min(max(float(y), top), bottom)


def _is_inside(point: Point, bounds: Box, slack: Point) -> bool:
    (x, y), (left, top, right, bottom), (across, down) = point, bounds, slack
    return left - across <= x <= right + across and top - down <= y <= bottom + down


def _unit(*fractions: float) -> Row:
    """Into [0, 1]: the edge of a crop may come out a rounding error outside."""
    return tuple(min(max(fraction, 0.0), 1.0) for fraction in fractions)
