"""AdamW over named parameters, with a state that is stored by name."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmtune.types import VlmtuneError

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def build_adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """groups: {"params", "names", "rule", "lr", "weight_decay"} each; the initial lr is kept as "peak_lr"."""
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group from its own peak (SPEC D1: the schedule scales all groups); returns rule -> lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["rule"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State as flat tensors `<parameter name>/<key>` (exp_avg, exp_avg_sq, step), ready for safetensors."""
    flat = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                flat[f"{name}/{key}"] = value.contiguous()
    return flat


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, in place. Raises VlmtuneError for a tensor of a parameter that does not train.

    The moments go to the parameter's device; the step counters stay on the CPU, where AdamW keeps them.
    """
    left = dict(flat)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key: left.pop(f"{name}/{key}").clone() for key in STATE_KEYS if f"{name}/{key}" in left}
            moments = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
            optimizer.state[parameter] = state | moments
    if left:
        raise VlmtuneError(f"optimizer state of {next(iter(left))} fits no trained parameter; was the plan changed?")
