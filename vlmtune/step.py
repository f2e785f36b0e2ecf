"""What one optimizer step computes: model and objective as one module, and what the losses of its micro-batches add up
to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmtune.losses.objective import Losses, Objective, StepWeights
from vlmtune.models.readouts import readouts_of
from vlmtune.models.vlm import VLM
from vlmtune.types import Batch


class TrainingModule(nn.Module):
    """Model and objective as one module: what a distributed engine wraps."""

    def __init__(self, vlm: VLM, objective: Objective):
        super().__init__()
        self.vlm, self.objective = vlm, objective

    def forward(self, batch: Batch, step: StepWeights) -> Losses:
        readouts = readouts_of(self.vlm.model)
        every_state = readouts is not None or len(self.objective.terms) > 0
        states = self.vlm(batch, step.kinds, self.objective.read(self.vlm, batch, step), every_state)
        return self.objective(states, self.vlm.head, batch, step, readouts)


@dataclass(frozen=True)
class StepLosses:
    """Of one optimizer step: what was minimised, the mean of every task, weighted by kind of token and plain, and the
    means of further terms."""

    total: float
    tasks: dict[str, float]
    plain: dict[str, float]
    terms: dict[str, float]

    @classmethod
    def of(cls, parts: Sequence[Losses]) -> StepLosses:
        """Add up the micro-batches, with one wait for the device."""
        named = [
            (key, value)
            for part in parts
            for key, value in [
                (("total", ""), part.total),
                *((("task", name), value) for name, value in part.tasks.items()),
                *((("plain", name), value) for name, value in part.plain.items()),
                *((("term", name), value) for name, value in part.terms.items()),
            ]
        ]
        sums: dict[tuple[str, str], float] = {}
        values = torch.stack([value for _, value in named]).tolist() if named else []
        for (key, _), value in zip(named, values, strict=True):
            sums[key] = sums.get(key, 0.0) + value
        return cls(
            sums.get(("total", ""), 0.0),
            {name: value for (group, name), value in sums.items() if group == "task"},
            {name: value for (group, name), value in sums.items() if group == "plain"},
            {name: value for (group, name), value in sums.items() if group == "term"},
        )

    @classmethod
    def over_all(cls, parts: Sequence[Mapping[str, Any]]) -> StepLosses:
        """Of a step whose micro-batches were spread over processes. parts: `vars` of each one's."""
        named: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "plain", "terms")}
        for part in parts:
            for name, sums in named.items():
                sums.update(part[name])
        return cls(sum(part["total"] for part in parts), **{name: dict(sums) for name, sums in named.items()})
