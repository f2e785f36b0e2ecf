"""The same conversation with a picture that is not its own, for `losses.consistency` (SPEC F6).

Ids, boxes and sizes stay those of the sample: the other picture is brought to the size of its own, so that nothing but
what can be seen differs, in every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vlmtune.data.encode import Encoder
from vlmtune.data.images import load_image
from vlmtune.types import Encoded, Part, Sample

GREY = (127, 127, 127)

Other = Literal["another", "blank"]


@dataclass(frozen=True)
class Contrast:
    """other: another sample's pictures, or grey ones; tasks: of the samples that have a contrast (None: all); weight:
    progress -> the weight of what reads it; where that is 0 there is none."""

    other: Other
    tasks: frozenset[str] | None
    weight: Callable[[float], float]

    def encode(
        self, number: int, own: Encoded, sample_of: Callable[[int], Sample], size: int, encoder: Encoder
    ) -> Encoded | None:
        """Sample `number` of a step of `size` samples, with other pictures; None where it has none, or nothing differs.

        own: the sample as it is trained; sample_of: of the step, by number. Another sample's pictures are those of the
        next one, in the order of the step, that has different pictures and another reply: with the same reply nothing
        would be wrong with them. A pure function of the step, the same in every process. Raises VlmtuneError for a
        sample or picture that cannot be read.
        """
        sample = sample_of(number)
        if not sample.images or (self.tasks is not None and sample.task not in self.tasks):
            return None
        sizes = [(geometry.width, geometry.height) for geometry in own.geometry]
        free = encoder.without_limit()  # another picture may be worth more tokens
        if self.other == "blank":
            return free.encode(sample, [Image.new("RGB", pixels, GREY) for pixels in sizes])
        other = self._partner(number, sample_of, size)
        if other is None:
            return None
        pictures = [load_image(reference.source, f"{other.origin} (sample {other.id})") for reference in other.images]
        there = [pictures[n % len(pictures)] for n in range(len(sizes))]
        return free.encode(sample, [image.resize(pixels) for image, pixels in zip(there, sizes, strict=True)])

    @staticmethod
    def _partner(number: int, sample_of: Callable[[int], Sample], size: int) -> Sample | None:
        sample = sample_of(number)
        seen, said = _pictures(sample), _replies(sample)
        for step in range(1, size):
            other = sample_of((number + step) % size)
            if other.images and _pictures(other) != seen and _replies(other) != said:
                return other
        return None


def _replies(sample: Sample) -> list[tuple[Part, ...]]:
    return [turn.parts for turn in sample.turns if turn.role == "assistant"]


def _pictures(sample: Sample) -> list:
    return [reference.source for reference in sample.images]
