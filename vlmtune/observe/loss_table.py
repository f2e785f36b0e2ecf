"""What the loss counts, as a table before step 0: kinds of token, tasks, and how much each weighs (SPEC B3-B8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from vlmtune.data.batch import collate
from vlmtune.losses.objective import Objective
from vlmtune.schedule import Piecewise
from vlmtune.types import Encoded, token_weights


def loss_table(objective: Objective, samples: Sequence[Encoded]) -> Table:
    """One row per task of these samples (the first of the run), at progress 0.

    share: of the whole loss that the task has while a token of every task costs the same.
    """
    weights = objective.token_weights
    table = Table(title=f"what the loss counts (first {len(samples)} samples)", title_justify="left")
    table.add_column("task")
    table.add_column("samples", justify="right")
    counted = [kind for kind in weights.schedules if max(weights.schedules[kind].values) > 0]
    for kind in counted:
        table.add_column(f"{kind.name.lower()}\n× {schedule_text(weights.schedules[kind])}", justify="right")
    for name in ("weight per sample", "task weight", "share"):
        table.add_column(name, justify="right")

    by_task: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample.kinds[1:])  # a first token is never predicted
    table_now = weights.at(0.0)
    sums = {task: sum(float(token_weights(k, table_now).sum()) for k in kinds) for task, kinds in by_task.items()}
    task_weights = objective.balance.coefficients(sums)
    total = sum(task_weights.get(task, 0.0) for task in by_task)
    for task, kinds in sorted(by_task.items()):
        tokens = torch.cat(kinds)
        cells = [f"{float((tokens == kind).sum()) / len(kinds):.1f}" for kind in counted]
        weight = task_weights.get(task, 0.0)
        table.add_row(
            task, str(len(kinds)), *cells, f"{sums[task] / len(kinds):.1f}", f"{weight:.3g}", f"{weight / total:.0%}"
        )
    table.caption = "\n".join(_further(objective, samples)) or None
    table.caption_justify = "left"
    return table


def _further(objective: Objective, samples: Sequence[Encoded]) -> list[str]:
    """A line for everything besides the cross-entropy of tokens."""
    counts = [sum(term.count(collate([sample], 0)) for sample in samples) for term in objective.terms]
    terms = zip(objective.terms, counts, strict=True)
    lines = [f"{term.described()} ({count or 'none'} in these samples)" for term, count in terms]
    if (exposure := objective.exposure) is not None:
        rates = [f"{exposure.rate(progress):.0%} at {progress:.0%}" for progress in (0.0, 0.5, 1.0)]
        lines.append(f"tokens of replies read as the model predicts them: {', '.join(rates)} of training")
    if objective.consistency is not None:
        lines.append(objective.consistency.described(schedule_text(objective.consistency.weight)))
    return lines


def schedule_text(weight: Piecewise) -> str:
    """ "1", or "1, 0.5 from 30%, 0 from 80%"."""
    first, *later = zip(weight.starts, weight.values, strict=True)
    return ", ".join([f"{first[1]:g}", *(f"{value:g} from {start:.0%}" for start, value in later)])
