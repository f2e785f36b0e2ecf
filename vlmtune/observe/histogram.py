"""How long the samples of a source are, or how large its images: bars, and the limit as a line (SPEC A6, H1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.observe.charts import number_text

WIDTH, HEIGHT, BASE = 560, 120, 96  # units of the drawing; the bars stand on BASE, the ticks below it
BARS = 56


@dataclass(frozen=True)
class Bar:
    """x, y, width, height in units of the drawing; over: samples in it are above the limit."""

    x: float
    y: float
    width: float
    height: float
    over: bool
    label: str


@dataclass(frozen=True)
class Histogram:
    """title: what is drawn; limit: where the limit lies, None when there is none or no sample comes near it."""

    title: str
    sentence: str
    bars: list[Bar]
    limit: float | None
    ticks: list[tuple[float, str]]


def length_histogram(name: str, sentence: str, lengths: Sequence[int], limit: int | None) -> Histogram:
    """lengths: tokens of each sample of the source called `name`; sentence: what is said beside the drawing."""
    return histogram(f"{name}: tokens per sample", sentence, lengths, "tokens", "samples", limit)


def histogram(
    title: str, sentence: str, values: Sequence[int], unit: str, things: str, limit: int | None = None
) -> Histogram:
    """values: at least one, each at least 1; unit: of the values; things: what has them.

    The limit is an edge between two bars, so no bar holds samples on both sides of it.
    """
    values = np.asarray(values)
    longest = int(values.max())
    width = max(1, -(-longest // BARS))  # units per bar
    shift = -(limit or 0) % width  # by how much the first bar is narrower
    counts = np.bincount((values - 1 + shift) // width)
    scale = WIDTH / (len(counts) * width - shift)
    bars = []
    for n in np.flatnonzero(counts):
        first, last = max(int(n) * width - shift, 0), (int(n) + 1) * width - shift
        height = max(BASE * counts[n] / counts.max(), 1.0)  # one sample in a million is seen
        bars.append(
            Bar(
                round(first * scale, 2), round(BASE - height, 2),
                round((last - first) * scale - 1, 2), round(height, 2),
                limit is not None and first >= limit,
                f"{first + 1:,} to {last:,} {unit}: {counts[n]:,} {things}",
            )
        )  # fmt: skip
    ticks = [round(longest * share / 4) for share in range(5)]
    return Histogram(
        title,
        sentence,
        bars,
        round(limit * scale, 2) if limit is not None and limit < longest else None,
        [(round(tick * scale, 2), number_text(tick)) for tick in ticks],
    )
