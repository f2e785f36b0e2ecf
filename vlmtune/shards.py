"""Tensors of which every process holds some rows, and the model that is made of them. Level 0.

The door to FSDP2: what torch calls a DTensor that is sharded along its first dimension is here a tensor in parts, and
its local tensor are its own rows. Everything else in vlmtune asks here, and sees plain tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

BODY = "vlmtune_body"


def is_in_parts(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return isinstance(tensor, DTensor)


def own_rows(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its graph, sharing memory: all of it where it is whole."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def rows_of(tensor: Tensor) -> slice:
    """Which rows these are. Only of a tensor in parts: as many to each process as to the first, fewer at the end."""
    each = math.ceil(tensor.shape[0] / tensor.device_mesh.size())
    first = min(tensor.shape[0], each * tensor.device_mesh.get_local_rank())
    return slice(first, first + own_rows(tensor).shape[0])


def in_parts_like(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor in parts of the shape of `like`, of which this process holds `rows`."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, whole: Iterable[nn.Parameter]) -> None:
    """Leave every process its rows of every parameter of `model`, in place; a block has all of its own while it runs.

    What lies in no block (embedding, head, projector, norms) is there from the forward to the end of the backward.
    Gradients are sums over processes. whole: parameters that stay as they are, in every process, without such sums.
    """
    kept = set(whole)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot sum and multiply in one
    setattr(model, BODY, MethodType(_run_body, model))
    register_fsdp_forward_method(model, BODY)


def _run_body(model: nn.Module, **inputs: Any) -> Any:
    return model.base_model(**inputs)


def run_body(model: nn.Module, **inputs: Any) -> Any:
    """The model without its head; a sharded one gathers what lies in no block first, its head too."""
    return getattr(model, BODY, model.base_model)(**inputs)


@contextlib.contextmanager
def gathered(model: nn.Module, path: str) -> Iterator[None]:
    """Within, the parameters of the module at `path` are whole. All processes do this together."""
    owner, module = None, model
    for name in ["", *path.split(".")]:
        module = getattr(module, name) if name else module
        owner = module if isinstance(module, FSDPModule) else owner
    if owner is None:
        yield
        return
    owner.unshard()
    try:
        yield
    finally:
        owner.reshard()


def fold(model: nn.Module) -> None:
    """Give back what a forward without a backward gathered: parameters in parts are what a model has between steps."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def forward_only(model: nn.Module) -> torch.autograd.grad_mode.inference_mode | torch.no_grad:
    """The context of a forward that needs no gradients.

    What a sharded model gathers in its first forward is used by all later ones, in training too: no inference tensors.
    """
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()
