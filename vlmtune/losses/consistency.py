"""Replies that depend on the image: likelier with it than with another one (SPEC F6).

A model that answers from the question alone says what is usual, seen or not. Of every sample the same conversation is
read a second time with a picture that is not its own (`data.contrast`). g is by how much the picture makes the reply
likelier: log p(reply | image) - log p(reply | other image), each a mean over the tokens of the reply. As conditional
preference of mDPO (Wang et al. 2024), without its reference model:

margin    max(0, m - g): no gradient where the picture already makes the reply likelier by m nats a token
contrast  -log sigmoid(g): of the two pictures, which one is meant (never at rest)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.types import Batch, supervised_mask

NAME = "consistency"


class Consistency:
    """weight: of progress, for the mean over pairs; margin: in nats a token, of by: margin."""

    def __init__(self, by: Literal["margin", "contrast"], weight: Callable[[float], float], margin: float = 0.0):
        self.by, self.weight, self.margin = by, weight, margin

    def described(self, weight: str) -> str:
        how = f"by at least {self.margin:g} nats a token" if self.by == "margin" else "in doubt between the two"
        return f"+ {weight} x consistency: replies likelier with their picture than with one that is not theirs, {how}"

    def count(self, batch: Batch) -> int:
        """Samples that are read with another picture too."""
        return len(batch.contrasted)

    def __call__(
        self, losses: Tensor, states, other_losses: Tensor, other_states, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """(sum over pairs of the loss, with gradient through both; sum of g without).

        losses: float32[N] of the tokens of `states`, `models.vlm.Supervised` of this micro-batch; other_…: of
        `batch.contrast`.
        """
        own = reply_means(losses, states, len(batch.kinds))
        other = reply_means(other_losses, other_states, len(batch.contrasted))
        rows = torch.tensor(batch.contrasted).to(own.device, non_blocking=True)
        gained = other - own[rows]  # losses are negative logarithms
        costs = F.relu(self.margin - gained) if self.by == "margin" else F.softplus(-gained)
        return costs.sum(), gained.detach().sum()


def reply_means(losses: Tensor, states, rows: int) -> Tensor:
    """float32[rows]: mean loss of the tokens of replies, 0 for a row without any. losses: float32[N], of `states`."""
    carries = supervised_mask(states.kinds).to(losses.dtype)  # multiplied, not selected: the device is not waited for
    zeros = losses.new_zeros(rows)
    counts = zeros.index_add(0, states.row, carries)
    return zeros.index_add(0, states.row, losses * carries) / counts.clamp(min=1.0)
