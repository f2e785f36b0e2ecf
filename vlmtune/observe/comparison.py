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
from vlmtune.observe.charts import Tick, nice_ticks, number_text
from vlmtune.observe.html import render_html, write_html

MIB = 2**20
# The picture, in SVG units.
PANEL, NAMES, BETWEEN, HEAD, LINE, FOOT = 250, 96, 26, 34, 30, 30
MARK = "*"
PARTS = {"cost": (1, 2, 3, 4, 5, 6, 7), "score on held-out data": (8, 9, 10), "loss on held-out data": (11, 12, 13)}
"""The tables: columns by number of `headings`, beside the method's name."""


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
        "method", "learning rate", "trainable", "memory, MiB", f"of {name}", "samples/s", f"times {name}",
        "by CPU time", "score", f"of {name}", f"of {name}'s gain", "held-out loss", f"minus {name}",
        f"of {name}'s drop",
    ]  # fmt: skip


def cells(row: Row, rate: float | None) -> list[str]:
    """One for each heading; empty where there is nothing to say."""
    if not row.seeds:
        return [row.arm, _rate(rate), "failed" if row.failed else "waiting", *[""] * 11]
    score, loss = row.score, row.loss
    return [
        row.arm, _rate(rate), f"{number_text(row.trainable)} ({row.trainable / row.parameters:.2%})",
        "" if row.memory is None else f"{row.memory.value / MIB:,.0f}", _ratio(row.memory_ratio),
        f"{row.speed.value:.3g}", _ratio(row.speed_ratio),
        _ratio(row.cpu_ratio),
        _share(score and score.value), _share(score and score.ratio), _share(score and score.gain),
        _with_ends(loss.value, "{:.3f}".format), _signed(loss.difference), _share(loss.gain),
    ]  # fmt: skip


def base_cells(comparison: Comparison) -> list[str]:
    """As `cells`, of the model before any training."""
    score, loss = (comparison.base.get(name) for name in ("score", "loss"))
    shown = ["" if score is None else f"{100 * score:.0f} %", "", "", "" if loss is None else f"{loss:.3f}", "", ""]
    return ["base", *[""] * 7, *shown]


def parts(comparison: Comparison, rates: Mapping[str, float | None]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines of cells, headings first) of what the methods cost and what they bring; empty columns left out."""
    names = headings(comparison)
    rows = [base_cells(comparison), *(cells(row, rates.get(row.arm)) for row in comparison.rows)]
    found = []
    for title, numbers in PARTS.items():
        shown = rows[1:] if title == "cost" else rows
        filled = [number for number in numbers if any(row[number] for row in shown)]
        if filled:
            found.append((title, [[row[0], *(row[number] for number in filled)] for row in [names, *shown]]))
    return found


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Of the terminal; without learning rates, which are printed with the plans."""
    tables = []
    for title, (names, *rows) in parts(comparison, {}):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(names):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
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
    """All tables with all intervals, failures and notes."""
    lines = [f"# Methods, compared with {comparison.baseline}", ""]
    tables = parts(comparison, rates)
    done = [row for row in comparison.rows if row.metrics]
    if done:
        head = ["metric", "base", *(row.arm for row in done)]
        tables.append((f"metrics, with the difference to {comparison.baseline}", [head, *metric_cells(comparison)]))
    if items := item_cells(comparison):
        tables.append(("memory at the predicted peak of a step, MiB", items))
    for title, (names, *rows) in tables:
        rule = "| --- |" + " ---: |" * (len(names) - 1)
        lines += [f"## {title[0].upper()}{title[1:]}", "", _line(names), rule, *map(_line, rows), ""]
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


def item_cells(comparison: Comparison) -> list[list[str]]:
    """What a step holds at its predicted peak, in MiB: a line of headings, then one for each method; [] where it was
    not predicted."""
    rows = [row for row in comparison.rows if row.items]
    names = [name for name in dict.fromkeys(key for row in rows for key in row.items)
             if any(row.items.get(name, 0) >= MIB / 10 for row in rows)]  # fmt: skip
    shown = [[row.arm, *(f"{row.items.get(name, 0) / MIB:.1f}" for name in names)] for row in rows]
    return [["method", *names], *shown] if rows else []


def _by_metric(rows: Sequence[Row]) -> list[list[Figure]]:
    """The figures of all methods, metric by metric, scores before losses."""
    found = [[figure for row in rows for figure in row.metrics if figure.name == f.name] for f in rows[0].metrics]
    return sorted(found, key=lambda figures: figures[0].name.startswith("loss/"))


def plot(comparison: Comparison) -> str:
    """The picture of all ratios to the baseline, as SVG that stands alone or in a page."""
    rows = [row for row in comparison.rows if row.seeds]
    by_cpu = any(row.cpu_ratio for row in rows)
    wanted = [
        (f"peak memory, of {comparison.baseline}", [row.memory_ratio for row in rows]),
        (
            f"speed{' by CPU time' if by_cpu else ''}, times {comparison.baseline}",
            [row.cpu_ratio if by_cpu else row.speed_ratio for row in rows],
        ),
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
        parts=parts(comparison, rates), items=item_cells(comparison),
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
    return "" if found is None else _with_ends(found, "{:.2f}".format)


def _share(found: Interval | None) -> str:
    """ "96 % [93, 99]"."""
    if found is None:
        return ""
    ends = "" if found.low is None else f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return f"{100 * found.value:.0f} %{ends}"


def _signed(found: Interval | None) -> str:
    """ "+0.012 [-0.003, 0.027]"."""
    return "" if found is None else _with_ends(found, "{:+.3f}".format)


def _with_ends(found: Interval, shown: Callable[[float], str]) -> str:
    return shown(found.value) + ("" if found.low is None else f" [{shown(found.low)}, {shown(found.high)}]")


def _line(row: Sequence[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
