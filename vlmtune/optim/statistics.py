"""What the gradient of every parameter looks like, and what the step did to it (SPEC D5).

Measured at an interval. Everything stays on the device until one transfer at the end; the extra memory is a sample of
4096 numbers of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmtune.shards import is_in_parts, own_rows

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
    `names`; weights: their samples, float32[at most SAMPLED] each. Of a parameter in parts: of the rows here."""

    names: list[str]
    sums: Tensor
    norms: Tensor
    largest: Tensor
    weights: list[Tensor]


class GradientStatistics:
    """named: canonical name -> parameter. Use: `begin` after the backward, `end` after the optimizer's step.

    gather: what every process measured (JSON values), from each; only where parameters are in parts.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], gather: Callable[[list], list[list]] | None = None):
        self.named, self.gather = named, gather

    @torch.no_grad()
    def begin(self) -> Begun | None:
        """Measure the gradients and remember a sample of the weights; parameters without a gradient are left out.

        None where no parameter has one (text alone, where only the vision tower trains).
        """
        names = [name for name, parameter in self.named.items() if parameter.grad is not None]
        if not names:
            return None
        grads = [own_rows(self.named[name].grad) for name in names]
        return Begun(
            names,
            torch.stack([grad.sum(dtype=torch.float32) for grad in grads]),
            torch.stack(torch._foreach_norm(grads)).float(),
            torch.stack([grad.abs().max() if grad.numel() else grad.new_zeros(()) for grad in grads]).float()
            if self.gather is not None  # a process may have no row of it
            else torch.stack(torch._foreach_norm(grads, float("inf"))).float(),
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
        measured = [[*row, sample.numel()] for row, sample in zip(table.T.tolist(), after, strict=True)]
        rows = {}
        for name, (total, norm, largest, weight, update, sampled) in zip(
            begun.names, self._over_all(begun.names, measured), strict=True
        ):
            parameter = self.named[name]
            count, sampled = parameter.numel(), math.sqrt(sampled)
            mean = total / count
            variance = max(0.0, norm * norm / count - mean * mean)
            rows[name] = Row(
                mean, math.sqrt(variance), largest, norm, weight / sampled, update / sampled, parameter.dim() > 1
            )
        return rows

    def _over_all(self, names: list[str], measured: list[list[float]]) -> list[list[float]]:
        """measured: sum, norm, largest, norms of sampled weights and updates, how many those are, of each name."""
        if self.gather is None:
            return measured
        rows = []
        for n, of_processes in enumerate(zip(*self.gather(measured), strict=True)):
            if not is_in_parts(self.named[names[n]]):  # all have measured the same
                rows.append(measured[n])
                continue
            total, norm, largest, weight, update, sampled = zip(*of_processes, strict=True)
            rows.append(
                [sum(total), math.hypot(*norm), max(largest), math.hypot(*weight), math.hypot(*update), sum(sampled)]
            )
        return rows


def _sample(parameter: Tensor) -> Tensor:
    """float32[at most SAMPLED], evenly spaced."""
    flat = own_rows(parameter).reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLED))].float()
