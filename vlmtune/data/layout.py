"""What is where in a scene, before anything is drawn: objects, the photo behind them, the rules against leakage.

A scene is 128 x 128 px with at most one object per quadrant, so that a place ("top left") names one object.

Leakage rules between the training and the validation split:
- photos: 7 for training, 3 for validation;
- pairs of concepts: 15 % of all pairs are held out by hash. No training scene contains one; every validation scene
  with two or more concepts does;
- "Which photo?" cannot be answered for a photo never seen, so for that question alone validation uses the training
  photos, but only their reserved strip: the rightmost 112 px, which no training scene ever shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import Literal

from vlmtune.data.atlas import PHOTOS, Split, atlas, bucket, photo, sprite

SIZE = 128  # width and height of a scene in pixels
QUADRANT = SIZE // 2
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}  # (row, column)
OBJECT_SIZES = (30, 52)  # longer side of an object, in pixels
CROP_SIZES = (96, 160)  # side of the square cut from a photo, in pixels
RESERVED_STRIP = 112  # pixels at the right edge of a training photo
HELD_OUT_PAIRS = 15  # percent

PhotoArea = Literal["train", "val", "reserved"]


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene. `box` is the bounding box of its mask, x1, y1, x2, y2 in pixels, x2 and y2 exclusive.

    `size` (longer side of the picture) and `corner` (its upper left pixel in the scene) say how it is drawn.
    """

    name: str
    kind: str
    where: str
    box: tuple[int, int, int, int]
    size: int
    corner: tuple[int, int]

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def area(self) -> int:
        """Of the box, in square pixels."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


@dataclass(frozen=True)
class Background:
    """The square `crop` (x1, y1, x2, y2 in pixels of the photo) behind a scene; `white` in [0, 1] washes it out."""

    photo: str
    crop: tuple[int, int, int, int]
    white: float


@dataclass(frozen=True)
class Scene:
    """Objects in reading order and what is behind them."""

    objects: tuple[SceneObject, ...]
    background: Background


@cache
def held_out(name: str, other: str) -> bool:
    """Is this pair of concepts kept for validation? The order of the two does not matter."""
    return bucket("|".join(sorted((name, other)))) < HELD_OUT_PAIRS


def choose_background(random: Random, area: PhotoArea, white: tuple[float, float] = (0.35, 0.65)) -> Background:
    """A random crop of a random photo; `area` says of which photos, and of which part of them."""
    name = random.choice(PHOTOS["val" if area == "val" else "train"])
    width, height = photo(name).size
    left, right = {
        "train": (0, width - RESERVED_STRIP),
        "val": (0, width),
        "reserved": (width - RESERVED_STRIP, width),
    }[area]
    smallest, largest = CROP_SIZES
    side = random.randint(smallest, min(largest, right - left, height))
    x, y = random.randint(left, right - side), random.randint(0, height - side)
    return Background(name, (x, y, x + side, y + side), random.uniform(*white))


def choose_concepts(random: Random, names: Sequence[str], split: Split, copies: int) -> list[str]:
    """1 to 4 names, the first one `copies` times; their pairs obey the rule of the split."""
    while True:
        count = max(copies, random.choice((1, 2, 2, 3, 3, 4)))
        chosen = random.sample(names, count - copies + 1)
        pairs_held_out = [held_out(*pair) for pair in combinations(chosen, 2)]
        if not any(pairs_held_out) if split == "train" else (any(pairs_held_out) or not pairs_held_out):
            return chosen[:1] * (copies - 1) + chosen


def arrange(random: Random, names: Sequence[str], split: Split, copies: int, area: PhotoArea) -> Scene:
    """A random scene of concepts from `names`, one of them `copies` times, before a photo of `area`."""
    chosen = choose_concepts(random, names, split, copies)
    cells = random.sample(list(PLACES), len(chosen))
    objects = [_place(random, name, cell) for name, cell in sorted(zip(chosen, cells, strict=True), key=lambda p: p[1])]
    return Scene(tuple(objects), choose_background(random, area))


def _place(random: Random, name: str, cell: tuple[int, int]) -> SceneObject:
    size = random.randint(*OBJECT_SIZES)
    drawn = sprite(name, size)
    width, height = drawn.picture.size
    row, column = cell
    x = column * QUADRANT + random.randint(0, QUADRANT - width)
    y = row * QUADRANT + random.randint(0, QUADRANT - height)
    x1, y1, x2, y2 = drawn.box
    return SceneObject(name, atlas()[name].kind, PLACES[cell], (x + x1, y + y1, x + x2, y + y2), size, (x, y))
