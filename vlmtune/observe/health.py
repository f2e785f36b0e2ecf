"""Watches the pace of a run and tells the others what it finds: data, speed, memory, learning rates (SPEC H2)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib import util
from typing import Any

import psutil
import torch

from vlmtune.checks.pace import MemoryWatch, PaceWatch, RateWatch
from vlmtune.observer import Observer
from vlmtune.schedule import Rate
from vlmtune.types import Finding


class Health(Observer):
    """Judges every step beside those before; what it finds goes to `told`.

    rates: rule -> how its learning rate moves; optimizer: whose rates are compared with them; phases: steps at which
    other rules begin to train, so that steps may take another time.
    """

    def __init__(
        self,
        told: Sequence[Observer],
        optimizer: torch.optim.Optimizer,
        rates: Mapping[str, Rate],
        total_steps: int,
        phases: Collection[int],
        device: torch.device,
    ):
        self.told, self.optimizer, self.rates, self.total, self.phases = told, optimizer, rates, total_steps, phases
        self.peaks = [group["peak_lr"] for group in optimizer.param_groups]
        self.pace, self.rate = PaceWatch(), RateWatch()
        self.device = device
        self.memory = MemoryWatch("this process and its workers went")
        self.device_memory = MemoryWatch("what torch holds on the GPU went")
        self._counts_busy = device.type == "cuda" and util.find_spec("pynvml") is not None

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        step, left = state.step - 1, self.total - state.step  # counted from 0, as the plan does
        if step in self.phases:
            self.pace.begin()
        found = [self.memory.observe(resident_bytes(), psutil.virtual_memory().available, left)]
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            found.append(self.device_memory.observe(used_bytes(self.device), free, left))
        if "skipped" not in metrics:
            busy = torch.cuda.utilization(self.device) / 100 if self._counts_busy else None
            found += self.pace.observe(metrics["data_wait"], metrics["step_seconds"], metrics["tokens"], left, busy)
            found.append(self.rate.observe(*self._rates(step, state.lr_scale), left))
        for finding in found:
            if finding is not None:
                self._tell(state, finding)

    def _rates(self, step: int, scale: float) -> tuple[dict[str, float], dict[str, float]]:
        """Planned and used, by the rule and the first parameter of a group: LoRA+ has two groups in one rule."""
        planned, used = {}, {}
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            name = f"{group['rule']!r} ({group['names'][0]}, …)"
            planned[name] = scale * peak * self.rates[group["rule"]].factor(step)
            used[name] = group["lr"]
        return planned, used

    def _tell(self, state: Any, finding: Finding) -> None:
        for observer in self.told:
            observer.on_finding(state, finding)


def used_bytes(device: torch.device) -> int:
    """What torch has allocated on a GPU; on a CPU what is resident of this process and its data workers."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Of this process and its children. Pages that they share count in each."""
    process = psutil.Process()
    used = process.memory_info().rss
    for worker in process.children():
        try:
            used += worker.memory_info().rss
        except psutil.Error:  # it ended between the two lines
            continue
    return used
