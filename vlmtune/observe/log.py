"""What a run writes while it goes: history.jsonl, TensorBoard events, one progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vlmtune.observer import Observer
from vlmtune.sealed import finite
from vlmtune.types import Finding

SCALARS = ("loss", "loss_plain", "norm", "exposure", "lr_scale", "loss_scale", "skipped", "overflows")
CountBySource = Callable[[int], dict[str, int]]


class History(Observer):
    """Appends one JSON object per logging step, evaluation, finding and whatever is added to history.jsonl, and the
    statistics of every parameter to gradients.jsonl beside it.

    by_source: samples of the run so far -> source name -> how many of them came from it; memory: bytes in use now;
    last: the step with which the run ends, recorded too.
    """

    def __init__(
        self,
        path: Path,
        log_every: int,
        from_step: int,
        by_source: CountBySource,
        memory: Callable[[], int],
        last: int | None = None,
    ):
        self.path, self.log_every, self._by_source, self._memory = path, log_every, by_source, memory
        self.last = last
        self.gradients = path.with_name("gradients.jsonl")
        self._begin(from_step)

    def _begin(self, step: int) -> None:
        self._since: list[dict[str, Any]] = []
        keep_until(self.path, step)
        keep_until(self.gradients, step)
        self._evaluated = {record["step"] for record in read_history(self.path) if record["kind"] == "eval"}

    def on_step(self, state, metrics: dict[str, Any]) -> None:
        if metrics.get("statistics") is not None:
            rows = {name: asdict(row) for name, row in metrics["statistics"].items()}
            append_line(self.gradients, {"kind": "gradients", "step": state.step, "parameters": rows})
        if "skipped" not in metrics:
            self._since.append(metrics)
        if not self._since or (state.step % self.log_every and state.step not in (1, self.last)):
            return
        record = train_record(state, self._since)
        self.add(record | {"sources": self._by_source(state.samples), "memory": self._memory()})
        self._since = []

    def on_finding(self, state, finding: Finding) -> None:
        self.add({"kind": "finding", "step": state.step, **asdict(finding)})

    def on_rewind(self, state) -> None:
        """What was recorded of steps that will come again is dropped; the finding that follows says why."""
        self._begin(state.step)

    def on_eval(self, state, metrics: dict[str, Any]) -> None:
        if state.step not in self._evaluated:  # a finished run that is started again evaluates its end once more
            self.add(eval_record(state, metrics))
            self._evaluated.add(state.step)

    def add(self, record: dict[str, Any]) -> None:
        """record: with its "kind" and "step"."""
        append_line(self.path, record)


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(finite(record)) + "\n")


def train_record(state, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of history over the steps since the last one; means are weighted by tokens, times are sums.

    loss, loss_by_task: tokens weighted by kind; loss_terms: means of further terms, not part of loss;
    loss_plain, loss_plain_by_task: the same tokens, all weights 1.
    """
    weighted, plain, terms = _Means(), _Means(), _Means()
    for step in steps:
        weighted.add(step["losses"], step["weights"])
        plain.add(step["plain"], step["supervised"])
        terms.add(step["terms"], {name: step["term_counts"][name.partition("/")[0]] for name in step["terms"]})
    seconds = sum(step["step_seconds"] for step in steps)
    last = steps[-1]
    return {
        "kind": "train",
        "step": state.step,
        "samples": state.samples,
        "loss": weighted.of_all(),
        "loss_by_task": weighted.by_task(),
        "loss_plain": plain.of_all(),
        "loss_plain_by_task": plain.by_task(),
        "loss_terms": terms.by_task(),
        "task_weights": last["coefficients"],
        "task_shares": last["shares"],
        "sampling": last.get("sampling", {}),
        "exposure": last["exposure"],
        "lr": last["lr"],
        "lr_scale": state.lr_scale,
        "loss_scale": last["scale"],
        "skipped": len(state.skipped),
        "overflows": state.overflows,
        "norm": float(last["norms"]["total"]),
        "norm_by_rule": {rule: float(norm) for rule, norm in last["norms"].items() if rule != "total"},
        "supervised_tokens_per_second": sum(plain.weights.values()) / seconds,
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
        "samples_per_second": sum(step["samples"] for step in steps) / seconds,
        "data_wait": sum(step["data_wait"] for step in steps) / seconds,
        "seconds": state.seconds,
    }


