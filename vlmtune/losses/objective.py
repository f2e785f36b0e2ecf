"""What is minimised: sums of token losses over the global weights of the optimizer step (DESIGN idea 2; SPEC B3-B8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmtune.losses.balance import Balance, ByTokens
from vlmtune.losses.consistency import NAME, Consistency
from vlmtune.losses.exposure import Exposure
from vlmtune.losses.language import token_cross_entropy
from vlmtune.losses.weights import TokenWeights
from vlmtune.types import Batch, token_weights


@dataclass(frozen=True)
class StepWeights:
    """What the sums of one optimizer step are divided by, counted over all of its micro-batches.

    kinds: float32[len(Kind)], the weight of every kind of token at this progress; tasks: sum of token weights of each
    task; tokens: how many tokens carry loss, by task; micro_batches: how many there are; counts: what each further term
    is a mean over, by its name; exposure: the probability that a token of a reply is read as the model predicts it;
    consistency: the weight of the loss of that name.
    """

    kinds: Tensor
    tasks: dict[str, float]
    tokens: dict[str, int]
    micro_batches: int
    counts: dict[str, int] = field(default_factory=dict)
    exposure: float = 0.0
    consistency: float = 0.0

    def counted(self) -> dict[str, Any]:
        """What was counted, as JSON values."""
        return {name: getattr(self, name) for name in ("tasks", "tokens", "micro_batches", "counts")}

    def over_all(self, counted: Sequence[dict[str, Any]]) -> StepWeights:
        """Of a step whose micro-batches were counted by several processes, this one among them."""
        sums: dict[str, Counter[str]] = {name: Counter() for name in ("tasks", "tokens", "counts")}
        for part in counted:
            for name, sum_ in sums.items():
                sum_.update(part[name])
        micro_batches = sum(part["micro_batches"] for part in counted)
        return replace(self, micro_batches=micro_batches, **{name: dict(sum_) for name, sum_ in sums.items()})


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch. All of it adds up over the micro-batches of a step.

    total: what is differentiated; tasks: share in the mean loss of every task, weighted by kind of token, with
    gradient; plain: the same means without weights, detached; terms: further losses by name, detached; samples:
    float[2, samples], the mean and the largest token loss of each, weights 1, detached (not a number for one without
    loss), and numbers: which samples of the run they are; nothing where nobody asked (`Batch.numbers`).
    """

    total: Tensor
    tasks: dict[str, Tensor]
    plain: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    numbers: Sequence[int] = ()

    def detach(self) -> Losses:
        """The same numbers without the graph behind them."""
        tasks = {task: loss.detach() for task, loss in self.tasks.items()}
        return replace(self, total=self.total.detach(), tasks=tasks)


class Term(Protocol):
    """A loss beside the cross-entropy of tokens: a sum over some things, divided by how many the step has."""

    name: str

    def count(self, batch: Batch) -> int: ...

    def described(self) -> str:
        """One line for the table before step 0."""

    def __call__(self, states, head, readouts, batch: Batch, carries: Tensor) -> dict[str, Tensor]:
        """Weighted sums, "name" or "name/part"; none where the micro-batch has nothing to sum over.

        states: `models.vlm.Supervised`; head: of the language; readouts: `heads` of the model, or None; carries:
        bool[B, T - 1], the targets that `states` holds, in its order.
        """


