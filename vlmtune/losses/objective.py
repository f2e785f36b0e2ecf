"""What is minimised: sums of token losses over the global weights of the optimizer step (DESIGN idea 2; SPEC B3-B8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlmtune.losses.balance import Balance, ByTokens
from vlmtune.losses.boxes import BoxLoss
from vlmtune.losses.exposure import Exposure
from vlmtune.losses.language import token_cross_entropy
from vlmtune.losses.weights import TokenWeights
from vlmtune.types import Batch, token_weights


@dataclass(frozen=True)
class StepWeights:
    """What the sums of one optimizer step are divided by, counted over all of its micro-batches.

    kinds: float32[len(Kind)], the weight of every kind of token at this progress; tasks: sum of token weights of each
    task; tokens: how many tokens carry loss, by task; micro_batches: how many there are; boxes: boxes in replies, where
    there is a loss of them; exposure: the probability that a token of a reply is read as the model predicts it.
    """

    kinds: Tensor
    tasks: dict[str, float]
    tokens: dict[str, int]
    micro_batches: int
    boxes: int = 0
    exposure: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch. All of it adds up over the micro-batches of a step.

    total: what is differentiated; tasks: share in the mean loss of every task, weighted by kind of token, with
    gradient; plain: the same means without weights, detached; terms: further losses by name, detached.
    """

    total: Tensor
    tasks: dict[str, Tensor]
    plain: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> Losses:
        """The same numbers without the graph behind them."""
        return Losses(
            self.total.detach(), {task: loss.detach() for task, loss in self.tasks.items()}, self.plain, self.terms
        )


class Objective(nn.Module):
    """Next-token cross-entropy, weighted by kind of token, averaged by task, and balanced between tasks.

    weights: of tokens, by kind; balance: how the mean losses of tasks become one number (default: every token counts
    the same, whatever its task); box: is added, as the mean over all boxes of the step; exposure: what is read of
    replies (default: the replies). What a balance learns is a parameter of this module.
    """

    def __init__(
        self,
        weights: TokenWeights | None = None,
        balance: Balance | None = None,
        box: BoxLoss | None = None,
        exposure: Exposure | None = None,
    ):
        super().__init__()
        self.token_weights = weights or TokenWeights()
        self.balance = balance or ByTokens()
        self.box, self.exposure = box, exposure

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
        boxes = 0 if self.box is None else sum(self.box.places(batch).boxes for batch in micro_batches)
        exposure = 0.0 if self.exposure is None else self.exposure.rate(progress)
        return StepWeights(kinds, dict(sums), dict(tokens), len(micro_batches), boxes, exposure)

    def read(self, vlm: nn.Module, batch: Batch, step: StepWeights) -> Tensor | None:
        """int64[B, T]: what the model reads in place of the ids of this micro-batch; None: those."""
        return None if self.exposure is None else self.exposure.inputs(vlm, batch, step.exposure)

    def forward(self, states, head: nn.Module, batch: Batch, step: StepWeights) -> Losses:
        """states: `models.vlm.Supervised` of this micro-batch, made with `step.kinds`."""
        losses = token_cross_entropy(states.hidden, head, states.targets)
        names = sorted({task for task in batch.tasks if step.tasks[task] > 0})
        index = torch.tensor([names.index(t) if t in names else 0 for t in batch.tasks], device=losses.device)
        zeros = torch.zeros(len(names), device=losses.device)
        weighted = zeros.index_add(0, index[states.row], losses * states.weights)
        plain = zeros.index_add(0, index[states.row], losses.detach())
        tasks = {name: weighted[n] / step.tasks[name] for n, name in enumerate(names)}
        total = self.balance(tasks, step.tasks, step.micro_batches)
        if not names:  # nothing of this micro-batch carries loss: the graph must still reach every parameter
            total = total + 0.0 * losses.sum()
        terms = {}
        if self.box is not None and step.boxes:
            carries = token_weights(batch.kinds[:, 1:], step.kinds) > 0
            boxes = self.box(states, head, batch, carries) / step.boxes
            total, terms = total + boxes, {"box": boxes.detach()}
        return Losses(total, tasks, {name: plain[n] / step.tokens[name] for n, name in enumerate(names)}, terms)
