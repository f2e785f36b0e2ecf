"""The report of a run: one HTML file that needs no network, no JavaScript and no other file (SPEC H3, PAINS 23).

Read from the run folder, all of them optional, so that a run in progress or a broken-off one has a report too:

| file | what it holds |
| --- | --- |
| config.yaml, environment.json | shown as they are |
| assignment.json | list of {part, rule, method, tensors, parameters, trainable, lr, weight_decay, examples} |
| history.jsonl | one object per line, kind "train", "eval" or "finding"; of a repeated step the last one counts |
| summary.json | {metrics: {"group/task": {metric: {before, after}}}, train_seconds, steps, samples_per_second, …} |
| composition.json | list of {source, tasks, rows, samples, share, epochs, tokens, …} |
| stages.json | of a chain: list of {name, folder, first_step, steps, status, metrics} |
| samples.json | list of {image, group, task, question, reference, before, after, boxes_…, width, height} |

Whatever these say is data: jinja2 escapes it, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import json
import math
import mimetypes
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from vlmtune.types import Box, VlmtuneError

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


@dataclass(frozen=True)
class Score:
    """A row of the headline table. Positions are 0 to 100 on the 0..1 track, None for what does not fit on it."""

    group: str
    task: str
    metric: str
    before: str
    after: str
    change: str
    verdict: str  # "better", "worse", "same" or "unknown": also the CSS class
    before_at: float | None
    after_at: float | None


@dataclass(frozen=True)
class Picture:
    """A sample of the gallery; rectangles are (x, y, width, height) in pixels of the picture.

    An answer of None was never asked for; "" is a model that said nothing.
    """

    uri: str | None
    width: float
    height: float
    group: str
    task: str
    question: str
    reference: str
    before: str | None
    after: str | None
    right_before: bool
    right_after: bool
    true: list[Box]
    said_before: list[Box]
    said_after: list[Box]


def write_page(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    VlmtuneError: no such folder, or a JSON file in it that is not JSON.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise VlmtuneError(f"{run_folder} is not a run folder; give the folder that holds history.jsonl.")
    history, unreadable = _history(run_folder / "history.jsonl")
    summary = _json(run_folder / "summary.json") or {}
    train = [entry for entry in history if entry.get("kind") == "train"]
    evals = [entry for entry in history if entry.get("kind") == "eval"]
    stages = _json(run_folder / "stages.json") or []
    marks = [(stage.get("first_step", 0) + 1, stage["name"]) for stage in stages if stage.get("steps")]
    pictures = [_picture(sample, run_folder) for sample in _json(run_folder / "samples.json") or []]
    page = render_html(
        "page.html.jinja",
        name=run_folder.resolve().name,
        finished=bool(summary),
        facts=_facts(summary, train),
        scores=_scores(summary.get("metrics") or {}),
        training_charts=_training_charts(train, marks),
        evaluation_charts=_evaluation_charts(evals, marks),
        stages=stages,
        stage_scores=_stage_scores(stages),
        findings=[entry for entry in history if entry.get("kind") == "finding"],
        composition=_json(run_folder / "composition.json") or [],
        averaged=math.ceil(len(train) / POINTS_PER_LINE),
        assignment=_json(run_folder / "assignment.json") or [],
        pictures=pictures,
        frame=_frame(pictures),
        documents=_documents(run_folder, summary),
        unreadable=unreadable,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        chart_width=CHART_WIDTH,
        chart_height=CHART_HEIGHT,
        plot={"left": LEFT, "right": CHART_WIDTH - RIGHT, "top": TOP, "bottom": CHART_HEIGHT - BOTTOM},
    )
    return write_html(run_folder / "report.html", page)


def render_html(template: str, **values: Any) -> str:
    """A template of this folder with `values` filled in, every one of them escaped."""
    return _templates().get_template(template).render(**values)


def write_html(path: Path, html: str) -> Path:
    """Write a page in one go: a reader never sees half of it, and a half surrogate in model output is no crash."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(html, encoding="utf-8", errors="replace")
    unfinished.replace(path)
    return path


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


