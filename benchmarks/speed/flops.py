"""The operations that a step cannot do without, for the fraction of the machine's peak that an arm reaches.

Counted are products only, 2 operations per multiply-add: the frozen tower forward; the merger forward and for the
gradients of its weights; the language model forward and for the gradients of states (its weights are frozen), with its
adapters, or without any and for the gradients of all weights (full fine-tuning); causal attention as half a square; the
head and the feed-forward part of the last block at supervised positions, forward and for the gradient of states.
Whatever an arm computes besides (padding, logits nobody reads, a tower whose result is known) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workload import Shape

from vlmtune.build import build_encoder
from vlmtune.data.mixture import Mixture
from vlmtune.data.sources import FileSource
from vlmtune.models.load import load_model, load_processor
from vlmtune.schedule import piecewise

RANK = 16
WINDOW = 64  # patches


@dataclass(frozen=True)
class Sample:
    tokens: int
    supervised: int
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Needed:
    """samples: in the order of training; per_step: of them."""

    samples: list[Sample]
    per_step: int
    shape: Shape
    in_full: bool

    def of_steps(self, first: int, count: int, tower_is_known: bool) -> float:
        """Operations of `count` steps from step `first` (from 0) on."""
        part = [
            self.samples[k % len(self.samples)] for k in range(first * self.per_step, (first + count) * self.per_step)
        ]
        return sum(self._of(sample, tower_is_known) for sample in part)

    @property
    def tokens_per_step(self) -> float:
        return sum(sample.tokens for sample in self.samples) / len(self.samples) * self.per_step

    @property
    def supervised_per_step(self) -> float:
        return sum(sample.supervised for sample in self.samples) / len(self.samples) * self.per_step

    def _of(self, sample: Sample, tower_is_known: bool) -> float:
        shape, tokens = self.shape, sample.tokens
        products = 3 if self.in_full else 2  # forward, gradient of states, and of weights where they train
        narrow = shape.kv * shape.hidden // shape.heads
        attention = 2 * shape.hidden**2 + 2 * shape.hidden * narrow
        feed_forward = 3 * shape.hidden * shape.inner
        if not self.in_full:  # factors: all three
            attention += RANK * (4 * shape.hidden + 2 * (shape.hidden + narrow)) * 3 / products
            feed_forward += RANK * 3 * (shape.hidden + shape.inner) * 3 / products
        total = shape.layers * (products * 2 * attention + (2 + 4) * tokens * shape.hidden) * tokens
        total += products * 2 * feed_forward * ((shape.layers - 1) * tokens + sample.supervised)
        total += products * 2 * shape.vocabulary * shape.hidden * sample.supervised
        patches = sum(sample.patches)
        total += 2 * 2 * shape.merger * patches / 4 + 2 * patches / 4 * 4 * shape.vision_hidden * shape.hidden
        if not tower_is_known:
            seen = sum(count * (WINDOW * (shape.vision_depth - 2) + count * 2) for count in sample.patches)
            total += 2 * shape.vision_depth * shape.vision * patches + 4 * shape.vision_hidden * seen
            total += 2 * 3 * 2 * 14 * 14 * shape.vision_hidden * patches
        return total


def needed(model: Path, data: Path, shape: Shape, steps: int, per_step: int, in_full: bool) -> Needed:
    """Of the samples in `data`, encoded as vlmtune does it."""
    encoder = build_encoder(load_processor(str(model)), load_model(str(model)))
    source = FileSource(data / "ours.jsonl")
    order = Mixture([source.size], [piecewise(1.0)], source.size, seed=0)
    samples = []
    for k in range(min(source.size, steps * per_step)):
        encoded = encoder.encode(source[order[k][1]])
        grids = encoded.pixels["image_grid_thw"].prod(1).tolist()
        samples.append(Sample(len(encoded), int(encoded.supervised()[1:].sum()), tuple(grids)))
    return Needed(samples, per_step, shape, in_full)
