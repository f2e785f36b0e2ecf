"""What one optimizer step computes before its update: model and objective as one module, the gradients of one process's
share of the samples, and what the losses and gradients of all micro-batches of all processes add up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmtune.adapt.plan import Plan
from vlmtune.losses.objective import Losses, Objective, StepWeights
from vlmtune.models.batchnorm import SharedTower
from vlmtune.models.readouts import readouts_of
from vlmtune.models.vlm import VLM
from vlmtune.models.vocabulary import embedding_rows
from vlmtune.optim.precision import Precision, autocast
from vlmtune.processes import Processes
from vlmtune.recovery import NonFinite
from vlmtune.shards import is_in_parts
from vlmtune.types import Batch, VlmtuneError


class TrainingModule(nn.Module):
    """Model and objective as one module: what a distributed engine wraps."""

    def __init__(self, vlm: VLM, objective: Objective):
        super().__init__()
        self.vlm, self.objective = vlm, objective

    def forward(self, batch: Batch, step: StepWeights) -> Losses:
        readouts = readouts_of(self.vlm.model)
        every_state = readouts is not None or len(self.objective.terms) > 0
        states = self.vlm(batch, step.kinds, self.objective.read(self.vlm, batch, step), every_state)
        contrast = None
        if self.objective.reads_contrast(batch, step):
            contrast = self.vlm(batch.contrast, step.kinds, every_state=False)
        return self.objective(states, self.vlm.head, batch, step, readouts, contrast)


@dataclass(frozen=True)
class StepLosses:
    """Of one optimizer step: what was minimised, the mean of every task, weighted by kind of token and plain, the means
    of further terms, and of every sample its number in the run, its mean and its largest token loss, where somebody
    asked for that (`Batch.numbers`)."""

    total: float
    tasks: dict[str, float]
    plain: dict[str, float]
    terms: dict[str, float]
    samples: Sequence[tuple[int, float, float]] = ()

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
        asked = [part.samples.reshape(-1) for part in parts if part.samples is not None]
        values = torch.cat([torch.stack([value for _, value in named]), *asked]).tolist() if named else []
        for (key, _), value in zip(named, values, strict=False):  # those of samples are behind
            sums[key] = sums.get(key, 0.0) + value
        samples, begin = [], len(named)
        for numbers in (part.numbers for part in parts if part.samples is not None):
            end = begin + 2 * len(numbers)
            middle = begin + len(numbers)
            samples += zip(numbers, values[begin:middle], values[middle:end], strict=True)
            begin = end
        return cls(
            sums.get(("total", ""), 0.0),
            {name: value for (group, name), value in sums.items() if group == "task"},
            {name: value for (group, name), value in sums.items() if group == "plain"},
            {name: value for (group, name), value in sums.items() if group == "term"},
            samples,
        )

    @classmethod
    def over_all(cls, parts: Sequence[Mapping[str, Any]]) -> StepLosses:
        """Of a step whose micro-batches were spread over processes. parts: `vars` of each one's."""
        named: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "plain", "terms")}
        for part in parts:
            for name, sums in named.items():
                sums.update(part[name])
        samples = sorted(tuple(sample) for part in parts for sample in part["samples"])  # alike for any number of them
        total = sum(part["total"] for part in parts)
        return cls(total, **{name: dict(sums) for name, sums in named.items()}, samples=samples)


@dataclass(frozen=True)
class StepSums:
    """Of all processes. broken: ranks with losses that are not finite; wish: number of a signal that came to one."""

    losses: StepLosses
    broken: list[int]
    wish: int | None