class _Means:
    """Means of several steps, each weighted by what it was a mean over."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, means: dict[str, float], weights: dict[str, float]) -> None:
        for task, mean in means.items():
            self.sums[task] = self.sums.get(task, 0.0) + mean * weights[task]
            self.weights[task] = self.weights.get(task, 0.0) + weights[task]

    def of_all(self) -> float:
        return sum(self.sums.values()) / max(1e-9, sum(self.weights.values()))

    def by_task(self) -> dict[str, float]:
        return {task: self.sums[task] / weight for task, weight in sorted(self.weights.items()) if weight}


def eval_record(state, metrics: dict[str, Any]) -> dict[str, Any]:
    """metrics: "loss", "loss/<group>/<task>" and "<group>/<task>/<metric>" -> number."""
    nested: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "loss" or name.startswith("loss/"):
            losses[name.removeprefix("loss/")] = value
        else:
            place, _, metric = name.rpartition("/")
            nested.setdefault(place, {})[metric] = value
    return {"kind": "eval", "step": state.step, "metrics": nested, "loss": losses, "seconds": state.seconds}


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # only the last line can be torn, and it is written again on resume
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop records after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [record for record in read_history(path) if record["step"] <= step]
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, path)


class TensorBoard(Observer):
    """The same numbers as TensorBoard scalars under <run>/tensorboard."""

    def __init__(self, folder: Path, log_every: int, from_step: int, by_source: CountBySource, last: int | None = None):
        self.folder, self.log_every, self._by_source, self.last = folder, log_every, by_source, last
        self._open(from_step + 1 if from_step else None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    def on_rewind(self, state) -> None:
        self._writer.close()
        self._open(state.step + 1)

    def on_step(self, state, metrics: dict[str, Any]) -> None:
        if (state.step % self.log_every and state.step != self.last) or "skipped" in metrics:
            return
        record = train_record(state, [metrics])
        for name in (*SCALARS, "tokens_per_second", "samples_per_second", "data_wait"):
            self._writer.add_scalar(f"train/{name}", record[name], state.step)
        for group in ("loss_by_task", "loss_terms", "task_weights", "task_shares", "lr", "norm_by_rule"):
            for name, value in record[group].items():
                self._writer.add_scalar(f"{group}/{name}", value, state.step)
        for name, count in self._by_source(state.samples).items():
            self._writer.add_scalar(f"samples/{name}", count, state.step)

    def on_eval(self, state, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"eval/{name}", value, state.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class CountingBar:
    """A bar while samples are read, one source after the other; without a terminal nothing is shown.

    doing: what is done with them.
    """

    def __init__(self, console: Console, doing: str = "counting tokens of"):
        self._progress = Progress(
            TextColumn(f"{doing} {{task.description}}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} samples"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> CountingBar:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.__exit__(*exc)

    def __call__(self, name: str, done: int, rows: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(escape(name), total=rows)
        self._progress.update(self._tasks[name], completed=done)


class ProgressLine(Observer):
    """loss, lr, tokens/s, data wait, time left. Without a terminal: a plain line every `log_every` steps.

    Loss and rates are those that history.jsonl records: since the last such line, the loss weighted by tokens.
    """

    def __init__(self, console: Console, total_steps: int, log_every: int):
        self.console, self.total, self.log_every = console, total_steps, log_every
        self._first: tuple[int, float] | None = None
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=total_steps)
        self._since: list[dict[str, Any]] = []

    def __enter__(self) -> ProgressLine:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.__exit__(*exc)

    def on_finding(self, state, finding: Finding) -> None:
        text = f"{finding.level}: {finding.what}: {finding.evidence}"
        text += f"; {finding.remedy}" if finding.remedy else ""
        self.console.print(f"step {state.step}: {text}", highlight=False, markup=False, soft_wrap=True)

    def on_rewind(self, state) -> None:
        self._since, self._first = [], None

    def on_step(self, state, metrics: dict[str, Any]) -> None:
        if "skipped" in metrics:
            return
        self._since.append(metrics)
        record = train_record(state, self._since)
        self._first = self._first or (state.step - 1, time.perf_counter() - metrics["step_seconds"])
        done, since = state.step - self._first[0], time.perf_counter() - self._first[1]
        left = (self.total - state.step) * since / done
        line = (
            f"loss {record['loss']:.4f}  lr {max(metrics['lr'].values()):.2e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  data wait {100 * record['data_wait']:.0f}%  "
            f"left {duration(left)}"
        )
        self._progress.update(self._bar, completed=state.step, description=line)
        if state.step % self.log_every == 0 or state.step in (1, self.total):
            self._since = []
            if not self.console.is_terminal:
                self.console.print(f"step {state.step}/{self.total}  {line}", highlight=False)

    def on_eval(self, state, metrics: dict[str, Any]) -> None:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if not name.startswith("loss/"))
        self.console.print(f"[bold]evaluation at step {state.step}[/]  {shown}", highlight=False)


def duration(seconds: float) -> str:
    """ "1:02:03" or "4:05"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
