"""Gradient norms, measured per rule, and clipped together or per rule (SPEC D4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlmtune.shards import is_in_parts, own_rows

AddUp = Callable[[Tensor], None]
"""Replaces a tensor by its sum over all processes."""


def gradient_norms(groups: dict[str, list[nn.Parameter]], add_up: AddUp | None = None) -> dict[str, Tensor]:
    """Euclidean norm of each group's gradients, float32 scalars on the gradients' device; no host sync.

    add_up: only where parameters are in parts: the norm of such a gradient is that of all rows, in all processes.
    """
    norms, squares = {}, []
    for name, parameters in groups.items():
        grads = [p.grad for p in parameters if p.grad is not None]
        # none: a step whose data did not reach these parameters, or a rule that is frozen now
        norms[name] = _norm([grad for grad in grads if not is_in_parts(grad)], parameters[0].device)
        if add_up is not None:
            own = _norm([own_rows(grad) for grad in grads if is_in_parts(grad)], parameters[0].device)
            squares.append(own.double() ** 2)
    if add_up is None:
        return norms
    of_parts = torch.stack(squares)
    add_up(of_parts)
    return {
        name: (norm.double() ** 2 + part).sqrt().float()
        for (name, norm), part in zip(norms.items(), of_parts, strict=True)
    }


def _norm(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """float32 scalar."""
    if not grads:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())


def clip_gradients(
    groups: dict[str, list[nn.Parameter]],
    maximum: float | None,
    own: Mapping[str, float] | None = None,
    add_up: AddUp | None = None,
) -> dict[str, Tensor]:
    """Scale gradients down to their limits.

    own: group -> limit of its own norm; the gradients of all other groups have the joint norm `maximum` at most (None:
    no limit); add_up: as of `gradient_norms`. Returns the norms before clipping, per group and of everything as
    "total".
    """
    own = own or {}
    norms = gradient_norms(groups, add_up)
    together = [name for name in groups if name not in own]
    if together and maximum is not None:
        joint = torch.linalg.vector_norm(torch.stack([norms[name] for name in together]))
        _scale([p for name in together for p in groups[name]], maximum, joint)
    for name, limit in own.items():
        _scale(groups[name], limit, norms[name])
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return {**norms, "total": total}


def _scale(parameters: list[nn.Parameter], maximum: float, norm: Tensor) -> None:
    grads = [own_rows(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, torch.clamp(maximum / (norm + 1e-6), max=1.0))
