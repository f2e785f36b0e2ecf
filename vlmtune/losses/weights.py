"""What a token counts in the loss: by its kind, and by how far training is (SPEC B3, B4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import Piecewise, piecewise
from vlmtune.types import SUPERVISED, Kind

WEIGHABLE = (Kind.SPECIAL, Kind.INSTRUCTION, Kind.RESPONSE, Kind.BOX, Kind.ENTITY)
"""Kinds that may carry loss. Image placeholders and padding are no text, and UNTRAINED was marked `train: false`."""


class TokenWeights:
    """kind name ("response", "box", …) -> weight over progress; kinds that are not named have their default.

    Default: 1 for what an assistant says, 0 for the rest. Raises VlmtuneError for unknown kinds, negative weights, and
    where at some progress every weight is zero.
    """

    def __init__(self, weights: Mapping[str, Piecewise] = {}):  # noqa: B006  never changed
        names = {kind.name.lower(): kind for kind in WEIGHABLE}
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise VlmtuneError(f"no tokens of kind {unknown[0]!r} can carry loss; kinds: {', '.join(names)}")
        self._weights = {
            kind: weights.get(name, piecewise(1.0 if kind in SUPERVISED else 0.0)) for name, kind in names.items()
        }
        for name, weight in weights.items():
            if min(weight.values) < 0:
                raise VlmtuneError(f"the weight of {name} falls to {min(weight.values):g}; weights are never negative")
        for start in self.starts:
            if not self.at(start).any():
                raise VlmtuneError(f"from progress {start:g} on every weight is 0, so nothing would be learned")

    @property
    def starts(self) -> list[float]:
        """Progress at which some weight changes, in order; begins with 0."""
        return sorted({start for weight in self._weights.values() for start in weight.starts})

    def at(self, progress: float) -> Tensor:
        """float32[len(Kind)]: the weight of kind k at index k + 1, for `types.token_weights`."""
        table = torch.zeros(len(Kind))
        for kind, weight in self._weights.items():
            table[int(kind) + 1] = weight(progress)
        return table
