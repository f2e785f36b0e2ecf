"""Values that move with training, and lengths in any unit (DESIGN idea 4). Level 0.

Progress is a number in [0, 1]: steps done / steps in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmtune.types import VlmtuneError

Steps = float | Sequence[Sequence[float]]
"""A number, or [[from progress, value], …]: each value holds until the next boundary."""


def piecewise(value: Steps) -> Callable[[float], float]:
    """Progress -> value. `[[0, 1], [0.3, 0.5]]` is 1 before 30% of training and 0.5 from there on."""
    if isinstance(value, (int, float)):
        return lambda progress: float(value)
    points = [(float(start), float(v)) for start, v in value]
    starts = [start for start, _ in points]
    if not points or starts[0] != 0 or starts != sorted(starts) or starts[-1] > 1:
        raise VlmtuneError(f"schedule {value}: boundaries must start at 0, rise, and stay within 1.")

    def at(progress: float) -> float:
        return next(v for start, v in reversed(points) if progress >= start)

    return at


_LENGTH = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(steps?|epochs?|samples?|%)?\s*")


@dataclass(frozen=True)
class Length:
    """A duration: "500", "500 steps", "3 epochs", "20000 samples" or "5%"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str | int | float) -> Length:
        match = _LENGTH.fullmatch(str(text))
        if match is None:
            raise VlmtuneError(f"length {text!r}: write a number of steps, or one with epochs, samples or %.")
        unit = match.group(2) or "steps"
        return cls(float(match.group(1)), unit if unit == "%" else unit.rstrip("s") + "s")

    def steps(self, samples_per_step: int, samples_per_epoch: int | None, total: int | None = None) -> int:
        """Whole optimizer steps, rounded up. Raises VlmtuneError where the unit has no meaning here."""
        if self.unit == "steps":
            return math.ceil(self.amount)
        if self.unit == "samples":
            return math.ceil(self.amount / samples_per_step)
        if self.unit == "%":
            if total is None:
                raise VlmtuneError(f"length {self.amount:g}%: a share needs a total; write steps, samples or epochs.")
            return math.ceil(total * self.amount / 100)
        if samples_per_epoch is None:
            raise VlmtuneError(f"length {self.amount:g} epochs: a source without end has no epochs; write steps.")
        return math.ceil(self.amount * samples_per_epoch / samples_per_step)


def cosine_with_warmup(step: int, total: int, warmup: int, floor: float) -> float:
    """Factor on the learning rate at `step` (0-based) (SPEC D1).

    Linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `floor` at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