def boxes_as_rectangles(boxes: Iterable[Box] | None) -> list[Box]:
    """x1, y1, x2, y2 -> x, y, width, height as SVG wants it; a box without area keeps a visible pixel."""
    rectangles = []
    for box in boxes or []:
        x1, y1, x2, y2 = (float(value) for value in box)
        rectangles.append((x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)))
    return rectangles


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: number_text(value) if isinstance(value, int | float) else value
    return environment


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlmtuneError(f"{path} is not JSON ({error}); delete it or write it again.") from error


def _history(path: Path) -> tuple[list[dict], int]:
    """Entries in order of step, and how many lines could not be read (a killed run tears the line it was writing)."""
    if not path.is_file():
        return [], 0
    entries, unreadable = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            entries[_place(entry)] = entry
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip())
    return sorted(entries.values(), key=lambda entry: entry["step"]), unreadable


def _place(entry: dict) -> tuple:
    """What two records of one thing have in common; a step may have several findings, and a chain several stages."""
    several = (entry["what"], entry["evidence"]) if entry["kind"] == "finding" else ()
    return entry["kind"], entry.get("stage"), entry["step"], *several


def _stage_scores(stages: list[dict]) -> list[tuple[str, str, str, list[str]]]:
    """(group, task, metric, values before the first stage and after each) of a chain; "–" for what was not measured."""
    places: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for place, values in (stage.get("metrics") or {}).items():
            for metric in values:
                places.setdefault((place, metric), [])
    rows = []
    for place, metric in sorted(places):
        pairs = [(stage.get("metrics") or {}).get(place, {}).get(metric, {}) for stage in stages]
        first = next((pair["before"] for pair in pairs if pair.get("before") is not None), None)
        shown = ["–" if value is None else f"{value:.3f}" for value in (first, *(pair.get("after") for pair in pairs))]
        group, _, task = place.partition("/")
        rows.append((group, task, metric, shown))
    return rows


def _facts(summary: dict, train: list[dict]) -> list[tuple[str, str]]:
    """(label, value) pairs below the headline; those nobody recorded are left out."""
    latest = train[-1] if train else {}
    steps = summary.get("steps", latest.get("step"))
    seconds = summary.get("train_seconds", latest.get("seconds"))
    facts = []
    if steps is not None:
        facts.append(("steps", f"{steps:,}"))
    if seconds is not None:
        facts.append(("training time", _duration(seconds)))
    if latest.get("loss") is not None:
        facts.append(("last loss", number_text(latest["loss"])))
    if summary.get("samples_per_second") is not None:
        facts.append(("samples per second", number_text(summary["samples_per_second"])))
    if summary.get("peak_memory_bytes"):
        facts.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _scores(metrics: dict) -> list[Score]:
    rows = []
    for place, values in metrics.items():
        group, _, task = place.partition("/")
        for metric, pair in values.items():
            before, after = pair.get("before"), pair.get("after")
            rows.append(_score(group, task, metric, before, after))
    return rows


def _score(group: str, task: str, metric: str, before: float | None, after: float | None) -> Score:
    change, verdict = "", "unknown"
    if before is not None and after is not None:
        difference = round(after - before, 3)
        change = f"{difference:+.3f}".replace("-", "−") if difference else "0.000"
        lower_is_better = "loss" in metric or "perplexity" in metric
        improved = difference < 0 if lower_is_better else difference > 0
        verdict = "same" if difference == 0 else "better" if improved else "worse"
    shown = ["–" if value is None else f"{value:.3f}" for value in (before, after)]
    at = [100 * value if value is not None and 0 <= value <= 1 else None for value in (before, after)]
    return Score(group, task, metric, *shown, change, verdict, *at)


