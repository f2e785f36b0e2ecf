"""How much memory an optimizer step takes, item by item, from config.json and a plan (SPEC C9).

No formula per family: the model of the config is built without data, the plan is applied to it, and the real step
(VLM, objective, backward, clipping, optimizer) runs once in a `Ledger`, which counts. So autocast copies, tied heads,
checkpointing, adapters and chunks of logits are in the figure because they are in the code. Deep models are counted
with a few blocks and extended: every peak within a stretch of the step is linear in the number of blocks.

What the ledger cannot see is what libraries keep inside an operation (scratch of matrix products) and what the process
takes without a model; benchmarks/memory compares the prediction with measured peaks.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from vlmtune.adapt.counted_step import Rules, count_step
from vlmtune.adapt.prediction import Prediction, StepSettings, combined
from vlmtune.models.synthetic import BatchShape, depths, least_depths, synthetic_batch, with_depth
from vlmtune.models.vocabulary import NewTokens
from vlmtune.types import Batch


def predict(
    config: Any,
    rules: Rules,
    shape: BatchShape,
    settings: StepSettings = StepSettings(),  # noqa: B008  frozen
    whole: bool | None = None,
) -> Prediction:
    """The memory of one optimizer step. config: of transformers; whole: count every block (True), or a few and extend
    (False); None: whichever is less work.

    Raises VlmtuneError for what `apply_plan` and `synthetic_batch` refuse.
    """
    return predict_step(config, rules, synthetic_batch(config, shape), settings, whole=whole)


def predict_step(
    config: Any,
    rules: Rules,
    batch: Batch,
    settings: StepSettings = StepSettings(),  # noqa: B008  frozen
    new_tokens: NewTokens = NewTokens(),  # noqa: B008  frozen
    whole: bool | None = None,
) -> Prediction:
    """`predict` for a micro-batch that is there already, for example the first of a run.

    config: of the model with its new tokens (`model.config`); new_tokens: the same as for `apply_plan`. Further losses
    and read-outs are not counted. Rules with layers in them take the whole depth, which is slower.
    """
    if whole or any(".layers" in pattern for pattern, _ in rules):
        return count_step(config, rules, batch, settings, new_tokens)
    few, whole_depths = least_depths(config), depths(config)
    few = tuple(map(min, few, whole_depths))
    missing = [deep - shallow for deep, shallow in zip(whole_depths, few, strict=True)]
    counted = [(1 - sum(missing), few)]
    counted += [(missing[axis], tuple(n + (axis == k) for k, n in enumerate(few))) for axis in (0, 1) if missing[axis]]
    if whole is None and sum(whole_depths) <= sum(sum(blocks) for _, blocks in counted):
        return count_step(config, rules, batch, settings, new_tokens)
    return combined(
        [(c, count_step(with_depth(config, *blocks), rules, batch, settings, new_tokens)) for c, blocks in counted]
    )


class PeakMeter:
    """Measures what `Prediction` predicts: the most memory that this process had on a device at once.

    On a GPU it is what torch has allocated. On a CPU it is resident memory above what was resident without the model:
    make the meter before the model is loaded, or give `held`, the bytes that the model takes when `start` is called.
    """

    def __init__(self, device: torch.device, held: int | None = None):
        self.device, self.held = device, held
        self._before = _status("VmRSS") if device.type == "cpu" and _ACCOUNT.exists() else None

    def start(self) -> None:
        """Forget peaks so far (loading a model, or an evaluation, has its own)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._before is not None:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:  # glibc keeps what was freed; it would be used again and not be seen
                trim(0)
            try:
                _ACCOUNT.write_text("5")
            except OSError:  # a container may forbid it; a peak with loading in it would be another figure
                self._before = None
                return
            if self.held is not None:
                self._before = _status("VmRSS") - self.held

    def peak(self) -> int | None:
        """Bytes; None on a CPU whose system keeps no such account of a process (only Linux does)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self._before is None else _status("VmHWM") - self._before


_ACCOUNT = Path("/proc/self/clear_refs")
"""Writing 5 to it sets the kernel's peak of this process back."""


def _status(key: str) -> int:
    """Bytes under a key of the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
