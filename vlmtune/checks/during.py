"""What is watched while a run goes on: gradients of every parameter, losses, the loss scale (SPEC D5, D8, H2).

Judgements over histories; none of them changes anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmtune.optim.statistics import Row
from vlmtune.types import Finding

Rows = Mapping[str, Row]
Norms = Mapping[str, float]  # of the gradient of every parameter

EXPLOSION = 10.0  # times its own median, twice in a row; clipping hides it from the update, not from the norm
BURST = 100.0  # times its own median, at once: single batches of 2 samples reach 40 in runs that learn well
REMEMBERED = 10  # measurements that a new one is compared with
MEASUREMENTS = 3  # before a median means something, and in a row before a parameter is called dead
VANISHING = 1e-6  # of the median over all matrices: float32 has 1e-7 of relative precision left
LARGE_UPDATE, SMALL_UPDATE = 0.1, 1e-7  # of the weights; about 1e-3 is healthy, below float32's 6e-8 nothing changes
STILL_SMALL = 0.01  # root mean square of weights that have hardly left 0 (LoRA's B, biases): any update is large then


class Watch:
    """What remembers between steps. Its state, all of its attributes, is part of a checkpoint."""

    def state(self) -> dict[str, Any]:
        """JSON values, from which `restore` continues exactly."""
        return dict(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class GradientWatch(Watch):
    """Judges every measurement beside the ones before."""

    def __init__(self) -> None:
        self._earlier: list[dict[str, float]] = []

    def observe(self, rows: Rows) -> list[Finding]:
        findings = judge_statistics(rows, self._earlier)
        norms = {name: row.norm for name, row in rows.items() if row.is_matrix}
        self._earlier = [*self._earlier, norms][-REMEMBERED:]
        return findings


def judge_statistics(rows: Rows, earlier: Sequence[Norms]) -> list[Finding]:
    """rows: of this step; earlier: of the measurements before, oldest first. At most one finding of each kind.

    Only matrices are judged: gradients of some biases are 0 by construction (attention keys).
    """
    matrices = {name: row for name, row in rows.items() if row.is_matrix}
    if not matrices:
        return []
    found = [
        _exploding(matrices, earlier), _vanishing(matrices), _dead(matrices, earlier),
        _updates(matrices, "large", lambda ratio: ratio > LARGE_UPDATE, max, "lower the learning rate of its rule"),
        _updates(
            matrices, "small", lambda ratio: 0 < ratio < SMALL_UPDATE, min,
            "raise the learning rate of its rule, or freeze it",
        ),
    ]  # fmt: skip
    return [finding for finding in found if finding is not None]


def _exploding(rows: Rows, earlier: Sequence[Norms]) -> Finding | None:
    ratios, bad = {}, []
    for name, row in rows.items():
        before = [past[name] for past in earlier if past.get(name, 0.0) > 0]
        if len(before) >= MEASUREMENTS:
            median = statistics.median(before)
            ratios[name] = row.norm / median
            if ratios[name] > BURST or min(row.norm, before[-1]) > EXPLOSION * median:
                bad.append(name)
    if not bad:
        return None
    worst = max(bad, key=ratios.__getitem__)
    return Finding(
        "warn", "gradients explode",
        f"{_counted(bad, rows)}, worst {worst}: norm {rows[worst].norm:.3g}, {ratios[worst]:.0f} x its median so far",
        "lower the learning rate, lengthen the warmup, or lower clip",
    )  # fmt: skip


def _vanishing(rows: Rows) -> Finding | None:
    # root mean squares: the deviation alone is 0 for a single number, and where all are alike
    sizes = {name: math.hypot(row.mean, row.std) for name, row in rows.items() if row.norm > 0}
    if not sizes:
        return None
    median = statistics.median(sizes.values())
    bad = [name for name, size in sizes.items() if size < VANISHING * median]
    if not bad:
        return None
    worst = min(bad, key=sizes.__getitem__)
    return Finding(
        "warn", "gradients vanish",
        f"{_counted(bad, rows)}, worst {worst}: root mean square {sizes[worst]:.1e} where the median is {median:.1e}",
        "freeze them, or give them another start: what is in front of them passes nothing on",
    )  # fmt: skip


def _dead(rows: Rows, earlier: Sequence[Norms]) -> Finding | None:
    recent = earlier[-(MEASUREMENTS - 1) :]
    if len(recent) < MEASUREMENTS - 1:
        return None
    bad = [
        name for name, row in rows.items()
        if row.norm == 0 and all(past.get(name) == 0 for past in recent)
    ]  # fmt: skip
    if not bad:
        return None
    return Finding(
        "warn", "parameters are dead",
        f"{_counted(bad, rows)}, first {bad[0]}: no gradient at all in {MEASUREMENTS} measurements in a row",
        "freeze them, or check that the data reaches that part",
    )  # fmt: skip


def _updates(
    rows: Rows, size: str, is_bad: Callable[[float], bool], worst_of: Callable[..., str], remedy: str
) -> Finding | None:
    ratios = {name: row.update / row.weight for name, row in rows.items() if row.weight > STILL_SMALL}
    bad = [name for name, ratio in ratios.items() if is_bad(ratio)]
    if not bad:
        return None
    worst = worst_of(bad, key=ratios.__getitem__)
    return Finding(
        "warn", f"updates are {size} for their weights",
        f"{_counted(bad, rows)}, worst {worst}: update / weight {ratios[worst]:.1e}, about 1e-3 is usual", remedy,
    )  # fmt: skip


def _counted(bad: Sequence[str], rows: Rows) -> str:
    return f"{len(bad)} of {len(rows)} matrices"


# ---- the loss ----------------------------------------------------------------------------------------------------

FIRST = 10  # steps before the running mean means something
FAST, SLOW = 0.9, 0.97  # decay of the running mean and deviation, and of the mean that shows a trend
DEVIATIONS, JUMP = 8.0, 1.5  # a spike is that many deviations above the mean, and so many times the mean
CLIMB, CLIMBED = 1.5, 0.5  # a divergence: times the lowest mean, at least so much above it, and more than noise:
NOISE = 1.5  # mean deviations; batches of one task each differ five times in their losses
PAUSE = 10  # steps after a finding in which nothing is said


class LossWatch(Watch):
    """Sees when the loss of a step jumps, and when its mean climbs.

    A jump enters the mean only up to the limit that it broke, so that a second one is seen too.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._mean = self._deviation = self._trend = self._lowest = 0.0
        self._pause = 0

    def observe(self, loss: float) -> Finding | None:
        """loss: of the next step, a finite number."""
        self._steps += 1
        if self._steps == 1:
            self._mean = self._trend = self._lowest = loss
            return None
        limit = max(self._mean + DEVIATIONS * self._deviation, JUMP * self._mean)
        mean, trend, lowest = self._mean, self._trend, self._lowest
        jumped = self._steps > FIRST and loss > limit
        seen = min(loss, limit) if self._steps > FIRST else loss
        # as a plain average first, so that the first losses do not weigh more than later ones
        fast, slow = min(FAST, 1 - 1 / self._steps), min(SLOW, 1 - 1 / self._steps)
        self._deviation = fast * self._deviation + (1 - fast) * abs(seen - self._mean)
        self._mean = fast * self._mean + (1 - fast) * seen
        self._trend = slow * self._trend + (1 - slow) * seen
        above = max(CLIMB * lowest, lowest + CLIMBED, lowest + NOISE * self._deviation)
        climbed = self._steps > 2 * FIRST and trend > above
        self._lowest = min(self._lowest, self._trend) if self._steps > FIRST else self._trend
        if self._pause:
            self._pause -= 1
            return None
        if not jumped and not climbed:
            return None
        self._pause = PAUSE
        if jumped:
            return Finding(
                "warn", "the loss jumps", f"{loss:.3g} where the running mean was {mean:.3g}",
                "look at the batch of this step; if it repeats, lower the learning rate",
            )  # fmt: skip
        self._lowest = self._trend  # said once for every further climb
        return Finding(
            "warn", "the loss climbs", f"its running mean is {trend:.3g}, the lowest was {lowest:.3g}",
            "lower the learning rate, or lengthen the warmup",
        )  # fmt: skip


