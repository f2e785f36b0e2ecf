"""What a token counts in the loss: by its kind, and by how far training is (SPEC B3, B4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtune.losses.wishes import complete_weights
from vlmtune.schedule import Piecewise
from vlmtune.types import Kind


class TokenWeights:
    """kind name ("response", "box", …) -> weight over progress; `wishes.DEFAULT_WEIGHTS` for kinds not named.

    Raises VlmtuneError for unknown kinds, negative weights, and where at some progress every weight is zero.
    """

    def __init__(self, weights: Mapping[str, Piecewise] = {}):  # noqa: B006  never changed
        self.schedules = {Kind[name.upper()]: weight for name, weight in complete_weights(weights).items()}

    def at(self, progress: float) -> Tensor:
        """float32[len(Kind)]: the weight of kind k at index k + 1, for `types.token_weights`."""
        table = torch.zeros(len(Kind))
        for kind, weight in self.schedules.items():
            table[int(kind) + 1] = weight(progress)
        return table
