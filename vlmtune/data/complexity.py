"""How much there is to see in an image: measured on a small grey copy of it, so that it costs little beside decoding.

What follows from it is in `complexity_rule`: a plain picture needs fewer image tokens than a crowded one.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vlmtune.data.complexity_rule import Measure

SIDE = 256  # of the grey copy; the longer one, at most
STEEP = 24  # of 255 grey levels between neighbours: an edge that is seen
STROKE = 48  # of 255: by so much a stroke is darker or lighter than what lies on both of its sides
WIDEST = 2  # pixels of the grey copy between a stroke and what lies beside it


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
    even = grey[:height, :width]
    if not even.size or even.std() < 1.0:  # less than one grey level is no detail but rounding
        return 0.0
    blocks = even.reshape(height // 2, 2, width // 2, 2)
    lost = blocks - blocks.mean(axis=(1, 3), keepdims=True)
    return min(1.0, math.sqrt((lost**2).mean()) / even.std())


def largest(grey: np.ndarray) -> float:
    """The largest of the four: an image is simple only where each of them says so."""
    return max(measure(grey) for measure in (edges, entropy, text, detail))


_MEASURES = {"edges": edges, "entropy": entropy, "text": text, "detail": detail, "largest": largest}
