"""How much there is to see in an image, and the share of its pixels or tokens that it therefore gets (SPEC F6).

A plain picture needs fewer image tokens than a crowded one. Complexity is measured on a small grey copy of the decoded
image, so that it costs little beside decoding; a rule turns it into a share. Dynamic-resolution families then resize the
image to fewer pixels; families whose processor makes all images the same size average squares of tokens (`pictures`).
The rule is set on the image processor, as limits of pixels are (`resolution`), and saved with it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from vlmtune.types import VlmtuneError

Measure = Literal["edges", "entropy", "text", "detail"]
SIDE = 256  # of the grey copy; the longer one, at most
STEEP = 24  # of 255 grey levels between neighbours: an edge that is seen
STROKE = 48  # of 255: by so much a stroke is darker or lighter than what lies on both of its sides
WIDEST = 2  # pixels of the grey copy between a stroke and what lies beside it
STEPS = 8  # shares are eighths: few limits, each with its own copy of the image processor
MERGED = 1 / 4  # of its tokens an image has whose squares of 2 x 2 are averaged
ATTRIBUTE = "vlmtune_complexity"  # of an image processor


def thumbnail(image: Image.Image) -> np.ndarray:
    """float64[H, W], 0 to 255: the grey image with its longer side at most SIDE, by averages of whole blocks; small
    images stay as they are. image: decoded, upright, RGB."""
    factor = math.ceil(max(image.size) / SIDE)
    grey = image.convert("L")
    return np.asarray(grey.reduce(factor) if factor > 1 else grey, dtype=np.float64)


def complexity(image: Image.Image, measure: Measure) -> float:
    """In [0, 1]; the same for the same pixels everywhere. image: decoded, upright, RGB."""
    return float(_MEASURES[measure](thumbnail(image)))


def edges(grey: np.ndarray) -> float:
    """The share of pixels that differ from the next one to the right or below by at least STEEP: outlines, texture."""
    steep = np.zeros(grey.shape, dtype=bool)
    steep[:, :-1] |= np.abs(np.diff(grey, axis=1)) >= STEEP
    steep[:-1] |= np.abs(np.diff(grey, axis=0)) >= STEEP
    return steep.mean()


def entropy(grey: np.ndarray) -> float:
    """Of the histogram of 64 grey levels, as a share of the most it could be: how many tones there are, not where."""
    counts = np.bincount(np.minimum(grey.astype(np.int64) // 4, 63).ravel(), minlength=64)
    shares = counts[counts > 0] / counts.sum()
    return min(1.0, max(0.0, -(shares * np.log2(shares)).sum() / 6))


def text(grey: np.ndarray) -> float:
    """The share of pixels on a fine stroke: by STROKE darker than both sides, or lighter, across or down. Writing is
    made of such strokes, outlines of objects mostly are not."""
    found = np.zeros(grey.shape, dtype=bool)
    for view, marks in ((grey, found), (grey.T, found.T)):
        if view.shape[1] > 2 * WIDEST:
            middle, before, after = view[:, WIDEST:-WIDEST], view[:, : -2 * WIDEST], view[:, 2 * WIDEST :]
            darker = np.minimum(before, after) - middle >= STROKE
            lighter = middle - np.maximum(before, after) >= STROKE
            marks[:, WIDEST:-WIDEST] |= darker | lighter
    return found.mean()


def detail(grey: np.ndarray) -> float:
    """What is lost when the picture is halved and enlarged again: the root of the mean squared difference, relative to
    that of the picture from its mean; 0 for a picture of one colour."""
    height, width = (side - side % 2 for side in grey.shape)
    if not height or not width or grey.std() < 1.0:  # less than one grey level is no detail but rounding
        return 0.0
    even = grey[:height, :width]
    blocks = even.reshape(height // 2, 2, width // 2, 2)
    lost = blocks - blocks.mean(axis=(1, 3), keepdims=True)
    return min(1.0, math.sqrt((lost**2).mean()) / even.std()) if even.std() > 0 else 0.0


_MEASURES = {"edges": edges, "entropy": entropy, "text": text, "detail": detail}


@dataclass(frozen=True)
class ComplexityRule:
    """The share of its own pixels an image gets: `least` up to complexity `simple`, all from `complex` on, linear
    between, rounded up to eighths.

    VlmtuneError: 0 < least < 1 and 0 <= simple < complex <= 1 do not hold, or there is no such measure.
    """

    measure: Measure
    least: float
    simple: float
    complex: float

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise VlmtuneError(
                f"data.complexity: there is no measure {self.measure!r}; it is one of {', '.join(get_args(Measure))}."
            )
        if not 0 < self.least < 1:
            raise VlmtuneError(f"data.complexity: least {self.least:g} is no share between 0 and 1; 0.25 is usual.")
        if not 0 <= self.simple < self.complex <= 1:
            raise VlmtuneError(
                f"data.complexity: simple {self.simple:g} and complex {self.complex:g} are not in order between 0 and "
                "1; an image up to simple gets the least, one from complex on everything."
            )

    def share(self, value: float) -> float:
        """Of an image of this complexity: a multiple of 1 / STEPS, at most 1."""
        way = min(max((value - self.simple) / (self.complex - self.simple), 0.0), 1.0)
        exact = self.least + (1 - self.least) * way
        return min(1.0, math.ceil(exact * STEPS - 1e-9) / STEPS)  # what is an eighth but for rounding stays one


def rule_of(image_processor: Any) -> ComplexityRule | None:
    """The rule that is set on an image processor. VlmtuneError: its folder holds one that cannot be read."""
    found = getattr(image_processor, ATTRIBUTE, None)
    if found is None:
        return None
    try:
        return ComplexityRule(**found)
    except TypeError as error:
        raise VlmtuneError(
            f"the image processor's {ATTRIBUTE!r} {found} is not of this version of vlmtune ({error}); write measure, "
            "least, simple and complex there, or remove it."
        ) from error


def set_rule(image_processor: Any, rule: ComplexityRule | None) -> None:
    """Set it in place, as plain values that `save_pretrained` writes; None: take it away."""
    if rule is not None:
        setattr(image_processor, ATTRIBUTE, asdict(rule))
    elif hasattr(image_processor, ATTRIBUTE):
        delattr(image_processor, ATTRIBUTE)
