"""The report of a run: one HTML file that needs no network, no JavaScript and no other file (SPEC H2, H3, PAINS 23).

Read from the run folder, all of them optional, so that a run in progress or a broken-off one has a report too:

| file | what it holds |
| --- | --- |
| config.yaml | shown as it is |
| environment.json | versions, device, and how many steps are planned |
| assignment.json | list of {part, rule, method, tensors, parameters, trainable, lr, weight_decay, examples} |
| start.json | list of findings before the first step |
| validate.json | of `vlmtune validate`: {checkpoint, base, findings: [{section, level, what, evidence, remedy}]} |
| align.json | of `vlmtune align`: {checkpoint, levels: level -> {rows: row -> {before, after: {value, low, high}}}} |
| memory.json | {predicted, measured, at, items: name -> bytes} of a step |
| history.jsonl | an object per line, kind "train", "eval", "samples", "finding"; of a repeated step the last counts |
| summary.json | {metrics: {"group/task": {metric: {before, after}}}, train_seconds, steps, samples_per_second, …} |
| suspects.jsonl | an object per line: {source, row, id, origin, task, seen, first_loss, last_loss} of active sampling |
| composition.json | list of {source, tasks, rows, samples, share, epochs, tokens, …} |
| stages.json | of a chain: list of {name, folder, first_step, steps, status, metrics} |
| samples.json | list of {image, group, task, question, reference, before, after, boxes_…, width, height} |

Whatever these say is data: jinja2 escapes it, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmtune.evaluate.names import WIDE_METRICS
from vlmtune.observe.charts import (
    BOTTOM,
    CHART_HEIGHT,
    CHART_WIDTH,
    LEFT,
    POINTS_PER_LINE,
    RIGHT,
    TOP,
    Chart,
    draw_chart,
    number_text,
)
from vlmtune.observe.html import render_html, write_html
from vlmtune.observe.pictures import frame_of, pictures_of
from vlmtune.types import VlmtuneError

MIB = 2**20
SUSPECTS_SHOWN = 20
KINDS = ("train", "eval", "samples", "finding")  # of records in history.jsonl


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
class Shift:
    """Of a task under active sampling, as text, first and last: its share of the samples drawn, the mean difficulty of
    its rows, the share of them that is known, how often one was forgotten."""

    task: str
    share: tuple[str, str]
    difficulty: tuple[str, str]
    known: tuple[str, str]
    forgotten: tuple[str, str]


@dataclass(frozen=True)
class Refresh:
    """A served page asks for itself again. seconds: between two times; nonce: of the script that does it."""

    seconds: float
    nonce: str


@dataclass(frozen=True)
class Memory:
    """Of a step, in words; items: (what, size, percent of all that was predicted)."""

    predicted: str
    measured: str
    difference: str
    at: str
    items: list[tuple[str, str, float]]


def write_page(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path. Raises VlmtuneError as `render_page`."""
    return write_html(Path(run_folder) / "report.html", render_page(run_folder))


