"""Modules that compute in float32 whatever the rest of the model computes in (SPEC G4)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


def keep_float32(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[str]:
    """Let the largest modules all of whose parameters are among these compute in float32 under autocast.

    The largest, because what overflows is often no layer's output but a product between two layers (SwiGLU). Their
    inputs are brought to float32, their outputs stay so. Call it after adapters were injected. Returns the names of the
    modules, in order; calling it again changes nothing. Without autocast nothing changes at all. A deep copy of the
    model has islands of its own.
    """
    wanted = {id(parameter) for parameter in parameters}
    names = _largest(model, "", wanted)
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module.forward, _Float32Forward):
            module.forward = _Float32Forward(module)
    return names


def _largest(module: nn.Module, name: str, wanted: set[int]) -> list[str]:
    own = [id(parameter) in wanted for parameter in module.parameters()]
    if own and all(own) and _is_called(module):
        return [name]
    if not any(own):
        return []
    children = module.named_children()
    return [found for child, part in children for found in _largest(part, f"{name}.{child}".lstrip("."), wanted)]


def _is_called(module: nn.Module) -> bool:
    """Whether what is inside runs in its `forward` alone: not of lists of modules, which have none, and not of the
    whole model or its body, whose tower is also called without them."""
    return type(module).forward is not nn.Module.forward and not hasattr(module, "get_image_features")


class _Float32Forward:
    """Takes the place of the `forward` of one module. An object that knows its module, not a closure: copying and
    pickling the model then make one that belongs to the copy."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.inner = vars(module).get("forward")  # another wrapper's, if there is one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, enabled=False):
            if self.inner is not None:
                return self.inner(*_float32(args), **_float32(kwargs))
            return type(self.module).forward(self.module, *_float32(args), **_float32(kwargs))


def _float32(value: Any) -> Any:
    """Floating tensors as float32, inside plain tuples, lists and dictionaries too; anything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _float32(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_float32(part) for part in value)
    return value
