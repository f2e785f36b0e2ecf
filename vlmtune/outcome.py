"""What came out of a run: the table and the summary of metrics."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from vlmtune.data.active import Suspect
from vlmtune.data.sources import SampleSource
from vlmtune.data.survey import FittedSource
from vlmtune.evaluate.evaluation import Evaluation
from vlmtune.paths import write_text

MOST_NAMED = 1000  # suspects whose rows are read once more for their ids


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


def write_suspects(
    path: Path, suspects: Sequence[Suspect], sources: Sequence[SampleSource], names: Sequence[str]
) -> str:
    """suspects.jsonl: samples whose loss did not fall, the largest loss first; returns a line for the console.

    names: of the sources. Raises VlmtuneError where a row cannot be read any more.
    """
    rows = []
    for suspect in suspects[:MOST_NAMED]:
        source = sources[suspect.source]
        sample = source[suspect.row]
        rows.append(
            {"source": names[suspect.source],
             "row": source.row_of(suspect.row) if isinstance(source, FittedSource) else suspect.row,
             "id": sample.id, "origin": sample.origin, "task": sample.task, "seen": suspect.seen,
             "first_loss": suspect.first, "last_loss": suspect.last}
        )  # fmt: skip
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if not rows:
        return "sampling: no sample is suspected of a wrong label"
    worst = rows[0]
    place = f"{worst['source']}, row {worst['row']}, loss {worst['first_loss']:.2f} -> {worst['last_loss']:.2f}"
    return (
        f"sampling: suspects, whose labels may be wrong: {len(suspects):,}; their loss stayed far above that of their "
        f"task and did not fall, and they were not chased; the worst is {worst['id']} ({place}), "
        f"{min(len(suspects), MOST_NAMED):,} are in {path}"
    )


def peak_memory() -> int:
    """Bytes: the CUDA allocator's peak, or the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
