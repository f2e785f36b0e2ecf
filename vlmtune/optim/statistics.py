"""What the gradient of every parameter looks like, and what the step did to it (SPEC D5).

Measured at an interval. Everything stays on the device until one transfer at the end; the extra memory is a sample of
4096 numbers of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLED = 4096  # numbers of a parameter that weight and update are measured on; smaller ones are measured whole


@dataclass(frozen=True)
class Row:
    """Of one parameter. mean, std, largest (absolute), norm: of its gradient before clipping; weight, update: root mean
    squares of its values, and of what the optimizer added to them; is_matrix: it has two dimensions or more."""

    mean: float
    std: float
    largest: float
    norm: float
    weight: float
    update: float
    is_matrix: bool


@dataclass(frozen=True)
class Begun:
    """Between the backward and the update. sums, norms, largest: float32[N] of the gradients of the N parameters in
    `names`; weights: their samples, float32[at most SAMPLED] each."""

    names: list[str]
    sums: Tensor
    norms: Tensor
    largest: Tensor
    weights: list[Tensor]


class GradientStatistics:
    """named: canonical name -> parameter. Use: `begin` after the backward, `end` after the optimizer's step."""

    def __init__(self, named: Mapping[str, nn.Parameter]):
        self.named = named

    @torch.no_grad()
    def begin(self) -> Begun | None:
        """Measure the gradients and remember a sample of the weights; parameters without a gradient are left out.

        None where no parameter has one (text alone, where only the vision tower trains).
        """
        names = [name for name, parameter in self.named.items() if parameter.grad is not None]
        if not names:
            return None
        grads = [self.named[name].grad for name in names]
        return Begun(
            names,
            torch.stack([grad.sum(dtype=torch.float32) for grad in grads]),
            torch.stack(torch._foreach_norm(grads)).float(),
            torch.stack(torch._foreach_norm(grads, float("inf"))).float(),
            [_sample(self.named[name]).clone() for name in names],
        )

    @torch.no_grad()
    def end(self, begun: Begun) -> dict[str, Row]:
        """Compare the weights with those remembered, and fetch everything at once."""
        after = [_sample(self.named[name]) for name in begun.names]
        updates = torch._foreach_norm(torch._foreach_sub(after, begun.weights))
        weights = torch._foreach_norm(begun.weights)
        table = torch.stack(
            [begun.sums, begun.norms, begun.largest, *(torch.stack(n).float() for n in (weights, updates))]
        )
        rows = {}
        for name, sample, (total, norm, largest, weight, update) in zip(
            begun.names, after, table.T.tolist(), strict=True
        ):
            parameter = self.named[name]
            count, sampled = parameter.numel(), math.sqrt(sample.numel())
            mean = total / count
            variance = max(0.0, norm * norm / count - mean * mean)
            rows[name] = Row(
                mean, math.sqrt(variance), largest, norm, weight / sampled, update / sampled, parameter.dim() > 1
            )
        return rows


def _sample(parameter: Tensor) -> Tensor:
    """float32[at most SAMPLED], evenly spaced."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLED))].float()