def _training_charts(train: list[dict], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    def one(key: str) -> dict[str, list]:
        return {key: [(entry["step"], entry.get(key)) for entry in train]}

    def several(key: str) -> dict[str, list]:
        labels = sorted({label for entry in train for label in entry.get(key) or {}})  # the same colours in every run
        # A task that is not in every batch is no gap in its line, so only the steps that have it count.
        return {
            label: [(entry["step"], entry[key][label]) for entry in train if label in (entry.get(key) or {})]
            for label in labels
        }

    wanted = [
        ("Training loss", "per supervised token", one("loss")),
        ("Loss by task", "per supervised token", several("loss_by_task")),
        ("Further losses", "means, weighted", several("loss_terms")),
        ("Weight of tasks", "what their mean losses are multiplied with", several("task_weights")),
        ("Share of tasks", "of the samples drawn", several("task_shares")),
        ("Exposure", "probability per token", one("exposure") if _is_used(train, "exposure") else {}),
        ("Learning rate", "by rule", several("lr")),
        ("Gradient norm", "before clipping", one("norm")),
        ("Gradient norm by rule", "before clipping", several("norm_by_rule")),
        ("Loss scale", "of float16", one("loss_scale") if _moves(train, "loss_scale") else {}),
        ("Speed", "tokens per second", one("tokens_per_second")),
    ]
    charts = [draw_chart(title, unit, series, marks=marks) for title, unit, series in wanted]
    return [chart for chart in charts if chart]


def _is_used(train: list[dict], key: str) -> bool:
    return any(entry.get(key) for entry in train)


def _moves(train: list[dict], key: str) -> bool:
    return len({entry.get(key) for entry in train}) > 1


def _evaluation_charts(evals: list[dict], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """One chart per task, so that groups (held-out, training) and metrics of a task are seen against each other."""
    tasks: dict[str, dict[str, list]] = {}
    losses: dict[str, list] = {}
    for entry in evals:
        for place, values in (entry.get("metrics") or {}).items():
            group, _, task = place.partition("/")
            for metric, value in values.items():
                tasks.setdefault(task, {}).setdefault(f"{group} · {metric}", []).append((entry["step"], value))
        for label, value in (entry.get("loss") or {}).items():
            losses.setdefault(label, []).append((entry["step"], value))
    charts = [draw_chart(task, "score", series, scores=True, marks=marks) for task, series in tasks.items()]
    charts.append(draw_chart("Evaluation loss", "per supervised token", losses, marks=marks))
    return [chart for chart in charts if chart]


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


def _picture(sample: dict, run_folder: Path) -> Picture:
    reference = str(sample.get("reference") or "")
    before, after = (None if sample.get(key) is None else str(sample[key]) for key in ("before", "after"))
    return Picture(
        uri=_data_uri(str(sample.get("image") or ""), run_folder),
        width=float(sample.get("width") or 1),
        height=float(sample.get("height") or 1),
        group=str(sample.get("group") or ""),
        task=str(sample.get("task") or ""),
        question=str(sample.get("question") or ""),
        reference=reference,
        before=before,
        after=after,
        right_before=before is not None and before.split() == reference.split(),
        right_after=after is not None and after.split() == reference.split(),
        true=boxes_as_rectangles(sample.get("boxes_true")),
        said_before=boxes_as_rectangles(sample.get("boxes_before")),
        said_after=boxes_as_rectangles(sample.get("boxes_after")),
    )


def _frame(pictures: list[Picture]) -> float:
    """Width / height of the frame around every picture, so that rows line up: the median, unless that is extreme."""
    ratio = statistics.median([picture.width / picture.height for picture in pictures]) if pictures else 1.0
    return round(min(max(ratio, 0.8), 1.6), 3)


def _data_uri(image: str, run_folder: Path) -> str | None:
    """The picture itself, never a reference to it; None when it is not a file of this run."""
    if image.startswith("data:image/"):
        return image
    path = (run_folder / image).resolve()
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not kind.startswith("image/") or not path.is_relative_to(run_folder.resolve()) or not path.is_file():
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _documents(run_folder: Path, summary: dict) -> list[tuple[str, str]]:
    """(title, text) of what is shown as it is, folded away at the end."""
    documents = []
    config = run_folder / "config.yaml"
    if config.is_file():
        documents.append(("Configuration", config.read_text(encoding="utf-8", errors="replace")))
    environment = _json(run_folder / "environment.json")
    if environment is not None:
        documents.append(("Environment", json.dumps(environment, indent=2, ensure_ascii=False)))
    rest = {key: value for key, value in summary.items() if key != "metrics"}
    if rest:
        documents.append(("Figures of the run", json.dumps(rest, indent=2, ensure_ascii=False)))
    return documents
