"""Quantised base weights: NF4 and int8 through bitsandbytes, on exactly the modules that were asked for (SPEC C3).

One door: what is quantised is decided before loading, asserted after it, and guarded against a trap of bitsandbytes on
CPUs (see `guard_gradients`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BitsAndBytesConfig

from vlmtune.shards import own_rows
from vlmtune.types import VlmtuneError

Storage = Literal["fp32", "bf16", "nf4", "int8"]
QUANTISED: tuple[Storage, ...] = ("nf4", "int8")
_PARAMETERS = {"Params4bit": "nf4", "Int8Params": "int8"}  # by name: the library is imported only where it is used


@dataclass(frozen=True)
class Quantisation:
    """Which linear modules (full paths) are kept in which format.

    double: quantise the constants of NF4 too (Dettmers et al. 2023), 0.127 instead of 0.5 bit per weight. compute: the
    format of products.
    """

    storage: Literal["nf4", "int8"]
    modules: tuple[str, ...]
    double: bool = True
    compute: torch.dtype = torch.bfloat16


def stored_as(parameter: torch.Tensor) -> Storage | str:
    """The format of a weight: one of `Storage`, or the name of another dtype."""
    formats = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return _PARAMETERS.get(type(parameter).__name__) or formats.get(parameter.dtype, str(parameter.dtype))


def has_data(parameter: torch.Tensor) -> bool:
    """False on the meta device and for fake tensors, which have a shape and nothing in it."""
    return not parameter.is_meta and not isinstance(parameter, FakeTensor)


def is_quantised(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ in _PARAMETERS


def quantisation_config(wish: Quantisation, linear_modules: Sequence[str]) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to quantise `wish.modules` and nothing else of `linear_modules`.

    Raises VlmtuneError where bitsandbytes is not installed.
    """
    require_bitsandbytes(f"store: {wish.storage}")
    others = [path for path in linear_modules if path not in set(wish.modules)]
    if wish.storage == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_something_new)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=wish.double,
        bnb_4bit_compute_dtype=wish.compute,
        llm_int8_skip_modules=others,
    )


def _says_something_new(record: logging.LogRecord) -> bool:
    """Products of int8 weights run in float16, which bitsandbytes says at every single one."""
    return "inputs will be cast" not in str(record.msg)


def require_bitsandbytes(what: str) -> None:
    try:
        metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError as error:
        raise VlmtuneError(
            f'{what} needs bitsandbytes, which is not installed: pip install "vlmtune[qlora]".'
        ) from error


def guard_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There the first forward without gradient (an evaluation) repacks the weight in place, and training forwards after it
    take a kernel that has no backward: gradients are silently wrong from then on (measured cosine 0.02 to the true
    ones, bitsandbytes 0.50).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def require_quantised(model: nn.Module, wish: Quantisation) -> None:
    """Raises VlmtuneError unless exactly the modules of `wish` are quantised, in its format."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    }
    odd = sorted(set(found) ^ set(wish.modules))
    if odd:
        verb = "was quantised, but should not be" if odd[0] in found else "should be quantised, but is not"
        raise VlmtuneError(f"quantisation: {odd[0]} {verb} ({len(odd)} modules differ); use bitsandbytes 0.50.")
    for path, module in found.items():
        weight = module.weight
        if stored_as(weight) != wish.storage:
            raise VlmtuneError(f"quantisation: {path} is stored as {stored_as(weight)}, not {wish.storage}.")
        if wish.storage == "nf4":
            state = weight.quant_state
            if state.quant_type != "nf4" or state.nested != wish.double or module.compute_dtype != wish.compute:
                raise VlmtuneError(
                    f"quantisation: {path} is {state.quant_type}, double {state.nested}, compute "
                    f"{module.compute_dtype}; asked for nf4, double {wish.double}, compute {wish.compute}."
                )


def as_plain_model(model: nn.Module) -> None:
    """Forget that a quantiser loaded this model, so that its other parts can be moved and saved."""
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model in place. What is quantised was put on its device when it was loaded, and stays there."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not is_quantised(parameter):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def stored_bytes(module: nn.Module) -> tuple[int, int]:
    """(bytes of the weights, bytes of quantisation constants) of a module and all below it."""
    weights = constants = 0
    for parameter in module.parameters():
        weights += own_rows(parameter).numel() * parameter.element_size()
        if stored_as(parameter) == "nf4":
            state = parameter.quant_state
            constants += _bytes(state.absmax)
            if state.nested:
                constants += _bytes(state.state2.absmax) + _bytes(state.offset)
        elif stored_as(parameter) == "int8" and parameter.SCB is not None:
            constants += _bytes(parameter.SCB)
    return weights, constants


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
