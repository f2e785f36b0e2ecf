"""Which number format a run computes in, and the loss scale that float16 needs (SPEC F3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vlmtune.shards import own_rows

Precision = Literal["bf16", "fp16", "fp32"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# relative; the same machine gives the same bits, another number of threads or another device another order of sums
SAME_LOSS: dict[str, float] = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
"""By how much the loss of a sample may differ where the same weights compute it again."""


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware here. On CPUs without it they are emulated and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(wish: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> Precision:
    return wish if wish != "auto" else "bf16" if bf16_is_fast(device) else "fp32"


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16, fp16: weights stay float32, products run in the short format. fp32: nothing changes."""
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


@dataclass
class LossScale:
    """What the loss is multiplied with before the backward, so that small float16 gradients do not vanish.

    Dynamic, as `torch.amp.GradScaler`: halved after a step whose gradients overflow (that step makes no update),
    doubled after `interval` steps in a row without one (Micikevicius et al. 2018).
    """

    value: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    good_steps: int = 0

    @classmethod
    def of(cls, precision: Precision) -> LossScale | None:
        """None where the format has the range of float32."""
        return cls() if precision == "fp16" else None

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place; what overflowed stays infinite."""
        grads = [own_rows(p.grad) for p in parameters if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, 1.0 / self.value)

    def update(self, overflow: bool) -> None:
        """After a step."""
        if overflow:
            self.value, self.good_steps = self.value * self.backoff, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.value, self.good_steps = self.value * self.growth, 0
