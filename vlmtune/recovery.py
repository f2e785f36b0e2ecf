"""What a step that is not finite leaves behind, and what is done about it (SPEC F5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmtune.checkpoint import rng_state
from vlmtune.types import Batch


@dataclass(frozen=True)
class Recovery:
    """nonfinite: policy for a loss or gradient that is not finite; spikes: for a loss that jumps or climbs; limit: how
    many batches may be left out in all; lr_factor: on every learning rate, at each rewind."""

    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    spikes: Literal["warn", "rewind"] = "warn"
    limit: int = 10
    lr_factor: float = 0.5

    @property
    def rewinds(self) -> bool:
        return "rewind" in (self.nonfinite, self.spikes)


class NonFinite(Exception):
    """A step whose loss or gradients are NaN or infinite, or that has ids beyond the vocabulary; nothing was updated.

    what: what was seen; ranks: of the processes whose losses are not finite (none: only gradients are not). step:
    0-based; micro_batches: of the step, those of this process; sample_ids: of the processes in `ranks`, or of all;
    cause: what an investigation found.
    """

    remedy = "Lower optim.lr, or set stability.nonfinite to skip or rewind; `vlmtune doctor` looks at the batch again."

    def __init__(self, what: str, ranks: Sequence[int] = ()):
        super().__init__(what)
        self.what, self.ranks, self.cause = what, list(ranks), ""
        self.step = 0
        self.micro_batches: list[Batch] = []
        self.sample_ids: list[str] = []

    def __str__(self) -> str:
        ids = self.sample_ids
        shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
        return f"step {self.step + 1}: not finite: {self.what}; nothing was updated. Samples of this step: {shown}." + (
            f" {self.cause}" if self.cause else ""
        )


@dataclass(frozen=True)
class Snapshot:
    """What a forward changes besides gradients: statistics of BatchNorm and the random numbers that dropout draws."""

    buffers: dict[str, tuple[Tensor, Tensor]]
    host_rng: Tensor
    device_rng: Tensor | None

    @classmethod
    def of(cls, buffers: dict[str, Tensor]) -> Snapshot:
        # of this process's GPU alone: asking the others would take memory there
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        held = {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}
        return cls(held, torch.get_rng_state(), device)

    def restore_buffers(self) -> None:
        for buffer, before in self.buffers.values():
            buffer.copy_(before)

    def restore_rng(self) -> None:
        torch.set_rng_state(self.host_rng)
        if self.device_rng is not None:
            torch.cuda.set_rng_state(self.device_rng)

    def rng_state(self) -> dict[str, Any]:
        """All generators, torch's as they were before the step; nothing else draws inside one."""
        now = Snapshot.of({})
        self.restore_rng()
        described = rng_state()
        now.restore_rng()
        return described
