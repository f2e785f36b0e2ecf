"""Step number -> the micro-batches of that optimizer step, prepared ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.data.batch import collate, with_contrast
from vlmtune.data.contrast import Contrast
from vlmtune.data.encode import Encoder
from vlmtune.data.sampling import Order
from vlmtune.data.share import Share
from vlmtune.data.sources import SampleSource
from vlmtune.interrupt import leave_signals_to_parent
from vlmtune.types import Batch, Encoded, VlmtuneError


@dataclass(frozen=True)
class Room:
    """What a forward holds: `samples` at most and, if given, `tokens` at most; has_padding: whether that counts too."""

    samples: int
    tokens: int | None = None
    has_padding: bool = True

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        padding = "padding included" if self.has_padding else "no padding"
        return f"a forward: at most {self.samples} samples{tokens}, {padding}"

    def split(self, lengths: Sequence[int]) -> list[slice]:
        """Neighbours that run together. lengths: tokens of each sample, in ascending order; one that is longer than
        `tokens` runs alone."""
        starts = [0]
        for n, length in enumerate(lengths):
            count = n - starts[-1]
            tokens = (count + 1) * length if self.has_padding else sum(lengths[starts[-1] : n + 1])
            if count == self.samples or (count and self.tokens is not None and tokens > self.tokens):
                starts.append(n)
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


class Steps(Dataset):
    """`steps[n]` is the list of micro-batches of optimizer step n; it depends on nothing but n.

    share: of one of several processes (None: there is only one); filler: joins micro-batches without an image, where
    the vision tower has to run in all processes at once; contrast: which samples come with other pictures too;
    numbered: batches know which samples of the run they have.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        order: Order,
        encoder: Encoder,
        batch_size: int,
        room: Room,
        share: Share | None = None,
        filler: Encoded | None = None,
        contrast: Contrast | None = None,
        numbered: bool = False,
    ):
        self.sources, self.order, self.encoder, self.numbered = sources, order, encoder, numbered
        self.batch_size, self.room, self.share, self.filler = batch_size, room, share, filler
        self.contrast = contrast

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, step: int) -> list[Batch] | VlmtuneError:
        try:
            first = step * self.batch_size
            samples = [self.order[k] for k in range(first, first + self.batch_size)]
            mine = range(len(samples)) if self.share is None else self.share.of(samples)
            sample_of = cache(lambda number: self.sources[samples[number][0]][samples[number][1]])
            encoded = [self.encoder.encode(sample_of(number)) for number in mine]
            others: list[Encoded | None] = [None] * len(encoded)
            if self.contrast is not None and self.contrast.weight(step / len(self)) > 0:
                others = [
                    self.contrast.encode(number, own, sample_of, len(samples), self.encoder)
                    for number, own in zip(mine, encoded, strict=True)
                ]
        except VlmtuneError as error:
            return error  # a worker would wrap it in a traceback; the loader raises it in the main process
        # like lengths share a micro-batch: less padding, same gradient, since a step sums over all of its samples
        order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]))
        together = self.room.split([len(encoded[n]) for n in order])
        return [
            self._collated(
                [encoded[n] for n in order[part]],
                [others[n] for n in order[part]],
                [first + mine[n] for n in order[part]],
            )
            for part in together
        ]

    def _collated(self, samples: list[Encoded], others: Sequence[Encoded | None], numbers: list[int]) -> Batch:
        if self.filler is None or any(sample.pixels or sample.images for sample in samples):
            batch = with_contrast(collate(samples, self.encoder.pad_token_id), others, self.encoder.pad_token_id)
        else:
            batch = collate([*samples, self.filler], self.encoder.pad_token_id, fillers=1)
        return replace(batch, numbers=numbers if self.numbered else [])


def start_worker(worker: int) -> None:
    """One thread, because there are several of them; and the parent says when to stop."""
    torch.set_num_threads(1)
    leave_signals_to_parent()


def load_steps(steps: Steps, start: int, stop: int, workers: int) -> Iterator[list[Batch]]:
    """Steps `start` … `stop` - 1 in order. The number of workers changes the speed and nothing else.

    Workers are started anew for every stretch of steps that the order has decided: what is prepared ahead of time must
    not depend on losses that are not there yet.
    """
    while start < stop:
        end = min(stop, steps.order.decide(start * steps.batch_size) // steps.batch_size)
        yield from _load_decided(steps, start, end, workers)
        start = end


def _load_decided(steps: Steps, start: int, stop: int, workers: int) -> Iterator[list[Batch]]:
    loader = DataLoader(
        steps,
        sampler=range(start, stop),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: drawing worker seeds must not move the training RNG
    )
    for batches in loader:
        if isinstance(batches, VlmtuneError):
            raise batches
        yield batches
