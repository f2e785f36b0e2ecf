"""The rule that turns the complexity of an image into the share of its pixels or tokens that it gets (SPEC F6).

It is set on the image processor, as limits of pixels are (`resolution`), and saved with it. Imports nothing heavy: the
config checks its values with it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vlmtune.errors import VlmtuneError

Measure = Literal["edges", "entropy", "text", "detail", "largest"]  # of `complexity`
STEPS = 8  # shares are eighths: few limits, each with its own copy of the image processor
MERGED = 1 / 4  # of its tokens an image has whose squares of 2 x 2 are averaged
ATTRIBUTE = "vlmtune_complexity"  # of an image processor


@dataclass(frozen=True)
class ComplexityRule:
    """The share of its own pixels an image gets: `least` up to complexity `simple`, all from `complex` on, linear
    between, rounded up to eighths.

    VlmtuneError: 0 < least < 1 and 0 <= simple < complex <= 1 do not hold, or there is no such measure.
    """

    measure: Measure
    least: float
    simple: float
    complex: float

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise VlmtuneError(
                f"data.complexity: there is no measure {self.measure!r}; it is one of {', '.join(get_args(Measure))}."
            )
        if not 0 < self.least < 1:
            raise VlmtuneError(f"data.complexity: least {self.least:g} is no share between 0 and 1; 0.25 is usual.")
        if not 0 <= self.simple < self.complex <= 1:
            raise VlmtuneError(
                f"data.complexity: simple {self.simple:g} and complex {self.complex:g} are not in order between 0 and "
                "1; an image up to simple gets the least, one from complex on everything."
            )

    def share(self, value: float) -> float:
        """Of an image of this complexity: a multiple of 1 / STEPS, at most 1."""
        way = min(max((value - self.simple) / (self.complex - self.simple), 0.0), 1.0)
        exact = self.least + (1 - self.least) * way
        return min(1.0, math.ceil(exact * STEPS - 1e-9) / STEPS)  # what is an eighth but for rounding stays one


def rule_of(image_processor: Any) -> ComplexityRule | None:
    """The rule that is set on an image processor. VlmtuneError: its folder holds one that cannot be read."""
    found = getattr(image_processor, ATTRIBUTE, None)
    if found is None:
        return None
    try:
        return ComplexityRule(**found)
    except TypeError as error:
        raise VlmtuneError(
            f"the image processor's {ATTRIBUTE!r} {found} is not of this version of vlmtune ({error}); write measure, "
            "least, simple and complex there, or remove it."
        ) from error


def set_rule(image_processor: Any, rule: ComplexityRule | None) -> None:
    """Set it in place, as plain values that `save_pretrained` writes; None: take it away."""
    if rule is not None:
        setattr(image_processor, ATTRIBUTE, asdict(rule))
    elif hasattr(image_processor, ATTRIBUTE):
        delattr(image_processor, ATTRIBUTE)
