"""What `vlmtune check-data` found, in three forms: terminal tables, a record for machines, a page (SPEC H1).

The page is one file without scripts and requests; whatever stands in the data is escaped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from vlmtune import __version__
from vlmtune.data.check import CODES, RowFinding, Severity
from vlmtune.observe.charts import number_text
from vlmtune.observe.histogram import Histogram, histogram, length_histogram
from vlmtune.observe.html import render_html, write_html
from vlmtune.observe.token_view import visible

EXAMPLES = 20  # findings of one code that the page shows
SHOWN = 2  # in the terminal
COLOURS = {"error": "bold red", "warning": "yellow"}
PERCENTILES = (0, 5, 50, 95, 99, 100)
PERCENTILE_NAMES = ("min", "p5", "p50", "p95", "p99", "max")


@dataclass
class SourceFigures:
    """Of one source. tokens int32[samples that encode]; sizes int32[images that decode, 2]: width, height."""

    name: str
    split: str
    format: str
    rows: int
    tokens: np.ndarray
    sizes: np.ndarray


@dataclass
class CodeFindings:
    """All findings of one code and severity, counted by source; the first of them as examples."""

    code: str
    severity: Severity
    by_source: Counter[str] = field(default_factory=Counter)
    examples: list[RowFinding] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.by_source.total()

    @property
    def meaning(self) -> str:
        return CODES[self.code][1]

    def add(self, finding: RowFinding) -> None:
        self.by_source[finding.source] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(finding)


@dataclass
class DataReport:
    """skipped: names of sources that are not files; max_length: None where there is no limit."""

    model: str
    max_length: int | None
    sources: list[SourceFigures] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    codes: dict[str, CodeFindings] = field(default_factory=dict)
    seconds: float = 0.0
    workers: int = 0

    def add(self, finding: RowFinding) -> None:
        self.codes.setdefault(finding.code, CodeFindings(finding.code, finding.severity)).add(finding)

    def ordered(self) -> list[CodeFindings]:
        """Errors first, in the order of `CODES`."""
        order = list(CODES)
        return sorted(self.codes.values(), key=lambda found: (found.severity != "error", order.index(found.code)))

    def count(self, severity: Severity) -> int:
        return sum(found.total for found in self.codes.values() if found.severity == severity)

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def samples_per_second(self) -> float:
        return self.rows / max(self.seconds, 1e-9)

    def verdict(self) -> str:
        errors, warnings = self.count("error"), self.count("warning")
        return (
            f"{self.rows:,} samples of {_plural(len(self.sources), 'source')}: {_plural(errors, 'error')}, "
            f"{_plural(warnings, 'warning')}"
        )


# ---- for machines -----------------------------------------------------------------------------------------------


def summary_record(report: DataReport) -> dict:
    """summary.json; docs/guide/data.md describes it."""
    return {
        "vlmtune": __version__,
        "model": report.model,
        "max_length": report.max_length,
        "rows": report.rows,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "findings": [
            {"code": f.code, "severity": f.severity, "count": f.total, "sources": dict(f.by_source)}
            for f in report.ordered()
        ],
        "sources": [_source_record(source) for source in report.sources],
        "skipped": report.skipped,
        "workers": report.workers,
        "seconds": round(report.seconds, 3),
        "samples_per_second": round(report.samples_per_second, 1),
    }


def _source_record(source: SourceFigures) -> dict:
    return {
        "name": source.name,
        "split": source.split,
        "format": source.format,
        "rows": source.rows,
        "samples": len(source.tokens),
        "tokens": _percentiles(source.tokens),
        "images": len(source.sizes),
        "width": _percentiles(source.sizes[:, 0]),
        "height": _percentiles(source.sizes[:, 1]),
    }


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    """None where there are no values. Each percentile is a value that occurs."""
    if not len(values):
        return None
    numbers = np.percentile(values, PERCENTILES, method="nearest").tolist()
    return dict(zip(PERCENTILE_NAMES, numbers, strict=True)) | {"mean": round(float(values.mean()), 1)}


# ---- the terminal -----------------------------------------------------------------------------------------------


def findings_table(report: DataReport) -> Table:
    table = Table(title="what is wrong with the data", title_justify="left")
    for name in ("", "code", "source", "findings", "meaning"):
        table.add_column(name, justify="right" if name == "findings" else "left")
    for found in report.ordered():
        for n, (source, count) in enumerate(found.by_source.items()):
            first = (found.severity, found.code, found.meaning) if n == 0 else ("", "", "")
            table.add_row(
                Text(first[0], style=COLOURS[found.severity]), first[1], Text(visible(source)), f"{count:,}", first[2]
            )
    return table


def example_lines(report: DataReport) -> list[str]:
    """The first findings of each code, a line each."""
    return [f"{found.code}: {visible(f.sentence)}" for found in report.ordered() for f in found.examples[:SHOWN]]


# ---- the page ---------------------------------------------------------------------------------------------------


def write_data_report(path: Path, report: DataReport) -> Path:
    """Write the page of a data check, and return its path."""
    html = render_html(
        "data_report.html.jinja",
        report=report,
        codes=report.ordered(),
        facts=_facts(report),
        sources=[_source_row(source) for source in report.sources],
        lengths=[_lengths(source, report.max_length) for source in report.sources if len(source.tokens)],
        sizes=[_sizes(source) for source in report.sources if len(source.sizes)],
        visible=visible,
    )
    return write_html(path, html)


def _facts(report: DataReport) -> list[tuple[str, str]]:
    return [
        ("samples", f"{report.rows:,}"),
        ("images", f"{sum(len(source.sizes) for source in report.sources):,}"),
        ("errors", f"{report.count('error'):,}"),
        ("warnings", f"{report.count('warning'):,}"),
        ("seconds", number_text(report.seconds)),
        ("samples per second", number_text(report.samples_per_second)),
    ]


def _source_row(source: SourceFigures) -> dict:
    tokens = _percentiles(source.tokens) or {}
    size = np.median(source.sizes, axis=0).astype(int).tolist() if len(source.sizes) else None
    return {
        "source": source,
        "samples": len(source.tokens),
        "images": len(source.sizes),
        "size": f"{size[0]} × {size[1]}" if size else "",
        "tokens": [f"{tokens[name]:,}" if tokens else "" for name in ("p50", "p95", "max")],
    }


def _lengths(source: SourceFigures, max_length: int | None) -> Histogram:
    figures = _percentiles(source.tokens)
    over = 0 if max_length is None else int((source.tokens > max_length).sum())
    sentence = f"median {figures['p50']:,}, longest {figures['max']:,}" + (
        f"; {over:,} of {len(source.tokens):,} above data.max_length {max_length:,}" if over else ""
    )
    return length_histogram(source.name, sentence, source.tokens, max_length)


def _sizes(source: SourceFigures) -> Histogram:
    longer = source.sizes.max(axis=1)
    figures = _percentiles(longer)
    sentence = f"{_plural(len(longer), 'image')}, median {figures['p50']:,} pixels, largest {figures['max']:,}"
    return histogram(f"{source.name}: longer side of each image", sentence, longer, "pixels", "images")


def _plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
