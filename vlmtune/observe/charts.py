"""Line charts as SVG, drawn by a template: no JavaScript, no library in the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# One chart, in SVG units. They are about CSS pixels in the three-column grid and on a phone, so text keeps its size.
CHART_WIDTH, CHART_HEIGHT = 380, 212
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 34
POINTS_PER_LINE = 180  # more cannot be told apart at this width; a long run is averaged down to it
COLOURS = 8  # how many line colours the style sheet defines


@dataclass(frozen=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series as drawn: SVG paths between gaps, dots where a value stands alone."""

    label: str
    colour: int
    dashed: bool
    paths: list[str]
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    marks: list[Tick]


def draw_chart(
    title: str,
    unit: str,
    series: dict[str, Sequence[tuple[float, float | None]]],
    scores: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart | None:
    """Lines of (step, value) points on shared axes; None when no series has a finite value.

    marks: (step, name) of what begins there, drawn upright.

    Missing and non-finite values are gaps. The y axis starts at 0 unless that would flatten the lines; of `scores` that
    lie between 0 and 1 it is all of 0 to 1, so that charts can be compared.
    """
    thinned = {label: _thinned(points) for label, points in series.items()}
    finite = [(x, y) for points in thinned.values() for x, y in points if y is not None]
    if not finite:
        return None
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    if scores and y_low >= 0 and y_high <= 1:
        y_low, y_high = 0.0, 1.0
    elif 0 <= y_low < 0.6 * y_high:
        y_low = 0.0
    y_values = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_values[0]), max(y_high, y_values[-1])
    x_span = (x_high - x_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / x_span * (CHART_WIDTH - LEFT - RIGHT)
        down = (y_high - y) / (y_high - y_low) * (CHART_HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(TOP + down, 1)

    lines = []
    for number, (label, points) in enumerate(thinned.items()):
        runs = [[place(x, y) for x, y in run] for run in _unbroken(points)]
        if runs:
            last = next(y for _, y in reversed(series[label]) if y is not None and math.isfinite(y))
            paths = ["M" + "L".join(f"{x:g} {y:g}" for x, y in run) for run in runs if len(run) > 1]
            dots = [run[0] for run in runs if len(run) == 1]
            lines.append(Line(label, number % COLOURS, number >= COLOURS, paths, dots, number_text(last)))
    x_values = [x for x in nice_ticks(x_low, x_high) if x_low <= x <= x_high and x == int(x)] or [x_low]
    x_ticks = [Tick(place(x, y_low)[0], number_text(x)) for x in x_values]
    y_ticks = [Tick(place(x_low, y)[1], number_text(y)) for y in y_values]
    upright = [Tick(place(x, y_low)[0], name) for x, name in marks if x_low <= x <= x_high]
    return Chart(title, unit, x_ticks, y_ticks, lines, upright)


def number_text(value: float) -> str:
    """A number as an axis or a table shows it: 0.031, 2e-4, 12.5k, 1.03M."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'B': 1e9, 'M': 1e6, 'k': 1e3}[letter]:.3g}{letter}"
    if size >= 1000:
        return f"{value:.0f}"
    if size < 2e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most POINTS_PER_LINE points, each the mean of neighbours; None marks a gap."""
    size = math.ceil(len(points) / POINTS_PER_LINE) or 1
    thinned = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [float(y) for _, y in bucket if y is not None and math.isfinite(y)]
        middle = sum(x for x, _ in bucket) / len(bucket)
        thinned.append((middle, sum(values) / len(values) if values else None))
    return thinned


def _unbroken(points: Iterable[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
