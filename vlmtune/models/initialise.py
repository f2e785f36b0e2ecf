"""How what is drawn anew begins (SPEC D6). Rows of new tokens: `vocabulary`; adapters: peft and ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

XAVIER_LIMIT = 0.02
"""Largest standard deviation of a matrix that is drawn anew; wide layers have less by Xavier's formula."""


def xavier_std(parameter: nn.Parameter) -> float:
    """sqrt(2 / (in + out)), a little below XAVIER_LIMIT where that is more (Glorot & Bengio 2010, SPEC D6)."""
    receptive = parameter[0][0].numel() if parameter.dim() > 2 else 1
    fan = (parameter.shape[0] + parameter.shape[1]) * receptive
    return min((2.0 / fan) ** 0.5, 0.95 * XAVIER_LIMIT)


@torch.no_grad()
def draw_anew(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Matrices from a normal distribution of `xavier_std`, biases 0, other vectors (the weights of norms) 1, in place.

    Each tensor depends on `seed` and its place among the names alone. The global random state is left as it was.
    """
    for number, (name, parameter) in enumerate(sorted(parameters.items())):
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * xavier_std(parameter))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
