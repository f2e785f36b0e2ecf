"""The same arithmetic in fewer passes over memory: norms, gated feed-forward parts and patch embeddings of the model.

A module keeps its parameters and its hooks; its class becomes a subclass of its own with another forward. It is only
exchanged after both gave the same numbers on random input, so that a family with another formula keeps its own.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlmtune.models.vlm import evaluating
from vlmtune.shards import gathered

SAME = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative to the largest value: a few roundings of each format (epsilon 6e-8, 1e-16, 4e-3, 5e-4)."""


class _Normalised(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019), in three passes forward and
    four backward. x float[…, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (upstream * x).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_x = upstream * weight
        along = (d_x * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return d_x.mul_(scale).addcmul_(x, along), d_weight, None


class _Gated(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020); silu is computed again in the backward instead of being kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return d_gate, F.silu(gate).mul_(upstream)


class FusedNorm:
    """Mixed into an RMSNorm with `weight` and `variance_epsilon`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = hidden_states.dtype
        if kept in (torch.float32, torch.float64) and self.weight.dtype == kept:
            return _Normalised.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class FusedGate:
    """Mixed into a feed-forward part with `gate_proj`, `up_proj`, `down_proj` and `act_fn` (SiLU)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(_Gated.apply(gate, up))


class FusedPatches:
    """Mixed into a patch embedding whose convolution `proj` neither overlaps nor pads: it is one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


EXCHANGED = (FusedNorm, FusedGate, FusedPatches)


@cache
def _subclass(mixin: type, original: type) -> type:
    return type(f"Fused{original.__name__}", (mixin, original), {})


def fuse(model: nn.Module, check: bool = True) -> list[str]:
    """Exchange what can be; returns the names of the modules. `unfuse` undoes it.

    check: compare each first; False where weights have no values.
    """
    exchanged = []
    for name, module in model.named_modules():
        mixin = _mixin_for(module)
        if mixin is None or isinstance(module, mixin):
            continue
        with gathered(model, name):
            is_same = not check or _is_same(module, mixin)
        if is_same:
            module.__class__ = _subclass(mixin, type(module))
            exchanged.append(name)
    return exchanged


def unfuse(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, EXCHANGED):
            module.__class__ = type(module).__mro__[2]


def _mixin_for(module: nn.Module) -> type | None:
    """By what the module is made of."""
    children = {name for name, _ in module.named_children()}
    if hasattr(module, "variance_epsilon") and not children and set(dict(module.named_parameters())) == {"weight"}:
        return FusedNorm
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == children and isinstance(module.act_fn, _SILU):
        return FusedGate
    if children == {"proj"} and isinstance(module.proj, (nn.Conv2d, nn.Conv3d)) and hasattr(module, "embed_dim"):
        return FusedPatches if _is_product(module.proj) else None
    return None


_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def _is_product(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    return (
        convolution.kernel_size == convolution.stride
        and convolution.groups == 1
        and not any(convolution.padding)
        and set(convolution.dilation) == {1}
    )


@torch.no_grad()
def _is_same(module: nn.Module, mixin: type) -> bool:
    """Whether the exchanged forward gives the module's own numbers on eight random rows."""
    if mixin is FusedGate:  # its linear modules are its own either way
        first = module.gate_proj
        width, weight = getattr(first, "in_features", None), next(first.parameters())
    elif mixin is FusedPatches:
        width, weight = module.proj.weight[0].numel(), module.proj.weight
    else:
        width, weight = module.weight.numel(), module.weight
    if width is None or not weight.dtype.is_floating_point:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, width, generator=generator).to(weight.device, weight.dtype)
    formats = {parameter.dtype for parameter in module.parameters()}
    original = type(module)
    # adapters in float32 over a base in bfloat16 are only ever multiplied under autocast
    with evaluating(module), torch.autocast(weight.device.type, torch.bfloat16, enabled=len(formats) > 1):
        own = module(rows)
        module.__class__ = _subclass(mixin, original)
        theirs = module(rows)
        module.__class__ = original
    return own.shape == theirs.shape and bool((own - theirs).abs().max() <= SAME[own.dtype] * own.abs().max())
