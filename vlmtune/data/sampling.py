"""Which task every sample of the run has (SPEC B9): all tasks in every batch, one task per batch, or by task loss.

Here a run draws from tasks, not from sources: a task is walked in a fresh permutation every epoch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlmtune.errors import VlmtuneError

UNDECIDED = "sample {k} is not decided yet: only {decided} are"
LOSS_DECAY = 0.9  # of the running loss of a task, per step that had the task


class Order(Protocol):
    """Which sample is number k of the run."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> tuple[int, int]:
        """(source, row in it) of sample k."""

    def counts(self, upto: int) -> list[int]:
        """Samples drawn from each source before sample `upto`."""

    def decide(self, k: int) -> int:
        """Decide sample k, if it is not; returns how many samples are decided: those before it never change again."""


@dataclass(frozen=True)
class Pool:
    """All samples of one task. members: (source, its rows of this task; None: a source without end).

    Rows of finite sources are walked together. A task with a source without end takes its sources in turn.
    """

    members: tuple[tuple[int, np.ndarray | None], ...]

    @property
    def size(self) -> int | None:
        """Samples of one epoch; None where a source has no end."""
        sizes = [None if rows is None else len(rows) for _, rows in self.members]
        return None if None in sizes else sum(sizes)

    def take(self, first: int, count: int, key: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(source, row), int64[count] each, of samples first … first + count - 1 of this task. key: seeds the order."""
        numbers = np.arange(first, first + count)
        if self.size is not None:
            sources = np.concatenate([np.full(len(rows), source) for source, rows in self.members])
            rows = np.concatenate([rows for _, rows in self.members])
            places = _shuffled(len(rows), numbers, key)
            return sources[places], rows[places]
        turn = numbers % len(self.members)
        sources, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        for n, (source, own) in enumerate(self.members):
            mine = turn == n
            ranks = numbers[mine] // len(self.members)
            sources[mine] = source
            rows[mine] = ranks if own is None else own[_shuffled(len(own), ranks, [*key, n])]
        return sources, rows


def _shuffled(size: int, numbers: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Position of each number in a walk over `size` items that is a new permutation every epoch."""
    epochs, positions = np.divmod(numbers, size)
    places = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        places[now] = np.random.default_rng([*key, epoch]).permutation(size)[positions[now]]
    return places


def pools_of(tasks: Sequence[Sequence[str]], sizes: Sequence[int | None]) -> dict[str, Pool]:
    """task -> its samples. tasks: of every row of each source (one task for a source without end); sizes: of each."""
    members: dict[str, list[tuple[int, np.ndarray | None]]] = {}
    for source, (names, size) in enumerate(zip(tasks, sizes, strict=True)):
        array = np.asarray(names)
        for task in sorted(set(names)):
            rows = None if size is None else np.flatnonzero(array == task)
            members.setdefault(task, []).append((source, rows))
    return {task: Pool(tuple(members[task])) for task in sorted(members)}


class TaskOrder:
    """An order that grows: `extend` says of which task the next samples are."""

    def __init__(self, pools: Mapping[str, Pool], total: int, seed: int):
        self.pools, self.seed = dict(pools), seed
        self.tasks = list(self.pools)
        self._sources = 1 + max(source for pool in pools.values() for source, _ in pool.members)
        self._source = np.zeros(total, np.uint16)
        self._row = np.zeros(total, np.int64)
        self._taken = [0] * len(self.tasks)
        self._decided = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, k: int) -> tuple[int, int]:
        if k >= self._decided:
            raise IndexError(UNDECIDED.format(k=k, decided=self._decided))
        return int(self._source[k]), int(self._row[k])

    def counts(self, upto: int) -> list[int]:
        if upto > self._decided:
            raise IndexError(UNDECIDED.format(k=upto, decided=self._decided))
        return np.bincount(self._source[:upto], minlength=self._sources).tolist()

    def decide(self, k: int) -> int:
        return self._decided

    def extend(self, choice: np.ndarray) -> None:
        """choice: int[n], index of the task of each of the next n samples."""
        first = self._decided
        for n, task in enumerate(self.tasks):
            places = first + np.flatnonzero(choice == n)
            found = self.pools[task].take(self._taken[n], len(places), [self.seed, 0xF, n])
            self._source[places], self._row[places] = found
            self._taken[n] += len(places)
        self._decided += len(choice)


