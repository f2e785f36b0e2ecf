"""Which number format a run computes in (SPEC F3)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware here. On CPUs without it they are emulated and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(wish: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    return wish if wish != "auto" else "bf16" if bf16_is_fast(device) else "fp32"


def autocast(precision: Literal["bf16", "fp32"], device: torch.device) -> contextlib.AbstractContextManager:
    """bf16: weights stay float32, products run in bfloat16. fp32: nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