def render_page(run_folder: Path, refresh: Refresh | None = None) -> str:
    """The report as HTML. refresh: of a page that is served while the run goes on.

    VlmtuneError: no such folder, or a JSON file in it that is not JSON.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise VlmtuneError(f"{run_folder} is not a run folder; give the folder that holds history.jsonl.")
    history, unreadable = _history(run_folder / "history.jsonl")
    summary = _json(run_folder / "summary.json") or {}
    environment = _json(run_folder / "environment.json") or {}
    by_kind = {kind: [entry for entry in history if entry.get("kind") == kind] for kind in KINDS}
    train = by_kind["train"]
    stages = _json(run_folder / "stages.json") or []
    marks = [(stage.get("first_step", 0) + 1, stage["name"]) for stage in stages if stage.get("steps")]
    pictures = pictures_of(_json(run_folder / "samples.json") or [], by_kind["samples"], run_folder)
    return render_html(
        "page.html.jinja",
        name=run_folder.resolve().name,
        finished=bool(summary),
        refresh=refresh,
        progress=_progress(summary, train, environment.get("steps")),
        facts=_facts(summary, train, environment.get("steps")),
        scores=_scores(summary.get("metrics") or {}),
        training_charts=_training_charts(train, marks),
        evaluation_charts=_evaluation_charts(by_kind["eval"], marks),
        stages=stages,
        stage_scores=_stage_scores(stages),
        found=by_kind["finding"],
        at_start=_json(run_folder / "start.json") or [],
        validation=_json(run_folder / "validate.json"),
        alignment=_json(run_folder / "align.json"),
        shifts=_shifts(train),
        weak=_last(train, "sampling"),
        suspects=_lines(run_folder / "suspects.jsonl"),
        suspects_shown=SUSPECTS_SHOWN,
        composition=_json(run_folder / "composition.json") or [],
        averaged=math.ceil(len(train) / POINTS_PER_LINE),
        assignment=_json(run_folder / "assignment.json") or [],
        memory=_memory(_json(run_folder / "memory.json")),
        pictures=pictures,
        frame=frame_of(pictures),
        environment=_environment(environment),
        documents=_documents(run_folder, summary),
        unreadable=unreadable,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        chart_width=CHART_WIDTH,
        chart_height=CHART_HEIGHT,
        plot={"left": LEFT, "right": CHART_WIDTH - RIGHT, "top": TOP, "bottom": CHART_HEIGHT - BOTTOM},
    )


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


def _progress(summary: dict, train: list[dict], steps: int | None) -> float | None:
    """Percent of the planned steps; None for a finished run, and where nobody wrote down how many there are."""
    return None if summary or not steps or not train else min(100.0, 100 * train[-1]["step"] / steps)


def _facts(summary: dict, train: list[dict], planned: int | None) -> list[tuple[str, str]]:
    """(label, value) pairs below the headline; those nobody recorded are left out. planned: steps of the run."""
    latest = train[-1] if train else {}
    steps = summary.get("steps", latest.get("step"))
    seconds = summary.get("train_seconds", latest.get("seconds"))
    facts = []
    if steps is not None:
        facts.append(("steps", f"{steps:,} of {planned:,}" if planned and steps != planned else f"{steps:,}"))
    if seconds is not None:
        facts.append(("training time", _duration(seconds)))
    if not summary and seconds and steps and planned and steps < planned:
        facts.append(("left, about", _duration(seconds / steps * (planned - steps))))
    if latest.get("loss") is not None:
        facts.append(("last loss", number_text(latest["loss"])))
    speed = summary.get("samples_per_second", latest.get("samples_per_second"))
    if speed is not None:
        facts.append(("samples per second", number_text(speed)))
    if summary.get("peak_memory_bytes"):
        facts.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return facts


def _memory(record: dict | None) -> Memory | None:
    if record is None:
        return None
    predicted, measured = record.get("predicted"), record.get("measured")
    shown = [f"{value / MIB:,.0f} MiB" if value else "–" for value in (predicted, measured)]
    difference = f"{measured / predicted - 1:+.0%}".replace("-", "−") if predicted and measured else ""
    items = sorted((record.get("items") or {}).items(), key=lambda item: -item[1])
    total = sum(size for _, size in items) or 1
    rows = [(name, f"{size / MIB:,.1f}", 100 * size / total) for name, size in items if size >= 0.1 * MIB]
    return Memory(*shown, difference, str(record.get("at") or ""), rows)


def _environment(record: dict) -> list[tuple[str, str]]:
    """(what, value); versions of packages in one line, a list in words."""
    rows = []
    for name, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append((name, str(value)))
    return rows


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
    lower_is_better = "loss" in metric or "perplexity" in metric
    if before is not None and after is not None:
        difference = round(after - before, 3)
        change = f"{difference:+.3f}".replace("-", "−") if difference else "0.000"
        improved = difference < 0 if lower_is_better else difference > 0
        verdict = "same" if difference == 0 else "better" if improved else "worse"
    shown = ["–" if value is None else f"{value:.3f}" for value in (before, after)]
    is_share = not lower_is_better and metric not in WIDE_METRICS
    at = [100 * value if is_share and value is not None and 0 <= value <= 1 else None for value in (before, after)]
    return Score(group, task, metric, *shown, change, verdict, *at)


def _lines(path: Path) -> list[dict]:
    """Of a file with a JSON object per line, nothing where there is none. Raises VlmtuneError where a line is not."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise VlmtuneError(f"{path} is not JSON ({error}); delete it or write it again.") from error


def _last(train: list[dict], key: str) -> dict:
    return next((entry[key] for entry in reversed(train) if entry.get(key)), {})


