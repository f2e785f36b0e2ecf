"""A comparison of methods in four forms: terminal tables, Markdown, a picture (SVG), and a page (SPEC C6).

The page is one file without scripts and requests; whatever stands in the data is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from vlmtune import __version__
from vlmtune.evaluate.comparison import Comparison, Figure, Row
from vlmtune.evaluate.intervals import Interval
from vlmtune.observe.page import Tick, nice_ticks, number_text, render_html, write_html

MIB = 2**20
# The picture, in SVG units.
PANEL, NAMES, BETWEEN, HEAD, LINE, FOOT = 250, 96, 26, 34, 30, 30
MARK = "*"
COST, QUALITY = (0, 2, 3, 4, 5, 6), (0, 7, 8, 9, 10, 11)
"""Columns of the terminal's tables, by number of `headings`."""


@dataclass(frozen=True)
class Point:
    """A method in a panel: x of the value and of the ends of its interval, y of its line."""

    y: float
    x: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Panel:
    title: str
    left: float
    right: float
    one: float  # where the baseline stands
    ticks: list[Tick]
    points: list[Point]


def headings(comparison: Comparison) -> list[str]:
    name = comparison.baseline
    return [
        "method", "learning rate", "trainable", "peak memory, MiB", f"of {name}", "samples/s", f"times {name}", "score",
        f"of {name}", f"of {name}'s gain", "held-out loss", f"minus {name}",
    ]  # fmt: skip


def cells(row: Row, rate: float | None) -> list[str]:
    """One for each heading; empty where there is nothing to say."""
    if not row.seeds:
        return [row.arm, _rate(rate), *["failed" if row.failed else "waiting"], *[""] * 9]
    score, loss = row.score, row.loss
    return [
        row.arm, _rate(rate), f"{row.trainable:,} ({row.trainable / row.parameters:.2%})",
        "" if row.memory is None else f"{row.memory.value / MIB:,.0f}", _ratio(row.memory_ratio),
        f"{row.speed.value:.3g}", _ratio(row.speed_ratio),
        "" if score is None else f"{100 * score.value.value:.1f} %", _share(score and score.ratio),
        _share(score and score.gain), f"{loss.value.value:.3f}", _signed(loss.difference),
    ]  # fmt: skip


def comparison_tables(comparison: Comparison) -> list[Table]:
    """What the methods cost, and what they bring; learning rates are printed with the plans."""
    names, rows = headings(comparison), [cells(row, None) for row in comparison.rows]
    tables = []
    for title, wanted in ((f"cost, compared with {comparison.baseline}", COST), ("quality on held-out data", QUALITY)):
        table = Table(title=title, title_justify="left")
        for number in wanted:
            table.add_column(names[number], justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[number] for number in wanted))
        tables.append(table)
    return tables


def metrics_table(comparison: Comparison) -> Table:
    """The mean of every held-out metric, marked where it differs from the baseline's."""
    table = Table(title="held-out metrics", title_justify="left")
    done = [row for row in comparison.rows if row.metrics]
    for name in ("metric", "base", *(row.arm for row in done)):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for figures in _by_metric(done):
        base = comparison.base.get(figures[0].name)
        shown = [f"{f.value.value:.3f}{MARK if differs(f) else ''}" for f in figures]
        table.add_row(figures[0].name, "" if base is None else f"{base:.3f}", *shown)
    table.caption = f"{MARK} differs from {comparison.baseline}: the interval of the difference is without 0"
    table.caption_justify = "left"
    return table


def differs(figure: Figure) -> bool:
    """Whether the interval of the difference to the baseline is without 0."""
    found = figure.difference
    return found is not None and found.low is not None and (found.low > 0 or found.high < 0)


def markdown(comparison: Comparison, rates: Mapping[str, float | None]) -> str:
    """Both tables with all intervals, failures and notes."""
    head = headings(comparison)
    lines = [
        f"# Methods, compared with {comparison.baseline}", "",
        "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(map(_in_table, cells(row, rates.get(row.arm)))) + " |" for row in comparison.rows), "",
    ]  # fmt: skip
    done = [row for row in comparison.rows if row.metrics]
    if done:
        lines += [
            "Held-out metrics; in brackets the difference to " + comparison.baseline + ":", "",
            f"| metric | base | {' | '.join(row.arm for row in done)} |", "| --- |" + " ---: |" * (len(done) + 1),
            *("| " + " | ".join(map(_in_table, cells)) + " |" for cells in metric_cells(comparison)), "",
        ]  # fmt: skip
    lines += [f"- {row.arm}, seed {seed}, failed: {why}" for row in comparison.rows for seed, why in row.failed.items()]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join([*lines, ""])


