"""LoRA layers in fewer passes over memory, and all other exchanges of `models.fused`: `train.fused`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from vlmtune.models.fused import EXCHANGED, fuse, unfuse
from vlmtune.models.packing import is_packing, use_packed_attention, use_padding


class _Adapted(torch.autograd.Function):
    """x·Wᵀ + bias + scale · (x·Aᵀ)·Bᵀ with a frozen W (Hu et al. 2021).

    The thin products are added where the wide ones stand: no further tensor of the output's or input's size is made.
    x float[N, in]; weight float[out, in]; a float[r, in]; b float[out, r]; all products in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale: float, dtype: torch.dtype) -> Tensor:
        x, weight, low_a, low_b = x.to(dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
        out = F.linear(x, weight, None if bias is None else bias.to(dtype))
        inner = x @ low_a.T
        out.addmm_(inner, low_b.T, alpha=scale)
        ctx.save_for_backward(x, weight, low_a, low_b, inner)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, a, b, inner = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        d_x = d_a = d_b = None
        upstream = upstream.to(x.dtype)
        if needs_x or needs_a:
            d_inner = (upstream @ b).mul_(ctx.scale)
        if needs_b:
            d_b = (upstream.T @ inner).mul_(ctx.scale).to(ctx.dtypes[1])
        if needs_a:
            d_a = (d_inner.T @ x).to(ctx.dtypes[0])
        if needs_x:
            d_x = (upstream @ weight).addmm_(d_inner, a)
        return d_x, None, None, d_a, d_b, None, None


class FusedLora(Linear):
    """peft's LoRA on a linear module with another forward, for one plain active adapter over a frozen `nn.Linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        with torch.autocast(device, enabled=False):
            out = _Adapted.apply(
                x.flatten(0, -2), base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight,
                float(self.scaling[name]), dtype,
            )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The adapter to compute with; None where peft's own forward has to."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or type(self.base_layer) is not nn.Linear:
            return None
        (name,) = names
        dropout, base = self.lora_dropout[name], self.base_layer
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        biased = self.lora_A[name].bias is not None or self.lora_B[name].bias is not None
        trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        mixed = not torch.is_autocast_enabled(x.device.type) and not (
            x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype
        )
        return None if name in self.lora_variant or drops or biased or trains or mixed else name


def use_fused(model: nn.Module, check: bool = True) -> int:
    """Exchange every module that has a faster forward with the same numbers; returns how many (`models.fused.fuse`)."""
    exchanged = len(fuse(model, check))
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLora
            exchanged += 1
    return exchanged


def use_stock(model: nn.Module) -> None:
    """Undo `use_fused`."""
    unfuse(model)
    for module in model.modules():
        if type(module) is FusedLora:
            module.__class__ = Linear


def is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, EXCHANGED) or type(module) is FusedLora for module in model.modules())


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Within, every module computes as transformers and peft wrote it, on padded rows: a row is a sample, and whatever
    is inside of a module can be watched."""
    classes, packs = {module: type(module) for module in model.modules()}, is_packing(model)
    use_stock(model)
    if packs:
        use_padding(model)
    try:
        yield
    finally:
        for module, kept in classes.items():
            module.__class__ = kept
        if packs:
            use_packed_attention(model)
