"""The pictures, photos and fonts that ship with the package (`embedded/`; licences in `embedded/NOTICE`).

466 named drawings of 13 kinds lie in one picture, the atlas, in cells of 48 px. 96 of them are the concepts of the
embedded scenes: 72 `base` concepts a model first learns, and 24 `new` ones for a second stage.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
from PIL import Image, ImageFont

ConceptGroup = Literal["base", "new", "all"]
Split = Literal["train", "val"]

CONCEPTS = 96
BASE_CONCEPTS = 72
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": ("astronaut", "chelsea", "grass", "gravel", "camera", "hubble_deep_field", "rocket"),
    "val": ("coffee", "brick", "clock"),
}
FONTS: dict[Split, tuple[str, ...]] = {
    "train": ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif-Bold"),
    "val": ("STIXGeneral",),
}
OPAQUE = 96  # a pixel belongs to an object when its alpha (0..255) is above this
DOMINANT_SHARE = 0.55  # of the opaque pixels, for a colour to be the colour of a picture
RUNNER_UP_SHARE = 0.25  # and no other colour may have more than this


@dataclass(frozen=True)
class Concept:
    """A named drawing: its `kind` ("animal", "tool" …) and its cell in the atlas as x1, y1, x2, y2 in pixels."""

    name: str
    kind: str
    cell: tuple[int, int, int, int]


@dataclass(frozen=True)
class Sprite:
    """A drawing resized for a scene: RGBA `picture`, `mask` (mode L, 0 or 255) and the mask's bounding box in it."""

    picture: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    @property
    def area(self) -> int:
        """Of the box, in square pixels."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


def bucket(text: str, buckets: int = 100) -> int:
    """A number in [0, buckets) that depends on the text alone; Python's `hash` changes from process to process."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % buckets


def _read(path: str) -> bytes:
    return files("vlmtune.data").joinpath("embedded", *path.split("/")).read_bytes()


@cache
def atlas() -> dict[str, Concept]:
    """All 466 concepts by name, in the order of the atlas."""
    rows = json.loads(_read("atlas.json"))["items"]
    return {name: Concept(name, kind, (x, y, x + w, y + h)) for name, kind, _, x, y, w, h in rows}


@cache
def _atlas_picture() -> Image.Image:
    return Image.open(io.BytesIO(_read("atlas.png"))).convert("RGBA")


@cache
def _round_robin() -> tuple[str, ...]:
    """The 96 concepts: one of each kind per round, kinds in alphabetical order, concepts of a kind in hash order."""
    by_kind: dict[str, list[str]] = {}
    for concept in atlas().values():
        by_kind.setdefault(concept.kind, []).append(concept.name)
    columns = [sorted(by_kind[kind], key=lambda name: bucket(name, 10**8)) for kind in sorted(by_kind)]
    rounds = range(max(map(len, columns)))
    return tuple(column[i] for i in rounds for column in columns if i < len(column))[:CONCEPTS]


def concept_names(group: ConceptGroup) -> list[str]:
    """The concepts of a group, always in the same order: `base` the first 72 of `all`, `new` the last 24.

    As `all` is a round-robin over the 13 kinds, `base` has 5 or 6 of every kind and `new` 1 or 2.
    """
    names = _round_robin()
    return list({"base": names[:BASE_CONCEPTS], "new": names[BASE_CONCEPTS:], "all": names}[group])


@lru_cache(maxsize=4096)  # 96 concepts x 23 sizes: at most 30 MB, and resizing is the dearest part of a scene
def sprite(name: str, size: int) -> Sprite:
    """The drawing with its longer side `size` pixels long."""
    picture = _atlas_picture().crop(atlas()[name].cell)
    scale = size / max(picture.size)
    shape = (max(6, round(picture.width * scale)), max(6, round(picture.height * scale)))
    picture = picture.resize(shape, Image.Resampling.LANCZOS)
    mask = picture.getchannel("A").point([255 * (alpha > OPAQUE) for alpha in range(256)])
    return Sprite(picture, mask, mask.getbbox())


@cache
def photo(name: str) -> Image.Image:
    """RGB, 256 px high, 256 to 385 px wide."""
    return Image.open(io.BytesIO(_read(f"bg/{name}.jpg"))).convert("RGB")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(_read(f"fonts/{name}-ascii.ttf")), size)


def colour_name(red: int, green: int, blue: int) -> str | None:
    """The colour's everyday name, or None between two names, where people would disagree.

    Channels are 0..255. Hue is in degrees, saturation and value in [0, 1].
    """
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.28:
        return "black"
    if value < 0.45 and saturation < 0.6:
        return None
    if saturation < 0.12:
        return "white" if value > 0.88 else "grey" if value < 0.8 else None
    if saturation < 0.3:
        return "grey" if value < 0.7 and saturation < 0.25 else None
    if 8 <= hue < 45 and value < 0.78:
        return "brown"
    if hue < 9 or hue >= 345:
        return "red" if saturation > 0.55 else "pink"
    if 300 <= hue < 345:
        return "pink"
    if 18 <= hue < 38:
        return "orange"
    if 43 <= hue < 62:
        return "yellow"
    if 66 <= hue < 170:
        return "green"
    if 185 <= hue < 245:
        return "blue"
    if 260 <= hue < 300:
        return "purple"
    return None


@cache
def dominant_colour(name: str) -> str | None:
    """The colour of a concept, counted over the opaque pixels of its drawing in the atlas; None if none dominates."""
    pixels = np.asarray(_atlas_picture().crop(atlas()[name].cell)).reshape(-1, 4).tolist()
    counts = Counter(colour_name(*pixel[:3]) for pixel in pixels if pixel[3] > OPAQUE)
    total = counts.total()
    counts.pop(None, None)
    ranked = [(colour, count / total) for colour, count in counts.most_common(2)] + [(None, 0.0)] * 2
    (colour, share), (_, runner_up) = ranked[:2]
    return colour if share >= DOMINANT_SHARE and runner_up <= RUNNER_UP_SHARE else None
