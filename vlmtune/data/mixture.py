"""Which sample is number k of the run: a pure function of (seed, weights, sizes), so resume jumps and does not replay.

The whole schedule of a run is drawn once: one byte per sample for its source, and the count of that source before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import Piecewise, first_reaching


class Mixture:
    """Order of `total` samples over several sources.

    sizes: rows of each source, None for one without end; weights: the share of each source over progress. A finite
    source is walked in a fresh permutation every epoch; an endless one is simply walked.
    """

    def __init__(self, sizes: Sequence[int | None], weights: Sequence[Piecewise], total: int, seed: int):
        self._sizes, self._seed = list(sizes), seed
        rng = np.random.default_rng([seed, 0xD])
        draws = rng.random(total)
        shares, starts = _piecewise_shares(weights, total)
        self._choice = np.empty(total, dtype=np.uint8 if len(sizes) < 256 else np.uint16)
        for share, low, high in zip(shares, starts, [*starts[1:], total], strict=True):
            self._choice[low:high] = np.searchsorted(np.cumsum(share)[:-1], draws[low:high], side="right")
        self._rank = np.empty(total, dtype=np.int64)
        for source in range(len(sizes)):
            mine = self._choice == source
            self._rank[mine] = np.arange(mine.sum())
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, k: int) -> tuple[int, int]:
        """(source, row in it) of sample k."""
        source, rank = int(self._choice[k]), int(self._rank[k])
        size = self._sizes[source]
        if size is None:
            return source, rank
        epoch, position = divmod(rank, size)
        return source, int(self._permutation(source, epoch)[position])

    def counts(self, upto: int) -> list[int]:
        """Samples drawn from each source before sample `upto`."""
        return [int((self._choice[:upto] == source).sum()) for source in range(len(self._sizes))]

    def decide(self, k: int) -> int:
        """All samples are decided from the start (`sampling.Order`)."""
        return len(self)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._permutations:
            for old in [k for k in self._permutations if k[0] == source and k[1] < epoch - 1]:
                del self._permutations[old]
            rng = np.random.default_rng([self._seed, 0xE, source, epoch])
            self._permutations[key] = rng.permutation(self._sizes[source])
        return self._permutations[key]


def _piecewise_shares(weights: Sequence[Piecewise], total: int) -> tuple[list[np.ndarray], list[int]]:
    """Stretches of constant shares: (shares of each stretch, first sample of each stretch)."""
    shares: list[np.ndarray] = []
    starts: list[int] = []
    for k in sorted({first_reaching(start, total) for weight in weights for start in weight.starts} - {total}):
        now = np.array([weight(k / total) for weight in weights], dtype=np.float64)
        if now.min() < 0 or now.sum() <= 0:
            raise VlmtuneError(
                f"data.train: weights at {100 * k / total:.0f}% of training are {now.tolist()}; they must be >= 0 with "
                "a positive sum."
            )
        shares.append(now / now.sum())
        starts.append(k)
    return shares, starts
