"""Samples are drawn by how hard they are (SPEC F6): what is weak comes more often, the rest keeps a floor, and samples
whose loss never falls are reported and not chased.

A run is drawn stretch by stretch. Shapes: N rows of all sources together, in their order; n samples of a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

from vlmtune.data.sampling import UNDECIDED
from vlmtune.types import Finding, VlmtuneError

Measure = Literal["loss", "accuracy", "forgetting"]

DECAY = 0.5  # of the running loss of a row, per step that had it: a row comes back a few times in a run
KNOWN = math.log(2)  # a token whose loss is below has more than half of the probability: a greedy reply has it
SMALL = 0.1  # difficulty by accuracy of a row that is known; of one that is not: 1
SEEDED = 0x11  # tells its random numbers from those of other orders
HARDEST = 0.1  # part of the rows whose share of the draws is told

FEWEST_SEEN, APART = 3, 4  # stretches that had a row before it can be suspected; from the first to the last of them
STUCK, SLOW = 0.9, 0.5  # of its first loss: above it has not fallen; has fallen little, where others have fallen more
LEARNERS = 0.25  # part of the rows that began as high, which have to be below `SLOW` before others count as slow
FAR = 3.0  # scaled deviations above the median of its group
TO_SIGMA = 1.4826  # of a normal distribution, by its median absolute deviation


@dataclass
class Records:
    """What is known of every row; arrays of N.

    first, last, running: float32, its loss when it was first and last seen, and a decayed mean; seen: uint8, stretches
    that had it, 255 at most; begun, stretch: int32, the first and the last of them, -1 for none; known: bool, whether
    every token was told the last time it was seen; ever: bool, whether it was at any time; forgotten: uint8, how often
    it was known and then was not (Toneva et al. 2019, arXiv 1812.05159), 255 at most.
    """

    first: np.ndarray
    last: np.ndarray
    running: np.ndarray
    begun: np.ndarray
    stretch: np.ndarray
    seen: np.ndarray
    forgotten: np.ndarray
    known: np.ndarray
    ever: np.ndarray

    @classmethod
    def empty(cls, size: int) -> Records:
        losses = {name: np.zeros(size, np.float32) for name in ("first", "last", "running")}
        counts = {name: np.zeros(size, np.uint8) for name in ("seen", "forgotten")}
        flags = {name: np.zeros(size, np.bool_) for name in ("known", "ever")}
        stretches = {name: np.full(size, -1, np.int32) for name in ("begun", "stretch")}
        return cls(**losses, **counts, **flags, **stretches)

    def observe(self, rows: np.ndarray, losses: np.ndarray, known: np.ndarray, stretch: int) -> None:
        """What a step told. rows: int[m]; losses: float64[m]; known: bool[m]. A row that the step had twice counts
        once, with its mean loss."""
        rows, of = np.unique(rows, return_inverse=True)
        losses = np.bincount(of, losses) / np.bincount(of)
        known = np.bincount(of, ~known) == 0
        is_new = self.seen[rows] == 0
        self.first[rows[is_new]] = losses[is_new]
        self.begun[rows[is_new]] = stretch
        self.last[rows] = losses
        self.running[rows] = np.where(is_new, losses, DECAY * self.running[rows] + (1 - DECAY) * losses)
        self.forgotten[rows] += self.known[rows] & ~known & (self.forgotten[rows] < 255)
        self.known[rows] = known
        self.ever[rows] |= known
        self.seen[rows] += (self.stretch[rows] != stretch) & (self.seen[rows] < 255)
        self.stretch[rows] = stretch

    def difficulty(self, measure: Measure, group: np.ndarray) -> np.ndarray:
        """float64[N], 0 or more. group: int[N], numbers from 0. A row that was never seen counts as the mean of its
        group, and a group of which nothing was seen as the mean of all."""
        if measure == "loss":
            own = self.running.astype(np.float64)
        elif measure == "accuracy":
            own = np.where(self.known, SMALL, 1.0)
        else:
            own = self.forgotten + np.where(self.ever, 0.0, 1.0)
        seen = self.seen > 0
        if seen.all():
            return own
        if not seen.any():
            return np.ones(len(own))
        counts = np.bincount(group[seen], minlength=int(group.max()) + 1)
        sums = np.bincount(group[seen], own[seen], minlength=len(counts))
        means = np.where(counts > 0, sums / np.maximum(counts, 1), own[seen].mean())
        return np.where(seen, own, means[group])

    def suspects(self, group: np.ndarray) -> np.ndarray:
        """bool[N]: rows that were seen in `FEWEST_SEEN` stretches or more, `APART` from the first to the last, whose
        loss is far above that of their group and has not fallen: by a tenth at most, or by half at most where a quarter
        of those that began far above their group have fallen further. What is merely hard falls because its like is
        trained on, given time; a wrong label falls by its own updates alone.
        """
        often = (self.seen >= FEWEST_SEEN) & (self.stretch - self.begun >= APART)
        candidates = often & (self.last > SLOW * self.first) & (self.last > KNOWN)
        found = np.zeros(len(group), np.bool_)
        for number in np.unique(group[candidates]):
            rows = np.flatnonzero((group == number) & (self.seen > 0))
            first, last = self.first[rows], self.last[rows]
            part = np.divide(last, first, out=np.ones_like(last), where=first > 0)
            hard = often[rows] & _is_far(first)
            others_fell = hard.any() and np.quantile(part[hard], LEARNERS) < SLOW
            found[rows] = candidates[rows] & _is_far(last) & (part > (SLOW if others_fell else STUCK))
        return found


def _is_far(losses: np.ndarray) -> np.ndarray:
    """bool[m]: far above the median of these, and above what a known token has."""
    middle = np.median(losses)
    spread = TO_SIGMA * np.median(np.abs(losses - middle))
    return (losses > middle + FAR * spread) & (losses > KNOWN)


def shares(difficulty: np.ndarray, floor: float) -> np.ndarray:
    """float64[N]: p_i = floor / N + (1 - floor) d_i / Σ d; uniform where nothing is difficult.

    Raises VlmtuneError for a difficulty that is negative or not finite, and a floor outside of (0, 1].
    """
    if not np.isfinite(difficulty).all() or difficulty.min() < 0 or not 0 < floor <= 1:
        raise VlmtuneError(f"difficulties {difficulty.min():g} to {difficulty.max():g}, floor {floor:g}: no shares.")
    total = difficulty.sum()
    weak = np.full(len(difficulty), 1 / len(difficulty)) if total == 0 else difficulty / total
    return floor / len(difficulty) + (1 - floor) * weak


def resample(parts: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64[count]: rows in random order, row i ⌊count · p_i⌋ or ⌈count · p_i⌉ times. parts: p, float64[N], sum 1.

    Systematic resampling (Carpenter, Clifford, Fearnhead 1999) over a permutation: every row has its share exactly, in
    expectation, with the least variance that whole numbers allow.
    """
    places = rng.permutation(len(parts))
    ends = np.cumsum(parts[places])
    ends *= count / ends[-1]
    ends[-1] = count
    passed = np.floor(ends + rng.random()).astype(np.int64)
    rows = np.repeat(places, np.diff(passed, prepend=0))
    return rng.permutation(rows)


