"""Scheduled sampling: a reply is read partly as the model itself would have written it (SPEC G7).

At inference a model continues its own words, in training the reference's: what it never saw, it cannot recover from.
A transformer reads a whole reply at once, so there are two passes (Mihaylova and Martins 2019): the first, without
gradient, says what the model predicts at every place; the second reads some of that instead of the reference, and is
trained on the reference. Only tokens inside replies are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmtune.types import Batch, supervised_mask

ROWS_AT_ONCE = 1024  # of logits, which are as wide as the vocabulary

Decay = Literal["linear", "exponential", "inverse_sigmoid"]


@dataclass(frozen=True)
class ExposureRate:
    """Progress -> the probability with which a token of a reply is exchanged: rate x (1 - e).

    e, the share of teacher forcing, falls as in Bengio et al. 2015 with x in [0, 1], the progress since `start`:
    linear 1 - x; exponential k^x, 0 < k < 1; inverse_sigmoid k / (k + exp(100 x / k)), k >= 1. Before `start`: 0.
    """

    decay: Decay
    rate: float
    start: float = 0.0
    k: float = 0.0

    def __call__(self, progress: float) -> float:
        if progress < self.start:
            return 0.0
        x = (progress - self.start) / (1.0 - self.start)
        match self.decay:
            case "linear":
                forced = 1.0 - x
            case "exponential":
                forced = self.k**x
            case "inverse_sigmoid":
                forced = self.k / (self.k + math.exp(100.0 * x / self.k))
        return self.rate * (1.0 - forced)


class Exposure:
    """rate: of progress; kept: ids that are neither exchanged nor put in (ends of replies, image placeholders)."""

    def __init__(self, rate: Callable[[float], float], kept: Collection[int]):
        self.rate = rate
        self.kept = torch.tensor(sorted(kept), dtype=torch.int64)

    def inputs(self, vlm: nn.Module, batch: Batch, rate: float) -> Tensor:
        """int64[B, T]: the ids to read. vlm: `models.vlm.VLM`, run once without gradient if anything is exchanged.

        A token's stand-in is the likeliest one after the reference's tokens before it. Draws from torch's generator.
        """
        ids = batch.inputs["input_ids"]
        if rate == 0.0:
            return ids
        kept = self.kept.to(ids.device)
        carries = supervised_mask(batch.kinds[:, 1:])
        drawn = (torch.rand(carries.shape) < rate).to(ids.device)
        chosen = carries & drawn & ~torch.isin(ids[:, 1:], kept)
        if not bool(chosen.any()):
            return ids
        with torch.no_grad():
            hidden = vlm(batch, every_state=False).hidden[chosen[carries]]
            said = torch.cat([vlm.head(rows).argmax(-1) for rows in hidden.split(ROWS_AT_ONCE)])
        read = ids.clone()
        read[:, 1:][chosen] = torch.where(torch.isin(said, kept), ids[:, 1:][chosen], said)
        return read
