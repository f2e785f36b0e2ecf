"""Values that move with training, and lengths in any unit (DESIGN idea 4). Level 0.

Progress is a number in [0, 1]: steps done / steps in all.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmtune.errors import VlmtuneError

Steps = float | Sequence[Sequence[float]]
"""A number, or [[from progress, value], …]: each value holds until the next boundary."""


@dataclass(frozen=True)
class Piecewise:
    """Progress -> value: `values[n]` holds from progress `starts[n]` to the next start."""

    starts: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, progress: float) -> float:
        return self.values[bisect.bisect_right(self.starts, progress) - 1]


def piecewise(value: Steps) -> Piecewise:
    """`[[0, 1], [0.3, 0.5]]` is 1 before 30% of training and 0.5 from there on; a number holds throughout."""
    points = [(0.0, value)] if isinstance(value, (int, float)) else value
    starts = tuple(float(start) for start, _ in points)
    values = tuple(float(v) for _, v in points)
    rises = all(low < high for low, high in zip(starts, starts[1:], strict=False))
    if not starts or starts[0] != 0 or not rises or starts[-1] > 1 or not all(map(math.isfinite, values)):
        raise VlmtuneError(
            f"schedule {value}: write [[0, value], [progress, value], …] with finite values and boundaries that start "
            "at 0, rise, and stay within 1."
        )
    return Piecewise(starts, values)


def combined(function: Callable[..., float], *schedules: Piecewise) -> Piecewise:
    """The schedule that is at every progress `function` of the values of these."""
    starts = sorted({start for schedule in schedules for start in schedule.starts})
    return Piecewise(tuple(starts), tuple(function(*(s(start) for s in schedules)) for start in starts))


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

    @classmethod
    def parse_positive(cls, text: str | int | float) -> Length:
        """As `parse`, for what must not be nothing: a whole training, an interval."""
        length = cls.parse(text)
        if length.amount == 0:
            raise VlmtuneError(f"length {text!r}: it must be more than zero.")
        return length

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
