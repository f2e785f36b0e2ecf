"""Whether a run keeps its pace: data in time, speed, memory, the device at work, learning rates (SPEC H2).

Histories in, findings out. They are of wall time and of this machine, so none of it is part of a checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from vlmtune.types import Finding

PART = 20  # steps that are judged together
WAITED = 0.3  # of the time of a part: then data is late; said again after it was below half of that
WAITED_SECONDS = 60.0  # in the whole run, as it goes now: a wait that nobody notices is none
SLOWER = 0.5  # of the usual tokens per second, in two parts in a row; neighbours on a machine cost 20 to 30 %
PARTS = 3  # before "usual" means something
IDLE = 0.3  # of the time the GPU computes, while data is not late
MIB = 2**20


class PaceWatch:
    """Sees when steps wait for data, when they get slower, and when the GPU has nothing to do.

    Speed is tokens per second of computing, so that waiting is not said twice, and long samples are not slow ones.
    """

    def __init__(self) -> None:
        self._late = self._slow = self._idle = False
        self._waited_in_all = 0.0
        self.begin()

    def begin(self) -> None:
        """Forget what is usual: from now on steps are other ones, for example because more of the model trains."""
        self._speeds: list[float] = []
        self._was_slow = False
        self._left_out = False  # the first step allocates, compiles and starts workers
        self._clear()

    def _clear(self) -> None:
        self._steps = self._tokens = 0
        self._waited = self._seconds = 0.0
        self._busy: list[float] = []

    def observe(
        self, waited: float, seconds: float, tokens: int, steps_left: int, busy: float | None = None
    ) -> list[Finding]:
        """Of the next step: seconds of waiting for data, seconds in all, tokens, steps that follow, and the share of
        time in which the GPU computes (None where nobody measures it)."""
        if not self._left_out:
            self._left_out = True
            return []
        self._steps += 1
        self._tokens += tokens
        self._waited += waited
        self._waited_in_all += waited
        self._seconds += seconds
        self._busy += [] if busy is None else [busy]
        if self._steps < PART or self._seconds <= 0:
            return []
        found = [self._judge_waiting(steps_left), self._judge_speed(), self._judge_device()]
        self._clear()
        return [finding for finding in found if finding is not None]

    def _judge_waiting(self, steps_left: int) -> Finding | None:
        share, expected = self._waited / self._seconds, self._waited_in_all + self._waited / PART * steps_left
        said = self._late
        self._late = share > (WAITED / 2 if said else WAITED) and expected > WAITED_SECONDS
        if said or not self._late:
            return None
        return Finding(
            "warn", "data is late", f"{share:.0%} of the time of the last {PART} steps was spent waiting for it",
            "raise data.workers, or lower data.max_pixels",
        )  # fmt: skip

    def _judge_speed(self) -> Finding | None:
        speed = self._tokens / max(1e-9, self._seconds - self._waited)
        usual = statistics.median(self._speeds) if len(self._speeds) >= PARTS else None
        is_slow = usual is not None and speed < SLOWER * usual
        twice, self._was_slow = is_slow and self._was_slow, is_slow
        if not is_slow:
            self._speeds.append(speed)
            self._slow = False
        if not twice or self._slow:
            return None
        self._slow = True
        return Finding(
            "warn", "steps have become slower",
            f"{speed:,.0f} tokens per second of computing in the last {PART} steps, usual were {usual:,.0f}",
            "look what else runs on this machine, and whether it is hot or swaps",
        )  # fmt: skip

    def _judge_device(self) -> Finding | None:
        if not self._busy:
            return None
        busy = statistics.fmean(self._busy)
        said, self._idle = self._idle, busy < IDLE and not self._late
        if said or not self._idle:
            return None
        return Finding(
            "warn", "the GPU is hardly used", f"it computed in {busy:.0%} of the time of the last {PART} steps",
            "raise train.micro_batch_size: steps are too small to keep it at work",
        )  # fmt: skip


# ---- memory --------------------------------------------------------------------------------------------------------

BLOCK, BLOCKS = 10, 16  # steps of a block at first, and how many are remembered: then two become one
RISING = 8  # blocks whose lowest value rises from each to the next
GREW, GREW_BY = 0.05, 64 * MIB  # of what it was, and at least so much: below that it is the allocator's own doing
STEADY = 0.5  # of the first half's growth in the second half: caches that fill up slow down, a leak goes on
AGAIN = 1.5  # times as much as when it was said last


class MemoryWatch:
    """Sees memory that grows and grows. `of`: whose, in a sentence.

    Judged are the lowest values of blocks of steps: what a step takes for itself does not count. Blocks grow with the
    run, so that a slow leak of a long run is seen as well.
    """

    def __init__(self, of: str):
        self.of = of
        self._size = BLOCK
        self._values: list[int] = []
        self._lowest: list[int] = []
        self._said: int | None = None

    def observe(self, used: int, free: int, steps_left: int) -> Finding | None:
        """used: bytes after the next step; free: bytes that are left."""
        self._values.append(used)
        if len(self._values) < self._size:
            return None
        self._lowest.append(min(self._values))
        self._values = []
        finding = self._judge(free, steps_left)
        if len(self._lowest) == BLOCKS:
            self._lowest = [min(self._lowest[n : n + 2]) for n in range(0, BLOCKS, 2)]
            self._size *= 2
        return finding

    def _judge(self, free: int, steps_left: int) -> Finding | None:
        recent = self._lowest[1:][-RISING:]  # in the first block caches fill
        if len(recent) < RISING or any(after <= before for before, after in zip(recent, recent[1:], strict=False)):
            return None
        first, middle, last = recent[0], recent[RISING // 2], recent[-1]
        if last - first < max(GREW_BY, GREW * first) or last - middle < STEADY * (middle - first):
            return None
        if self._said is not None and last < AGAIN * self._said:
            return None
        self._said = last
        per_step = (last - first) / ((RISING - 1) * self._size)
        enough = math.floor(free / per_step)
        runs_out = enough < steps_left
        return Finding(
            "fail" if runs_out else "warn", "memory grows from step to step",
            f"{self.of} from {first / MIB:,.0f} to {last / MIB:,.0f} MiB, {per_step / MIB:,.2f} MiB a step; "
            f"what is free, {free / MIB:,.0f} MiB, "
            + (f"ends after {enough:,} of the {steps_left:,} steps left" if runs_out else "lasts to the end"),
            "set data.workers=0: if it stops, reading the data keeps something; if not, look at observers of your own",
        )  # fmt: skip


# ---- learning rates ------------------------------------------------------------------------------------------------

TOLERANCE = 1e-6  # relative; both are the same product of float64 numbers
STOOD_STILL = 10  # steps in a row without a learning rate


class RateWatch:
    """Sees learning rates that are not the planned ones, and steps that cannot change anything."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._still = 0

    def observe(self, planned: Mapping[str, float], used: Mapping[str, float], steps_left: int) -> Finding | None:
        """Of the rules that train in this step: the rate of the plan, and the one in the optimizer after its update."""
        odd = [
            rule for rule, rate in planned.items()
            if not math.isclose(used.get(rule, math.nan), rate, rel_tol=TOLERANCE, abs_tol=1e-30)
        ]  # fmt: skip
        what = "a learning rate is not the planned one"
        if odd and what not in self._said:
            self._said.add(what)
            return Finding(
                "fail", what, f"rule {odd[0]}: planned {planned[odd[0]]:.4g}, used {used.get(odd[0], math.nan):.4g}",
                "something besides the schedule sets it; look at observers and optimizers of your own",
            )  # fmt: skip
        self._still = 0 if any(used.values()) else self._still + 1
        what = "nothing is learned any more"
        if self._still < STOOD_STILL or what in self._said or not steps_left:
            return None
        self._said.add(what)
        return Finding(
            "warn", what,
            f"every learning rate was 0 in the last {self._still} steps, and {steps_left:,} are left",
            "look at optim.schedule: it ends before the run does; give it a floor, or shorten the run",
        )  # fmt: skip
