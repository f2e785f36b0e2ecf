"""Values that move with training, and lengths in any unit (DESIGN idea 4). Level 0.

Progress is a number in [0, 1]: steps done / steps in all.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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
        if match is None and _LENGTH.fullmatch(str(text).strip().removeprefix("-")):
            raise VlmtuneError(f"length {text!r} is below zero; write a number of steps from 0 up.")
        if match is None:
            raise VlmtuneError(f"length {text!r}: write a number of steps, or one with epochs, samples or %.")
        unit = match.group(2) or "steps"
        return cls(float(match.group(1)), unit if unit == "%" else unit.rstrip("s") + "s")

    @classmethod
    def parse_positive(cls, text: str | int | float) -> Length:
        """As `parse`, for what must not be nothing: a whole training, an interval."""
        length = cls.parse(text)
        if length.amount == 0:
            raise VlmtuneError(f"length {text!r} is nothing; it must be more than zero.")
        return length

    @classmethod
    def parse_whole(cls, text: str | int | float) -> Length:
        """As `parse_positive`, for the whole training, which is no share of anything."""
        length = cls.parse_positive(text)
        if length.unit == "%":
            raise VlmtuneError(f"length {text!r}: a share of what? write steps, samples or epochs.")
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


def learning_rates(value: Steps) -> Piecewise:
    """`piecewise` of learning rates: none below 0, one above it; 0 is frozen."""
    rates = piecewise(value)
    if min(rates.values) < 0 or max(rates.values) <= 0:
        raise VlmtuneError(f"learning rate {value}: none may be below 0, and one must be above it.")
    return rates


Shape = Callable[[int], float]
"""Optimizer step (0-based) -> factor on the peak learning rate."""


def cosine_with_warmup(step: int, total: int, warmup: int, floor: float) -> float:
    """Factor on the learning rate at `step` (0-based) (SPEC D1).

    Linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `floor` at the last step.
    """
    return _warmed_up(step, total, warmup, lambda x: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


def linear_with_warmup(step: int, total: int, warmup: int, floor: float) -> float:
    """As `cosine_with_warmup`, with a straight line down to `floor`."""
    return _warmed_up(step, total, warmup, lambda x: 1 - (1 - floor) * x)


def constant_with_warmup(step: int, warmup: int) -> float:
    """Linear from 1/warmup to 1, then 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def warmup_stable_decay(step: int, total: int, warmup: int, decay: int, floor: float) -> float:
    """Linear warmup, then 1, then a straight line to `floor` over the last `decay` steps (Hu et al. 2024, MiniCPM)."""
    if step < total - decay:
        return constant_with_warmup(step, warmup)
    return 1 - (1 - floor) * (step + 1 - (total - decay)) / decay


def _warmed_up(step: int, total: int, warmup: int, after: Callable[[float], float]) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return after(min(1.0, (step - warmup) / max(1, total - 1 - warmup)))


@dataclass(frozen=True)
class Stretch:
    """A part of a staged schedule: from learning rate `start` to `to` within `steps` steps."""

    start: float
    to: float
    steps: int
    shape: Literal["linear", "cosine"]


def staged(step: int, stretches: Sequence[Stretch], peak: float) -> float:
    """Factor on the peak at `step` of consecutive stretches (SPEC D2): 1e-6 -> 2e-4, constant, cosine to 1e-5.

    The first step of a stretch is one step beyond its start, its last step is at its end, so that a stretch from 1e-6
    over n steps makes n steps of equal size and none twice.
    """
    ends = list(itertools.accumulate(stretch.steps for stretch in stretches))
    number = min(bisect.bisect_right(ends, step), len(ends) - 1)  # behind the last one its end holds
    stretch = stretches[number]
    x = min(1.0, (step - ends[number] + stretch.steps + 1) / stretch.steps)
    x = 0.5 * (1 - math.cos(math.pi * x)) if stretch.shape == "cosine" else x
    return (stretch.start + (stretch.to - stretch.start) * x) / peak


@dataclass(frozen=True)
class Rate:
    """The learning rate of one rule, as a factor on its peak (SPEC D1-D3, F1).

    shape: of the whole run; over: progress -> factor on the peak, 0 where the rule is frozen; warmup: steps over which
    what starts to train after step 0 rises in a straight line.
    """

    shape: Shape
    over: Piecewise
    warmup: int
    total: int

    def is_active(self, step: int) -> bool:
        """Whether the rule trains at this step."""
        return self.over(step / self.total) > 0

    def factor(self, step: int) -> float:
        """On the peak learning rate, at this step; 0 where the rule is frozen."""
        factor = self.over(step / self.total)
        if factor == 0:
            return 0.0
        since = self._active_since(step)
        own = min(1.0, (step - since + 1) / self.warmup) if since and self.warmup else 1.0
        return self.shape(step) * factor * own

    def _active_since(self, step: int) -> int:
        """The first step of the time without a 0 that `step` lies in."""
        since = 0
        frozen = False
        for start, value in zip(self.over.starts, self.over.values, strict=True):
            first = first_reaching(start, self.total)
            if first > step:
                break
            if value > 0 and frozen:
                since = first
            frozen = value == 0
        return since

    @property
    def phases(self) -> list[int]:
        """Steps at which the rule starts or stops to train, step 0 included."""
        firsts = [first_reaching(start, self.total) for start in self.over.starts]
        states = [value > 0 for value in self.over.values]
        return [0] + [f for f, was, now in zip(firsts[1:], states, states[1:], strict=False) if was != now]


def first_reaching(start: float, total: int) -> int:
    """The smallest k with k / total >= start, in the arithmetic in which a step (or sample) asks for its values."""
    k = max(0, math.ceil(start * total) - 1)
    while k < total and k / total < start:
        k += 1
    return k
