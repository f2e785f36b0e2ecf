"""Modules that compute in float32 whatever the rest of the model computes in (SPEC G4)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

MARK = "_vlmtune_float32"


def keep_float32(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[str]:
    """Let the largest modules all of whose parameters are among these compute in float32 under autocast.

    The largest, because what overflows is often no layer's output but a product between two layers (SwiGLU). Their
    inputs are brought to float32, their outputs stay so. Call it after adapters were injected. Returns the names of the
    modules, in order; calling it again changes nothing. Without autocast nothing changes at all.
    """
    wanted = {id(parameter) for parameter in parameters}
    names = _largest(model, "", wanted)
    for name in names:
        module = model.get_submodule(name) if name else model
        if not getattr(module, MARK, False):
            setattr(module, MARK, True)
            module.forward = _in_float32(module.forward)
    return names


def _largest(module: nn.Module, name: str, wanted: set[int]) -> list[str]:
    own = [id(parameter) in wanted for parameter in module.parameters()]
    if own and all(own):
        return [name]
    if not any(own):
        return []
    children = module.named_children()
    return [found for child, part in children for found in _largest(part, f"{name}.{child}".lstrip("."), wanted)]


def _in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device, enabled=False):
            return forward(*_float32(args), **_float32(kwargs))

    return compute


def _float32(value: Any) -> Any:
    """Floating tensors as float32, inside tuples, lists and dictionaries too; anything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_float32(part) for part in value)
    return value
