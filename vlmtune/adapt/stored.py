"""Quantised base weights as far as memory goes: stand-ins without data.

The figures are those of bitsandbytes: NF4 keeps half a byte per weight and one float32 scale per 64 weights; double
quantisation keeps 8 bits per scale and one float32 per 256 of them. int8 keeps a byte per weight and a float32 per row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmtune.models.quantise import QUANTISED

BLOCK = 64  # weights per scale
BLOCK_OF_SCALES = 256  # scales per float32, with double quantisation
CODE_BYTES = 16 * 4  # of every matrix: the sixteen values of NF4, float32
DOUBLE_CODE_BYTES = 256 * 4 + 4  # of every matrix: the values that 8 bits stand for, and the mean of the scales


def constant_bytes(weights: int, double: bool) -> int:
    """Bytes of everything but the codes of an NF4 matrix of so many weights."""
    scales = -(-weights // BLOCK)
    if not double:
        return 4 * scales + CODE_BYTES
    return scales + 4 * -(-scales // BLOCK_OF_SCALES) + CODE_BYTES + DOUBLE_CODE_BYTES


class _Nf4Product(torch.autograd.Function):
    """x W^T with W dequantised for the product and again for its derivative, as `bitsandbytes.MatMul4Bit` does."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(packed)
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream @ upstream.new_empty(ctx.shape), None, None, None


class _Int8Product(torch.autograd.Function):
    """x W^T in int8: x in half precision and in int8 for a moment, x itself kept, as bitsandbytes does."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(packed, x)
        half = x.to(torch.float16)
        codes = half.to(torch.float8_e5m2)  # a byte each, like int8
        out = x.new_empty(*x.shape[:-1], shape[0])
        del half, codes
        return out if bias is None else out.add_(bias.to(out.dtype))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        weight = upstream.new_empty(ctx.shape, dtype=torch.float16).to(upstream.dtype)
        return upstream @ weight, None, None, None


class StoredLinear(nn.Module):
    """A frozen `nn.Linear` whose weight is kept in NF4 or int8. Same shapes in and out, dtype of x kept."""

    def __init__(self, linear: nn.Linear, store: str, double: bool, compute: torch.dtype, is_adapted: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.store, self.compute, self.is_adapted = store, compute, is_adapted
        weights = linear.weight.numel()
        packed = weights // 2 if store == "nf4" else weights
        constants = constant_bytes(weights, double) if store == "nf4" else 4 * self.out_features
        self.weight = _bytes(packed)
        self.constants = _bytes(constants)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """float[…, in_features] -> float[…, out_features]"""
        shape = (self.out_features, self.in_features)
        with torch.autocast(x.device.type, enabled=False):
            if self.store == "int8":
                return _Int8Product.apply(x, self.weight, shape, self.bias)
            bias = None if self.bias is None else self.bias.to(self.compute)
            out = _Nf4Product.apply(x.to(self.compute), self.weight, shape, bias).to(x.dtype)
        return out.clone() if self.is_adapted else out  # peft's LoRA on NF4 copies the product before it adds to it


def _bytes(count: int) -> nn.Parameter:
    """A frozen parameter of so many bytes. A one-byte float, because integers have data in a ledger."""
    return nn.Parameter(torch.empty(count, dtype=torch.float8_e5m2), requires_grad=False)


def quantise_base_weights(model: nn.Module, store: Mapping[int, str], double: bool, compute: torch.dtype) -> None:
    """Put stand-ins in place of the frozen linear modules that are to be kept in nf4 or int8.

    store: id of a parameter -> its number format; compute: the dtype in which quantised matrices are multiplied.
    """
    for name, module in list(model.named_modules()):
        is_frozen = type(module) is nn.Linear and not module.weight.requires_grad
        if is_frozen and store.get(id(module.weight)) in QUANTISED:
            model.set_submodule(
                name, StoredLinear(module, store[id(module.weight)], double, compute, ".base_layer" in name)
            )