WORSE, WORSE_BY = 1.5, 0.5  # times the mean loss of the stored samples before training, and at least so much above it


class StartWatch(Watch):
    """Sees when the samples that a checkpoint stores do worse than before the first step: what a learning rate that is
    too high does to a model at once.

    The losses of the first steps cannot tell: each is of other samples, and those of tasks lie far apart. These are of
    the same samples, without dropout.
    """

    def __init__(self) -> None:
        self._before: float | None = None
        self._said = False

    @property
    def has_begun(self) -> bool:
        return self._before is not None

    @property
    def is_telling(self) -> bool:
        """Whether the samples had finite losses before the first step; else they say nothing about the weights."""
        return self._before is not None and math.isfinite(self._before)

    def begin(self, losses: Sequence[float]) -> None:
        """losses: of the stored samples, before the first step."""
        self._before = statistics.fmean(losses)

    def observe(self, losses: Sequence[float]) -> Finding | None:
        """losses: of the same samples, now. Says it once, and again after they were better in between."""
        if not self.is_telling:
            return None
        now = statistics.fmean(losses)
        worse = not now <= max(WORSE * self._before, self._before + WORSE_BY)  # NaN is worse
        said, self._said = self._said, worse
        if said or not worse:
            return None
        return Finding(
            "warn", "the model is worse than before training",
            f"the stored samples have a mean loss of {now:.3g}, before the first step it was {self._before:.3g}",
            "lower the learning rate, or lengthen the warmup",
        )  # fmt: skip


# ---- the loss scale ----------------------------------------------------------------------------------------------

OVERFLOWS, WINDOW = 5, 20  # so many overflows within so many steps


def judge_overflow(scales: Sequence[float]) -> list[Finding]:
    """scales: of the steps so far, oldest first, the last one after the overflow of this step. Said at every fifth
    overflow while they are frequent, and once when the scale falls below 1."""
    recent = scales[-WINDOW:]
    falls, in_all = (
        sum(after < before for before, after in zip(some, some[1:], strict=False)) for some in (recent, scales)
    )
    if len(scales) > 1 and scales[-1] < 1 <= scales[-2]:
        return [
            Finding(
                "fail", "float16 overflows at every scale", f"the loss scale fell to {scales[-1]:g}",
                "set train.precision to bf16 or fp32, or compute: fp32 on the rule of the part that overflows",
            )
        ]  # fmt: skip
    if falls >= OVERFLOWS and in_all % OVERFLOWS == 0:
        return [
            Finding(
                "warn", "float16 overflows often", f"{falls} of the last {len(recent)} steps made no update",
                "if it goes on, set train.precision to bf16, or compute: fp32 on the rule of the part that overflows",
            )
        ]  # fmt: skip
    return []