def every_task(pools: Mapping[str, Pool], steps: int, batch_size: int, seed: int) -> TaskOrder:
    """Every batch has every task, and over the run every task equally often. Raises VlmtuneError where it cannot."""
    if batch_size < len(pools):
        raise VlmtuneError(
            f"data.sampling every_task: a batch of {batch_size} cannot hold {len(pools)} tasks "
            f"({', '.join(pools)}); raise train.batch_size to {len(pools)} or more."
        )
    order = TaskOrder(pools, steps * batch_size, seed)
    order.extend(np.arange(len(order)) % len(pools))
    return order


def grouped(pools: Mapping[str, Pool], steps: int, batch_size: int, seed: int) -> TaskOrder:
    """Every batch has one task. Batches of a task are as frequent as its samples, so that an epoch is an epoch of all
    of them, and evenly spread; equally frequent where a task has no end."""
    sizes = np.array([pool.size or 0 for pool in pools.values()], dtype=np.float64)
    shares = np.full(len(sizes), 1 / len(sizes)) if sizes.min() == 0 else sizes / sizes.sum()
    taken = np.zeros(len(shares))
    choice = np.empty(steps, np.int64)
    for step in range(steps):
        choice[step] = np.argmax((step + 1) * shares - taken)  # whoever is furthest behind its share
        taken[choice[step]] += 1
    order = TaskOrder(pools, steps * batch_size, seed)
    order.extend(np.repeat(choice, batch_size))
    return order


def temperature_shares(losses: Sequence[float], temperature: float) -> np.ndarray:
    """float64[tasks]: P_i ∝ L_i^(1/T). T -> 0: only the task (or tasks) of the largest loss; T = 1: in proportion to
    the losses; T -> ∞: uniform. (SPEC B9: the handbook's formula contradicts these limits of its own.)

    Raises VlmtuneError for losses that are negative or not finite, and a negative temperature.
    """
    values = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or not temperature >= 0:
        raise VlmtuneError(f"task losses {values.tolist()} at temperature {temperature:g}: neither may be below 0.")
    worst = values.max()
    if worst == 0:
        return np.full(len(values), 1 / len(values))
    if temperature == 0:
        shares = (values == worst).astype(np.float64)
    else:  # over the worst one, so that a power neither overflows nor makes all of them 0
        shares = (values / worst) ** (1 / temperature)
    return shares / shares.sum()


class TemperatureOrder(TaskOrder):
    """Shares of tasks follow their running losses: P_i ∝ L_i^(1/T), decided anew for every stretch of `every` steps.

    Given the history of losses the order is a pure function; `state` holds as much of it as a resume needs. A task
    whose share is almost 0 keeps its last loss until it is drawn again. Shares are uniform until every task was seen.
    """

    def __init__(
        self, pools: Mapping[str, Pool], steps: int, batch_size: int, seed: int, temperature: float, every: int
    ):
        super().__init__(pools, steps * batch_size, seed)
        self.temperature, self._stretch = temperature, every * batch_size
        self._losses: dict[str, float] = {}
        self._shares: list[list[float]] = []  # of every stretch that is decided

    @property
    def shares(self) -> dict[str, float]:
        """task -> its share in the newest stretch."""
        return dict(zip(self.tasks, self._shares[-1], strict=True))

    @property
    def told(self) -> dict[str, Any]:
        """Nothing but the shares is recorded."""
        return {}

    def observe(self, losses: Mapping[str, float], samples: Sequence[tuple[int, float, float]] = ()) -> None:
        """losses: task -> mean loss, of the tasks of the step that was just made. Single samples are not asked."""
        for task, loss in losses.items():
            before = self._losses.get(task)
            self._losses[task] = loss if before is None else LOSS_DECAY * before + (1 - LOSS_DECAY) * loss

    def decide(self, k: int) -> int:
        while self._decided <= k:
            known = [self._losses[task] for task in self.tasks if task in self._losses]
            complete = len(known) == len(self.tasks)
            self._draw(temperature_shares(known if complete else [1.0] * len(self.tasks), self.temperature).tolist())
        return self._decided

    def state(self) -> dict[str, Any]:
        return {"losses": dict(self._losses), "shares": [list(shares) for shares in self._shares]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned, with an order of the same arguments."""
        self._losses, self._shares = dict(state["losses"]), []
        self._taken, self._decided = [0] * len(self.tasks), 0
        for shares in state["shares"]:
            self._draw(shares)

    def _draw(self, shares: list[float]) -> None:
        rng = np.random.default_rng([self.seed, 0x10, len(self._shares)])
        draws = rng.random(min(self._stretch, len(self) - self._decided))
        bounds = np.cumsum(shares)
        choice = np.searchsorted(bounds / bounds[-1], draws, side="right")
        self._shares.append(shares)
        self.extend(choice)
