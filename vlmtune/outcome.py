"""What came out of a run: the table and the summary of metrics, and the pictures of the run page."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from rich.table import Table

from vlmtune.data.images import load_image
from vlmtune.evaluate.evaluation import Evaluation, Scored
from vlmtune.evaluate.metrics import reference_text
from vlmtune.types import Boxes, Part, Points, Text, Turn


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


def gallery(folder: Path, before: dict | None, after: Evaluation, count: int) -> list[dict]:
    """Held-out samples for the run page, spread over groups and tasks; their first image is written to images/."""
    replies = {(g, i): (reply, boxes) for g, i, reply, boxes in (before["replies"] if before else [])}
    places: dict[tuple[str, str], list[Scored]] = {}
    for scored in after.scored:
        if scored.sample.images:
            places.setdefault((scored.group, scored.sample.task), []).append(scored)
    per_place = -(-count // max(1, len(places)))
    chosen = [scored for rows in places.values() for scored in rows[:per_place]][:count]
    entries = []
    (folder / "images").mkdir(exist_ok=True)
    for number, scored in enumerate(chosen):
        image = load_image(scored.sample.images[0].source, scored.sample.origin)
        name = f"images/{number:03d}.png"
        image.save(folder / name)
        reply, boxes = replies.get((scored.group, scored.sample.id), (None, []))
        last = scored.sample.turns[-1]
        truth = [list(b) for part in last.parts if isinstance(part, Boxes) for b in part.boxes]
        asked = [list(b) for t in scored.sample.turns[:-1] for p in t.parts if isinstance(p, Boxes) for b in p.boxes]
        entries.append(
            {
                "image": name,
                "group": scored.group,
                "task": scored.sample.task,
                "question": question_text(scored.sample),
                "reference": reference_text(last) or _counted(last),
                "before": reply,
                "after": scored.reply,
                "boxes_true": truth or asked,
                "boxes_before": boxes,
                "boxes_after": [list(box) for box in scored.boxes],
                "width": image.width,
                "height": image.height,
            }
        )
    return entries


def question_text(sample) -> str:
    """The last user turn in words; a region is shown as "[region]", a point as "[point]" or "[click]"."""
    user = [turn for turn in sample.turns if turn.role == "user"][-1]
    return "".join(map(_in_words, user.parts)).strip()


def _counted(turn: Turn) -> str:
    """What a reply without words consists of: "2 boxes", "1 click"."""
    boxes = sum(len(part.boxes) for part in turn.parts if isinstance(part, Boxes))
    counts = {"point": 0, "click": 0}
    for part in turn.parts:
        if isinstance(part, Points):
            counts["click" if part.click else "point"] += len(part.points)
    said = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count]
    if boxes or not said:
        said.insert(0, f"{boxes} box" + "es" * (boxes != 1))
    return ", ".join(said)


def _in_words(part: Part) -> str:
    match part:
        case Text(text):
            return text
        case Boxes():
            return "[region]"
        case Points(click=click):
            return "[click]" if click else "[point]"
    return ""
