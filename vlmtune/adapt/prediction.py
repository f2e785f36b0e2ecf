"""What is said of the memory of a step: items, peaks, and how predictions are added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vlmtune.adapt.ledger import Peak
from vlmtune.optim.optimizer import OptimizerName

FIRST_UPDATE, LATER_UPDATE = "first update", "update"
"""Places: the update that makes the optimizer's state, and any later one, which has all of it from the beginning."""
LIBRARIES = {"cpu": 27 * 2**20, "cuda": 0}
"""Bytes that stay with the libraries once a step has run (kernels made for its shapes, blocks too small to return).
CPU: what benchmarks/memory measured above the ledger's figure, 5 to 32 MiB, in most configurations 24 to 31.
GPU: what torch.cuda.max_memory_allocated reports has none of it; context and fragmentation come on top."""


@dataclass(frozen=True)
class StepSettings:
    """How a step runs, and where. gradient_checkpointing: of which parts (True: all); micro_batches: of one optimizer
    step; double: double quantisation of NF4 scales; packing: whether padding is taken out (`models.packing`); fused:
    whether modules are exchanged (`adapt.fused`)."""

    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool | Sequence[str] = False
    optimizer: OptimizerName = "adamw"
    double: bool = True
    micro_batches: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    packing: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Prediction:
    """Bytes of one optimizer step on one device.

    peaks: stretch of the first step -> its peak; state: of the optimizer, on the device; host: of a paged optimizer,
    in the memory of the host; gradients: of all trained parameters; saved: what the forward keeps for the backward, by
    part; stored: weights by number format; parameters, trained: how many numbers; tokens, image_tokens: of the batch.
    """

    peaks: dict[str, Peak]
    state: int
    host: int
    gradients: int
    saved: dict[str, int]
    stored: dict[str, int]
    parameters: int
    trained: int
    tokens: int
    image_tokens: int
    settings: StepSettings = field(default_factory=StepSettings)

    @property
    def first_step(self) -> int:
        """Most bytes alive at once in the first step, before which the optimizer has no state."""
        peaks = self._peaks(steady=False).items()
        return max(peak.total for place, peak in peaks if not place.startswith(LATER_UPDATE))

    @property
    def total(self) -> int:
        """Most bytes alive at once in any later step."""
        return self.peak[1].total

    @property
    def peak(self) -> tuple[str, Peak]:
        """The stretch in which most is alive, and what it is."""
        return max(self._peaks(steady=True).items(), key=lambda pair: pair[1].total)

    def _peaks(self, steady: bool) -> dict[str, Peak]:
        """With what earlier steps and micro-batches leave behind: the optimizer's state, and gradients."""
        found = {}
        for place, peak in self.peaks.items():
            items = Counter(peak.items)
            items["libraries"] = LIBRARIES[self.settings.device]
            if not place.startswith((FIRST_UPDATE, LATER_UPDATE)):
                if steady:
                    items["optimizer"] += self.state
                if self.settings.micro_batches > 1:
                    items["gradients"] = self.gradients
            found[place] = Peak(sum(items.values()), dict(items))
        return found

    @property
    def activations(self) -> int:
        return sum(self.saved.values())

    @property
    def image_share(self) -> float:
        """Share of image tokens in all tokens of the batch."""
        return self.image_tokens / self.tokens


_NUMBERS = ("state", "host", "gradients", "parameters", "trained", "tokens", "image_tokens")


def combined(terms: Sequence[tuple[int, Prediction]]) -> Prediction:
    """The sum of coefficient x prediction, number by number."""

    def sums(numbers: Sequence[dict[str, int]]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for (coefficient, _), part in zip(terms, numbers, strict=True):
            for name, value in part.items():
                total[name] += coefficient * value
        return dict(total)

    every = [prediction for _, prediction in terms]
    places = [place for place in every[0].peaks if all(place in p.peaks for p in every)]
    items = {place: sums([p.peaks[place].items for p in every]) for place in places}
    plain = sums([{name: getattr(p, name) for name in _NUMBERS}
                  for p in every])  # fmt: skip
    return replace(
        every[0],
        peaks={place: Peak(sum(found.values()), found) for place, found in items.items()},
        saved=sums([p.saved for p in every]),
        stored=sums([p.stored for p in every]),
        **plain,
    )
