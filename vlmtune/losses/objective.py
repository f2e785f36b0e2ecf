"""What is minimised: sums of token losses over the global weight of the optimizer step (DESIGN idea 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmtune.losses.language import token_cross_entropy
from vlmtune.types import Batch, supervised_mask


class Objective(nn.Module):
    """Next-token cross-entropy, split by task. Every term is a sum divided by the weight of the whole step."""

    def weights(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Supervised tokens of each task in all micro-batches of the step, counted before the first forward."""
        counts: Counter[str] = Counter()
        for batch in micro_batches:
            per_row = supervised_mask(batch.kinds[:, 1:]).sum(dim=1).tolist()
            for task, count in zip(batch.tasks, per_row, strict=True):
                counts[task] += count
        return dict(counts)

    def forward(self, states, head: nn.Module, batch: Batch, weights: dict[str, float]) -> dict[str, Tensor]:
        """{"language/<task>": float32 scalar}; over the micro-batches of a step they add up to the mean token loss.

        states: `models.vlm.Supervised` of this micro-batch; weights: of the whole step.
        """
        losses = token_cross_entropy(states.hidden, head, states.targets)
        total = sum(weights.values())
        names = sorted(set(batch.tasks))
        index = torch.tensor([names.index(task) for task in batch.tasks], device=losses.device)
        sums = torch.zeros(len(names), device=losses.device).index_add(0, index[states.row], losses)
        return {f"language/{name}": sums[n] / total for n, name in enumerate(names)}