class StepShare:
    """The share of every optimizer step that one of several processes computes (of one process: all of it).

    tower: runs the vision tower over all images of a step at once; filler: a micro-batch without a sample, of a sharded
    model, whose forwards and backwards all processes make together. Gradients are left in the parameters; `weights`
    are those of the last step.
    """

    def __init__(
        self,
        module: TrainingModule,
        plan: Plan,
        precision: Precision,
        device: torch.device,
        tower: SharedTower | None,
        processes: Processes,
        filler: Batch | None = None,
    ):
        self.module, self.plan, self.precision, self.device = module, plan, precision, device
        self.tower, self.processes, self.filler = tower, processes, filler
        self.weights: StepWeights | None = None
        self._rows = embedding_rows(module.vlm.model)

    def evened(self, micro_batches: list[Batch], step: int) -> list[Batch]:
        """As many micro-batches in every process, where they run together.

        Raises NonFinite in all processes where one has ids beyond the vocabulary: none may miss a forward.
        """
        if self.filler is None:
            return micro_batches
        wrong = next(filter(None, map(self._without_a_row, micro_batches)), None)
        told = self.processes.gather(f"micro-batches of step {step + 1}", [len(micro_batches), wrong])
        if failures := {rank: what for rank, (_, what) in enumerate(told) if what is not None}:
            raise NonFinite(next(iter(failures.values())), list(failures))
        return micro_batches + [self.filler] * (max(count for count, _ in told) - len(micro_batches))

    def weigh(self, micro_batches: list[Batch], step: int, total_steps: int) -> StepWeights:
        """What the sums of this step are divided by, counted by all processes before the first forward."""
        own = self.module.objective.weights(micro_batches, step / total_steps)
        self.weights = own.over_all(self.processes.gather(f"weights of step {step + 1}", own.counted()))
        return self.weights

    def gradients(
        self, micro_batches: list[Batch], weights: StepWeights, scale: float, step: int, wish: int | None
    ) -> StepSums:
        """Forward and backward of every micro-batch; then losses and gradients are those of all processes.

        scale: of the loss; wish: number of a signal that came to this process. Raises NonFinite in all processes where
        one has ids beyond the vocabulary.
        """
        parts: list[Losses] = []
        failure = None
        if self.tower is not None:
            with autocast(self.precision, self.device):
                self.tower.begin(micro_batches)
        try:
            for number, batch in enumerate(micro_batches):
                self.processes.at(
                    f"step {step + 1}, micro-batch {number + 1} of {len(micro_batches)}", batch.sample_ids
                )
                with self.processes.explained(f"step {step + 1}"):
                    with autocast(self.precision, self.device):
                        losses = self._forward(number, batch, weights)  # sums / global weight: they add up
                    if losses.total.requires_grad:  # text alone reaches nothing where only vision and projector train
                        (losses.total * scale).backward()
                parts.append(losses.detach())
        except NonFinite as broken:
            failure = broken.what
        if self.tower is not None:
            self.tower.finish()
        own = StepLosses.of(parts)
        told = self.processes.gather(
            f"losses of step {step + 1}",
            {"losses": vars(own), "failure": failure, "wish": wish, "reached": self._reached()},
        )
        if failures := {rank: part["failure"] for rank, part in enumerate(told) if part["failure"] is not None}:
            raise NonFinite(next(iter(failures.values())), list(failures))
        if self.processes.size > 1:
            self._add_up(f"gradients of step {step + 1}", [part["reached"] for part in told], weights)
        return StepSums(
            StepLosses.over_all([part["losses"] for part in told]),
            [rank for rank, part in enumerate(told) if not math.isfinite(part["losses"]["total"])],
            next((part["wish"] for part in told if part["wish"] is not None), None),
        )

    def refuse_missing_gradients(self) -> None:
        """After the first backward of a phase every parameter that trains has a gradient, or the run stops and names
        it. Raises VlmtuneError."""
        training = {name: p for name, p in self.plan.parameters.items() if p.requires_grad}
        missing = [name for name, p in training.items() if p.grad is None]
        if missing:
            raise VlmtuneError(
                f"plan: {len(missing)} of {len(training)} parameters meant to train got no gradient, "
                f"first {missing[0]}; freeze them, or check that the data reaches that part (vision needs images)."
            )

    def _forward(self, number: int, batch: Batch, weights: StepWeights) -> Losses:
        if (wrong := self._without_a_row(batch)) is not None:  # on a GPU the process could not go on after it
            raise NonFinite(wrong)
        batch = batch.to(self.device)
        return self.module(batch if self.tower is None else self.tower.inputs(number, batch), weights)

    def _without_a_row(self, batch: Batch) -> str | None:
        ids = batch.inputs["input_ids"]
        if 0 <= int(ids.min()) <= int(ids.max()) < self._rows:
            return None
        return f"ids from {int(ids.min())} to {int(ids.max())} where the embedding has {self._rows} rows"

    def _training(self) -> list[nn.Parameter]:
        return [p for p in (*self.plan.parameters.values(), *self.module.objective.parameters()) if p.requires_grad]

    def _reached(self) -> str:
        """One figure for every parameter that trains: 1 where it has a gradient of this process alone."""
        return "".join("0" if p.grad is None or is_in_parts(p.grad) else "1" for p in self._training())

    def _add_up(self, what: str, reached: Sequence[str], weights: StepWeights) -> None:
        """reached: by each process."""
        parameters = [p for p, *flags in zip(self._training(), *reached, strict=True) if "1" in flags]
        for parameter in parameters:
            if parameter.grad is None:  # another process reached it, this one adds nothing
                parameter.grad = torch.zeros_like(parameter)
        gathered = self.module.objective.balance.gathered(weights.tasks)
        self.processes.add_up(what, [*(p.grad for p in parameters), *gathered])
