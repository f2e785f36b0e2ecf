"""AdamW over named parameters, in full precision or with a state of 8 bits, and a state that is stored by name.

The door to bitsandbytes' optimizers (SPEC C3): `adamw8bit` keeps both moments in 8 bits (Dettmers et al. 2022), tensors
below 4096 numbers excepted; the paged ones let the state move to the host when the GPU is full.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Literal

import torch
from torch import Tensor

from vlmtune.shards import in_parts_like, is_in_parts
from vlmtune.types import VlmtuneError

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
STATE_BYTES: dict[OptimizerName, float] = {"adamw": 8.0, "adamw8bit": 2.03, "paged_adamw": 0.0, "paged_adamw8bit": 0.0}
"""Of the state of a trained number, on its device; what is paged may lie on the host."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state in full precision, of the shape of the parameter; "step" is a number."""
_UNPAGED: dict[str, OptimizerName] = {"paged_adamw": "adamw", "paged_adamw8bit": "adamw8bit"}


def usable_here(name: OptimizerName, device: torch.device) -> tuple[OptimizerName, str | None]:
    """(the optimizer that runs on this device, a remark where it is not the one that was asked for).

    Paging moves state between a GPU and the host; on a CPU there is nothing to move.
    """
    if name in _UNPAGED and device.type != "cuda":
        return _UNPAGED[name], f"optim.name: {name} needs CUDA, this is {device.type}: {_UNPAGED[name]} is used."
    return name, None


def build_adamw(
    groups: list[dict], betas: tuple[float, float], eps: float, name: OptimizerName = "adamw"
) -> torch.optim.Optimizer:
    """groups: {"params", "names", "rule", "lr", "weight_decay"} each; the initial lr is kept as "peak_lr".

    Raises VlmtuneError for an optimizer of bitsandbytes where it is not installed.
    """
    for group in groups:
        group["peak_lr"] = group["lr"]
    if name == "adamw":  # fused: one pass over memory instead of one for each operation
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    try:
        metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError as error:
        raise VlmtuneError(
            f'optim.name: {name} needs bitsandbytes, which is not installed: pip install "vlmtune[qlora]".'
        ) from error
    from bitsandbytes import optim

    kinds = {
        "adamw8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw8bit": optim.PagedAdamW8bit,
    }
    return kinds[name](groups, betas=betas, eps=eps)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: Callable[[str], float]) -> dict[str, float]:
    """Scale every group from its own peak. factor: rule of a group -> factor (SPEC D1, D3); returns rule -> lr."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor(group["rule"])
    return {group["rule"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State as flat tensors `<parameter name>/<key>` (AdamW: exp_avg, exp_avg_sq, step), ready for safetensors.

    bitsandbytes' tables of quantisation levels are constants shared by all tensors; they are not part of the state.
    """
    flat = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not key.startswith("qmap"):
                    flat[f"{name}/{key}"] = torch.as_tensor(value).contiguous()
    return flat


def stored_like(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name of a stored tensor -> the parameter that its rows belong to; only of parameters in parts."""
    return {
        f"{name}/{key}": parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if is_in_parts(parameter)
        for key in MOMENTS
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, in place. Raises VlmtuneError for a tensor that fits no parameter that trains.

    Of a parameter in parts `flat` has the rows of this process. All of it goes to the parameter's device, where the
    fused AdamW keeps its step counters too.
    """
    left = dict(flat)
    optimizer.state.clear()  # of a run that goes back to this state
    fill = _fill_torch if isinstance(optimizer, torch.optim.AdamW) else _fill_bitsandbytes
    for index, group in enumerate(optimizer.param_groups):
        for number, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
            keys = [key for key in left if key.rpartition("/")[0] == name]
            state = {key.rpartition("/")[2]: left.pop(key) for key in keys}
            if state:
                fill(optimizer, parameter, state, (index, number))
    if left:
        raise VlmtuneError(f"optimizer state of {next(iter(left))} fits no trained parameter; was the plan changed?")


def _fill_torch(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor], place) -> None:
    if state.keys() != {"step", *MOMENTS}:
        raise VlmtuneError(f"optimizer state with {', '.join(sorted(state))} is not AdamW's; was optim.name changed?")
    state = {key: value.clone().to(parameter.device) for key, value in state.items()}
    if is_in_parts(parameter):
        state |= {key: in_parts_like(state[key], parameter) for key in MOMENTS}
    optimizer.state[parameter] = state


def _fill_bitsandbytes(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor], place: tuple[int, int]
) -> None:
    """Let the library make its buffers (paged ones too), then copy into them."""
    optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
    fresh = optimizer.state[parameter]
    tensors = {key for key, value in fresh.items() if isinstance(value, Tensor) and not key.startswith("qmap")}
    if state.keys() != tensors | {"step"} or any(fresh[key].shape != state[key].shape for key in tensors):
        raise VlmtuneError(
            f"optimizer state with {', '.join(sorted(state))} is not this one's; was optim.name changed?"
        )
    for key in tensors:
        fresh[key].copy_(state[key])
    fresh["step"] = int(state["step"])
