"""Gradient norms, measured per group and clipped over all of them (SPEC D4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradient_norms(groups: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Euclidean norm of each group's gradients, float32 scalars on the gradients' device; no host sync."""
    norms = {}
    for name, parameters in groups.items():
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            norms[name] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        else:  # a step whose data did not reach these parameters
            norms[name] = torch.zeros((), device=parameters[0].device)
    return norms


def clip_gradients(groups: dict[str, list[nn.Parameter]], maximum: float) -> dict[str, Tensor]:
    """Scale all gradients so that their joint norm is at most `maximum`.

    Returns the norms before clipping, per group and as "total".
    """
    norms = gradient_norms(groups)
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    factor = torch.clamp(maximum / (total + 1e-6), max=1.0)
    grads = [p.grad for parameters in groups.values() for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor)
    return {**norms, "total": total}