@dataclass(frozen=True)
class Suspect:
    """A row whose label may be wrong. source, row: as the run's sources have it; seen: stretches that had it; first,
    last: its mean loss per token when it was first and last seen."""

    source: int
    row: int
    seen: int
    first: float
    last: float


class ActiveOrder:
    """An `Order` whose shares of rows follow their difficulty, drawn anew for every stretch of `every` steps:
    p_i = floor / N + (1 - floor) d_i / Σ d; suspects have nothing but the floor.

    tasks: of every row of each source: the groups that rows are compared in. guards: False chases suspects too.
    Given what was observed the order is a pure function; `state` holds as much of it as a resume needs.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[str]],
        steps: int,
        batch_size: int,
        seed: int,
        measure: Measure = "loss",
        every: int = 50,
        floor: float = 0.5,
        guards: bool = True,
    ):
        self.seed, self.measure, self.every, self.floor, self.guards = seed, measure, every, floor, guards
        self.tasks = sorted({task for names in tasks for task in names})
        number = {task: n for n, task in enumerate(self.tasks)}
        self.group = np.array([number[task] for names in tasks for task in names], np.int32)
        self.records = Records.empty(len(self.group))
        self._ends = np.cumsum([len(names) for names in tasks])  # of sources among all rows
        self._length = every * batch_size
        self._rows = np.zeros(steps * batch_size, np.int32)
        self._decided = self._stretches = self._newest = self._kept = 0
        self._before = np.zeros(len(tasks), np.int64)  # samples of each source before sample `_kept`
        self._told: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: int) -> tuple[int, int]:
        if not self._kept <= k < self._decided:
            raise IndexError(UNDECIDED.format(k=k, decided=self._decided))
        return self._place(int(self._rows[k]))

    def _place(self, row: int) -> tuple[int, int]:
        """(source, row in it) of a row of all."""
        source = int(np.searchsorted(self._ends, row, side="right"))
        return source, row - (int(self._ends[source - 1]) if source else 0)

    def counts(self, upto: int) -> list[int]:
        if not self._kept <= upto <= self._decided:
            raise IndexError(UNDECIDED.format(k=upto, decided=self._decided))
        sources = np.searchsorted(self._ends, self._rows[self._kept : upto], side="right")
        return (self._before + np.bincount(sources, minlength=len(self._ends))).tolist()

    def described(self) -> str:
        """One line for the console: "sampling: active by loss, 50 % uniform, new shares every 50 steps; …"."""
        return (
            f"sampling: active by {self.measure}, {100 * self.floor:.3g} % uniform, new shares every {self.every} "
            f"steps; {len(self) / len(self.group):.1f} draws for each of {len(self.group):,} rows"
        )

    def finding(self) -> Finding:
        """What will be done, and whether it is anything: a run of one stretch never looks at a loss."""
        evidence = self.described().removeprefix("sampling: ")
        if len(self) > self._length:
            return Finding("pass", "sampling", evidence)
        steps = len(self) * self.every // self._length
        said = f"{evidence}, but the run has only {steps}: all of it is drawn uniformly"
        return Finding("warn", "sampling", said, "lower data.sampling.every, or leave active sampling out")

    @property
    def shares(self) -> dict[str, float]:
        """task -> its share of the samples of the newest stretch."""
        return self._told["shares"]

    @property
    def told(self) -> dict[str, Any]:
        """What the newest stretch was drawn by: `difficulty`, and of the rows that were seen `known` (their share) and
        `forgotten` (events per row), by task; `hardest`: share of the draws that went to the hardest tenth of the rows;
        `suspects`: how many there were. Empty before anything was seen."""
        return {name: value for name, value in self._told.items() if name != "shares"}

    def observe(self, losses: Mapping[str, float], samples: Sequence[tuple[int, float, float]]) -> None:
        """What a step told. samples: number of the sample in the run, its mean and its largest token loss; those that
        are not finite are passed over. losses: of tasks, which are not asked here."""
        finite = [sample for sample in samples if math.isfinite(sample[1]) and math.isfinite(sample[2])]
        if not finite:
            return
        numbers, means, largest = (np.array(column) for column in zip(*finite, strict=True))
        self.records.observe(self._rows[numbers], means, largest < KNOWN, self._stretches - 1)

    def decide(self, k: int) -> int:
        while self._decided <= k:
            self._draw()
        return self._decided

    def _draw(self) -> None:
        difficulty = self.records.difficulty(self.measure, self.group)
        suspects = self.records.suspects(self.group)
        chased = np.where(suspects, 0.0, difficulty) if self.guards else difficulty
        count = min(self._length, len(self) - self._decided)
        rng = np.random.default_rng([self.seed, SEEDED, self._stretches])
        rows = resample(shares(chased, self.floor), count, rng)
        self._newest, self._decided = self._decided, self._decided + count
        self._rows[self._newest : self._decided] = rows
        self._stretches += 1
        self._told = {"shares": self._by_task(np.bincount(self.group[rows], minlength=len(self.tasks)) / count)}
        seen = self.records.seen > 0
        if seen.any():
            hardest = np.argsort(-chased, kind="stable")[: max(1, round(HARDEST * len(chased)))]
            self._told |= {
                "difficulty": self._means(difficulty, np.ones_like(seen)),
                "known": self._means(self.records.known, seen),
                "forgotten": self._means(self.records.forgotten, seen),
                "hardest": float(np.isin(rows, hardest).mean()),
                "suspects": int(suspects.sum()),
            }

    def _means(self, values: np.ndarray, of: np.ndarray) -> dict[str, float]:
        """Of each task that has rows in `of`. values: number[N]; of: bool[N]."""
        counts = np.bincount(self.group[of], minlength=len(self.tasks))
        sums = np.bincount(self.group[of], values[of], minlength=len(self.tasks))
        return {task: float(sums[n] / counts[n]) for n, task in enumerate(self.tasks) if counts[n]}

    def _by_task(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.tasks, values.tolist(), strict=True))

    def suspects(self) -> list[Suspect]:
        """All that are suspected now, the largest loss first."""
        found = np.flatnonzero(self.records.suspects(self.group))
        found = found[np.argsort(-self.records.last[found], kind="stable")]
        seen, first, last = (getattr(self.records, name)[found].tolist() for name in ("seen", "first", "last"))
        return [
            Suspect(*self._place(int(row)), *figures)
            for row, *figures in zip(found.tolist(), seen, first, last, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """JSON values and tensors. Of what was drawn, the newest stretch alone: a checkpoint is never older."""
        return {
            "stretches": self._stretches, "newest": self._newest, "told": self._told,
            "before": self.counts(self._newest),
            "rows": torch.from_numpy(self._rows[self._newest : self._decided]),
            **{field.name: torch.from_numpy(getattr(self.records, field.name)) for field in fields(Records)},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned, with an order of the same arguments. Raises VlmtuneError where it was of
        other data."""
        if len(state["seen"]) != len(self.group):
            raise VlmtuneError(
                f"data.sampling active: the checkpoint remembers {len(state['seen']):,} rows and data.train has "
                f"{len(self.group):,}, because files changed meanwhile; put them back, or start over with --restart."
            )
        self._stretches, self._newest, self._told = state["stretches"], state["newest"], dict(state["told"])
        self._kept, self._before = self._newest, np.array(state["before"], np.int64)
        self._decided = self._newest + len(state["rows"])
        self._rows[self._newest : self._decided] = state["rows"].numpy()
        self.records = Records(**{field.name: state[field.name].numpy().copy() for field in fields(Records)})
