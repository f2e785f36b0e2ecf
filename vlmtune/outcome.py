"""What came out of a run: the table and the summary of metrics."""

from __future__ import annotations

import resource

import torch
from rich.table import Table

from vlmtune.evaluate.evaluation import Evaluation


def metrics_table(metrics: dict) -> Table:
    table = Table(title="held-out data", title_justify="left")
    compared = any("before" in pair for values in metrics.values() for pair in values.values())
    moments = ("before", "after", "change") if compared else ("value",)
    for name in ("group", "task", "metric", *moments):
        table.add_column(name, justify="left" if name in ("group", "task", "metric") else "right")
    for place, values in metrics.items():
        group, _, task = place.partition("/")
        for metric, pair in values.items():
            before, after = pair.get("before"), pair.get("after")
            change = "" if before is None or after is None else f"{after - before:+.3f}"
            cells = [*("" if v is None else f"{v:.3f}" for v in (before, after)), change]
            table.add_row(group, task, metric, *(cells if compared else cells[1:2]))
    return table


def evaluation_record(evaluation: Evaluation) -> dict:
    replies = [[s.group, s.sample.id, s.reply, s.boxes] for s in evaluation.scored]
    return {"metrics": evaluation.metrics, "replies": replies}


def summarise(before: dict | None, after: Evaluation | None, state, total_steps: int, sources: dict[str, int]) -> dict:
    """sources: name -> samples trained on."""
    metrics: dict[str, dict] = {}
    for moment, values in (("before", before["metrics"] if before else {}), ("after", after.metrics if after else {})):
        for name, value in values.items():
            if name == "loss":
                continue
            place, metric = (name[5:], "loss") if name.startswith("loss/") else name.rsplit("/", 1)
            metrics.setdefault(place, {}).setdefault(metric, {})[moment] = value
    return {
        "metrics": dict(sorted(metrics.items())),
        "steps": state.step,
        "total_steps": total_steps,
        "samples": state.samples,
        "sources": sources,
        "tokens": state.tokens,
        "train_seconds": state.seconds,
        "samples_per_second": state.samples / state.seconds if state.seconds else None,
        "peak_memory_bytes": peak_memory(),
        "best": {"value": state.best, "step": state.best_step},
        "stopped": state.stopped,
        "skipped": state.skipped,
        "rewinds": state.rewinds,
        "lr_scale": state.lr_scale,
        "overflows": state.overflows,
    }


def peak_memory() -> int:
    """Bytes: the CUDA allocator's peak, or the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