def _shifts(train: list[dict]) -> list[Shift]:
    """Of active sampling, the most difficult task first; nothing of other runs."""
    told = [entry for entry in train if entry.get("sampling")]
    if not told:
        return []
    shared = [entry["task_shares"] for entry in train if entry.get("task_shares")]

    def pair(values: list[dict], task: str, form: str) -> tuple[str, str]:
        found = [value[task] for value in values if value.get(task) is not None]
        return (form.format(found[0]), form.format(found[-1])) if found else ("–", "–")

    last = told[-1]["sampling"]["difficulty"]
    rows = []
    for task in sorted(last, key=lambda task: (-(last[task] or 0.0), task)):
        forms = {"difficulty": "{:.3g}", "known": "{:.0%}", "forgotten": "{:.2f}"}
        of = {name: pair([entry["sampling"][name] for entry in told], task, form) for name, form in forms.items()}
        rows.append(Shift(task, pair(shared, task, "{:.1%}"), **of))
    return rows


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

    def drawn(key: str) -> dict[str, list]:
        """What active sampling drew by: a number, or one for each task."""
        told = [(entry["step"], entry["sampling"][key]) for entry in train if entry.get("sampling")]
        tasks = sorted({task for _, value in told if isinstance(value, dict) for task in value})
        by_task = {task: [(step, value[task]) for step, value in told if task in value] for task in tasks}
        return by_task or {key: told}

    wanted = [
        ("Training loss", "per supervised token", one("loss")),
        ("Loss by task", "per supervised token", several("loss_by_task")),
        ("Further losses", "means, weighted", several("loss_terms")),
        ("Weight of tasks", "what their mean losses are multiplied with", several("task_weights")),
        ("Share of tasks", "of the samples drawn", several("task_shares")),
        ("Difficulty of tasks", "mean of their samples", drawn("difficulty")),
        ("Known samples", "share of those seen, by task", drawn("known")),
        ("Hardest tenth", "its share of the samples drawn", drawn("hardest")),
        ("Suspects", "samples whose loss does not fall", drawn("suspects")),
        ("Exposure", "probability per token", one("exposure") if _is_used(train, "exposure") else {}),
        ("Learning rate", "by rule", several("lr")),
        ("Gradient norm", "before clipping", one("norm")),
        ("Gradient norm by rule", "before clipping", several("norm_by_rule")),
        ("Loss scale", "of float16", one("loss_scale") if _moves(train, "loss_scale") else {}),
        ("Speed", "tokens per second", one("tokens_per_second")),
        ("Waiting for data", "share of the time", one("data_wait")),
        ("Memory", "GiB after a step", _in_gib(one("memory"))),
    ]
    charts = [draw_chart(title, unit, series, marks=marks) for title, unit, series in wanted]
    return [chart for chart in charts if chart]


def _in_gib(series: dict[str, list]) -> dict[str, list]:
    return {
        name: [(step, None if value is None else value / 2**30) for step, value in points]
        for name, points in series.items()
    }


def _is_used(train: list[dict], key: str) -> bool:
    return any(entry.get(key) for entry in train)


def _moves(train: list[dict], key: str) -> bool:
    return len({entry.get(key) for entry in train}) > 1


def _evaluation_charts(evals: list[dict], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """One chart per task, so that groups (held-out, training) and metrics of a task are seen against each other; a
    metric that is no share of anything has one of its own."""
    tasks: dict[str, dict[str, list]] = {}
    losses: dict[str, list] = {}
    for entry in evals:
        for place, values in (entry.get("metrics") or {}).items():
            group, _, task = place.partition("/")
            for metric, value in values.items():
                title = f"{task} {metric}" if metric in WIDE_METRICS else task
                tasks.setdefault(title, {}).setdefault(f"{group} · {metric}", []).append((entry["step"], value))
        for label, value in (entry.get("loss") or {}).items():
            losses.setdefault(label, []).append((entry["step"], value))
    charts = [draw_chart(title, "score", series, scores=True, marks=marks) for title, series in tasks.items()]
    charts.append(draw_chart("Evaluation loss", "per supervised token", losses, marks=marks))
    return [chart for chart in charts if chart]


def _documents(run_folder: Path, summary: dict) -> list[tuple[str, str]]:
    """(title, text) of what is shown as it is, folded away at the end."""
    documents = []
    config = run_folder / "config.yaml"
    if config.is_file():
        documents.append(("Configuration", config.read_text(encoding="utf-8", errors="replace")))
    rest = {key: value for key, value in summary.items() if key != "metrics"}
    if rest:
        documents.append(("Figures of the run", json.dumps(rest, indent=2, ensure_ascii=False)))
    return documents