class Objective(nn.Module):
    """Next-token cross-entropy, weighted by kind of token, averaged by task, and balanced between tasks.

    weights: of tokens, by kind; balance: how the mean losses of tasks become one number (default: every token counts
    the same, whatever its task); terms: are added, each as the mean over what it counts in the step; exposure: what
    is read of replies (default: the replies); consistency: of replies and images, also added. What a balance learns is
    a parameter of this module.
    """

    def __init__(
        self,
        weights: TokenWeights | None = None,
        balance: Balance | None = None,
        terms: Sequence[Term] = (),
        exposure: Exposure | None = None,
        consistency: Consistency | None = None,
    ):
        super().__init__()
        self.token_weights = weights or TokenWeights()
        self.balance = balance or ByTokens()
        self.terms, self.exposure, self.consistency = nn.ModuleList(terms), exposure, consistency

    def optimizer_groups(self, lr: float) -> list[dict]:
        """Groups for the optimizer of what the balance learns; empty where it learns nothing. Never decayed."""
        learned = dict(self.named_parameters())
        if not learned:
            return []
        names = [f"objective.{name}" for name in learned]
        return [{"params": list(learned.values()), "names": names, "rule": "balance", "lr": lr, "weight_decay": 0.0}]

    def weights(self, micro_batches: Sequence[Batch], progress: float = 0.0) -> StepWeights:
        """Count what the step divides by, before its first forward. progress: in [0, 1]."""
        kinds = self.token_weights.at(progress)
        sums: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for batch in micro_batches:
            weights = token_weights(batch.kinds[:, 1:], kinds)
            rows = zip(batch.tasks, weights.sum(dim=1).tolist(), (weights > 0).sum(dim=1).tolist(), strict=True)
            for task, weight, count in rows:
                sums[task] += weight
                tokens[task] += count
        counts = {term.name: sum(term.count(batch) for batch in micro_batches) for term in self.terms}
        exposure = 0.0 if self.exposure is None else self.exposure.rate(progress)
        consistency = 0.0
        if self.consistency is not None:
            consistency = self.consistency.weight(progress)
            counts[NAME] = sum(self.consistency.count(batch) for batch in micro_batches)
        return StepWeights(kinds, dict(sums), dict(tokens), len(micro_batches), counts, exposure, consistency)

    def read(self, vlm: nn.Module, batch: Batch, step: StepWeights) -> Tensor | None:
        """int64[B, T]: what the model reads in place of the ids of this micro-batch; None: those."""
        return None if self.exposure is None else self.exposure.inputs(vlm, batch, step.exposure)

    def reads_contrast(self, batch: Batch, step: StepWeights) -> bool:
        """Whether `forward` wants the states of `batch.contrast`."""
        return step.consistency > 0 and batch.contrast is not None

    def forward(
        self,
        states,
        head: nn.Module,
        batch: Batch,
        step: StepWeights,
        readouts: nn.ModuleDict | None = None,
        contrast=None,
    ) -> Losses:
        """states: `models.vlm.Supervised` of this micro-batch, made with `step.kinds`; head: of the language; readouts:
        `heads` of the model; contrast: states of `batch.contrast`, where they are wanted."""
        losses = token_cross_entropy(states.hidden, head, states.targets)
        names = sorted({task for task in batch.tasks if step.tasks[task] > 0})
        index = torch.tensor([names.index(t) if t in names else 0 for t in batch.tasks])
        index = index.to(losses.device, non_blocking=True)
        zeros = torch.zeros(len(names), device=losses.device)
        weighted = zeros.index_add(0, index[states.row], losses * states.weights)
        plain = zeros.index_add(0, index[states.row], losses.detach())
        tasks = {name: weighted[n] / step.tasks[name] for n, name in enumerate(names)}
        total = self.balance(tasks, step.tasks, step.micro_batches)
        if not names:  # nothing of this micro-batch carries loss: the graph must still reach every parameter
            total = total + 0.0 * losses.sum()
        terms: dict[str, Tensor] = {}
        carries = token_weights(batch.kinds[:, 1:], step.kinds) > 0
        for term in self.terms:
            for name, value in term(states, head, readouts, batch, carries).items():
                mean = value / step.counts[term.name]
                total, terms[name] = total + mean, mean.detach()
        if contrast is not None:
            other = token_cross_entropy(contrast.hidden, head, contrast.targets)
            costs, gained = self.consistency(losses, states, other, contrast, batch)
            mean = step.consistency * costs / step.counts[NAME]
            total, terms[NAME] = total + mean, mean.detach()
            terms[f"{NAME}/gain"] = gained / step.counts[NAME]
        if readouts is not None:  # a micro-batch without regions reaches the heads too
            total = total + 0.0 * sum(parameter.sum() for parameter in readouts.parameters())
        plain_tasks = {name: plain[n] / step.tokens[name] for n, name in enumerate(names)}
        samples = _of_samples(losses.detach(), states.row, batch.size) if batch.numbers else None
        return Losses(total, tasks, plain_tasks, terms, samples, batch.numbers)


def _of_samples(losses: Tensor, row: Tensor, count: int) -> Tensor:
    """float[2, count]: the mean and the largest of the token losses of each sample; the mean of none is not a number.
    losses: float[N]; row: int64[N], below count: fillers have no loss. The device is not waited for."""
    zeros = losses.new_zeros(count)
    mean = zeros.index_add(0, row, losses) / zeros.index_add(0, row, torch.ones_like(losses))
    return torch.stack([mean, zeros.scatter_reduce(0, row, losses, "amax")])
