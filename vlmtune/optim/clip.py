"""Gradient norms, measured per rule, and clipped together or per rule (SPEC D4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def gradient_norms(groups: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Euclidean norm of each group's gradients, float32 scalars on the gradients' device; no host sync."""
    norms = {}
    for name, parameters in groups.items():
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            norms[name] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        else:  # a step whose data did not reach these parameters, or a rule that is frozen now
            norms[name] = torch.zeros((), device=parameters[0].device)
    return norms


def clip_gradients(
    groups: dict[str, list[nn.Parameter]], maximum: float | None, own: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Scale gradients down to their limits.

    own: group -> limit of its own norm; the gradients of all other groups have the joint norm `maximum` at most (None:
    no limit). Returns the norms before clipping, per group and of everything as "total".
    """
    own = own or {}
    norms = gradient_norms(groups)
    together = [name for name in groups if name not in own]
    if together and maximum is not None:
        joint = torch.linalg.vector_norm(torch.stack([norms[name] for name in together]))
        _scale([p for name in together for p in groups[name]], maximum, joint)
    for name, limit in own.items():
        _scale(groups[name], limit, norms[name])
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return {**norms, "total": total}


def _scale(parameters: list[nn.Parameter], maximum: float, norm: Tensor) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, torch.clamp(maximum / (norm + 1e-6), max=1.0))
