"""Parts that start or stop to train while a run goes on (SPEC F1)."""

from __future__ import annotations

from collections.abc import Callable

import torch


def set_active(optimizer: torch.optim.Optimizer, is_active: Callable[[str], bool]) -> bool:
    """Let the parameters of active rules train and freeze the rest; returns whether anything changed.

    is_active: rule of a parameter group -> whether it trains now. What is frozen takes no part in the backward, and the
    optimizer forgets what it knew of it: what starts to train starts with a fresh state.
    """
    changed = False
    for group in optimizer.param_groups:
        active = is_active(group["rule"])
        for parameter in group["params"]:
            if parameter.requires_grad != active:
                parameter.requires_grad_(active)
                parameter.grad = None
                optimizer.state.pop(parameter, None)
                changed = True
    return changed