def metric_cells(comparison: Comparison) -> list[list[str]]:
    """Of every held-out metric: its name, the base's value, and those of all methods with intervals."""
    done = [row for row in comparison.rows if row.metrics]
    rows = []
    for figures in _by_metric(done):
        base = comparison.base.get(figures[0].name)
        shown = []
        for figure in figures:
            gap = "" if figure.difference is None else f" ({_signed(figure.difference)})"
            shown.append(f"{figure.value.value:.3f}{gap}")
        rows.append([figures[0].name, "" if base is None else f"{base:.3f}", *shown])
    return rows


def _by_metric(rows: Sequence[Row]) -> list[list[Figure]]:
    """The figures of all methods, metric by metric, scores before losses."""
    found = [[figure for row in rows for figure in row.metrics if figure.name == f.name] for f in rows[0].metrics]
    return sorted(found, key=lambda figures: figures[0].name.startswith("loss/"))


def plot(comparison: Comparison) -> str:
    """The picture of all ratios to the baseline, as SVG that stands alone or in a page."""
    rows = [row for row in comparison.rows if row.seeds]
    wanted = [
        (f"peak memory, of {comparison.baseline}", [row.memory_ratio for row in rows]),
        (f"speed, times {comparison.baseline}", [row.speed_ratio for row in rows]),
        (f"score, of {comparison.baseline}", [row.score and row.score.ratio for row in rows]),
        (f"held-out loss, minus {comparison.baseline}", [row.loss.difference for row in rows]),
    ]
    panels = []
    for title, found in wanted:
        if any(found):
            left = NAMES + len(panels) * (PANEL + BETWEEN)
            panels.append(_panel(title, found, left, 0.0 if "minus" in title else 1.0, rows, comparison))
    width = NAMES + len(panels) * (PANEL + BETWEEN)
    names = [(HEAD + (n + 0.5) * LINE, row.arm) for n, row in enumerate(rows)]
    return render_html(
        "comparison.svg.jinja", panels=panels, names=names, width=width, height=HEAD + len(rows) * LINE + FOOT,
        top=HEAD, bottom=HEAD + len(rows) * LINE,
    )  # fmt: skip


def _panel(
    title: str, found: Sequence[Interval | None], left: float, one: float, rows: Sequence[Row], comparison: Comparison
) -> Panel:
    """found: of every row an interval, or None. one: the baseline's own value."""
    ends = [end for interval in found if interval for end in (interval.low, interval.high, interval.value)]
    values = [*(end for end in ends if end is not None), one]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(*ticks, *values), max(*ticks, *values)

    def place(value: float) -> float:
        return round(left + 8 + (value - low) / (high - low) * (PANEL - 16), 1)

    points = []
    for number, (row, interval) in enumerate(zip(rows, found, strict=True)):
        y = HEAD + (number + 0.5) * LINE
        if interval is not None:
            whisker = [None if end is None else place(end) for end in (interval.low, interval.high)]
            points.append(Point(y, place(interval.value), *whisker, f"{interval.value:.2f}"))
        elif row.arm == comparison.baseline:
            points.append(Point(y, place(one), None, None, f"{one:.2f}"))
    marks = [Tick(place(value), number_text(value)) for value in ticks]
    return Panel(title, left, left + PANEL, place(one), marks, points)


def write_comparison_page(
    path: Path, comparison: Comparison, model: str, rates: Mapping[str, float | None],
    plans: Mapping[str, Sequence[str]], waiting: Sequence[str],
) -> Path:  # fmt: skip
    """plans: method -> its rules in words; waiting: trials that have not been run yet."""
    page = render_html(
        "comparison.html.jinja",
        comparison=comparison, model=model, plans=plans, waiting=waiting, plot=plot(comparison),
        headings=headings(comparison), rows=[cells(row, rates.get(row.arm)) for row in comparison.rows],
        metric_rows=metric_cells(comparison) if any(row.metrics for row in comparison.rows) else [],
        measured=[row.arm for row in comparison.rows if row.metrics], version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return write_html(path, page)


# ---- numbers in words ---------------------------------------------------------------------------------------------


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.2g}"


def _ratio(found: Interval | None) -> str:
    """ "0.62 [0.60, 0.64]"."""
    return "" if found is None else _with_ends(found, lambda value: f"{value:.2f}")


def _share(found: Interval | None) -> str:
    """ "96 % [93, 99]"."""
    if found is None:
        return ""
    ends = "" if found.low is None else f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return f"{100 * found.value:.0f} %{ends}"


def _signed(found: Interval | None) -> str:
    """ "+0.012 [-0.003, 0.027]"."""
    return "" if found is None else _with_ends(found, lambda value: f"{value:+.3f}")


def _with_ends(found: Interval, shown: Callable[[float], str]) -> str:
    return shown(found.value) + ("" if found.low is None else f" [{shown(found.low)}, {shown(found.high)}]")


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")
