"""What is done to a conversation that is longer than the context (SPEC A6, G1, G2).

Everything is counted in tokens after image expansion, by a function the caller passes in (image sizes come from file
headers, so nothing is decoded). In this order, and only as far as needed:

1. drop the oldest rounds (a user turn and its reply) with their images, unless a later turn refers to the image: then
   the image moves to the first turn that is left;
2. shrink the images, halving their pixels down to the lowest that is allowed;
3. cut the last reply at the end of a sentence, if what is left for it is at least the reserve; the end-of-turn token
   of a cut reply carries no loss, because the reply did not end there;
4. drop the sample.

Nothing is replaced by another sample, and an image block is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from vlmtune.data.sentences import sentence_ends
from vlmtune.types import Boxes, ImageName, ImageRef, Part, Points, Sample, Text, Turn

Measure = Callable[[Sample], int]
"""Tokens of a whole conversation as it would be trained on."""

Action = Literal["turns", "images", "reply", "dropped"]


@dataclass(frozen=True)
class Change:
    """One thing that was done to a sample. `tokens`: how many it had, and has after this change."""

    action: Action
    detail: str
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Fitted:
    """sample: None when it was dropped. `changes` is empty for a sample that fitted as it was."""

    sample: Sample | None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Window:
    """max_length: tokens a sample may have; reply_reserve: tokens the last reply keeps at least, or all of its own."""

    max_length: int
    reply_reserve: int = 64

    def fit(self, sample: Sample, measure: Measure, pixels: tuple[int, int] | None = None) -> Fitted:
        """The sample brought to `max_length`, and what was done to it.

        pixels: the fewest and the most that one image may have; None: images keep their size.
        """
        before = tokens = measure(sample)
        changes: list[Change] = []
        while tokens > self.max_length and len(_rounds(sample)) > 1:
            sample = _without_oldest_round(sample)
            tokens = measure(sample)
        if tokens < before:
            rounds = len(_rounds(sample))
            changes.append(Change("turns", f"kept the last {rounds} rounds", (before, tokens)))
        if tokens > self.max_length and pixels is not None and sample.images:
            smaller, count = self._shrink(sample, measure, tokens, *pixels)
            if count < tokens:
                changes.append(Change("images", f"at most {smaller.max_pixels} pixels per image", (tokens, count)))
                sample, tokens = smaller, count
        if tokens > self.max_length:
            cut, count = self._cut_reply(sample, measure)
            if cut is None:
                why = f"{tokens} tokens where {self.max_length} are allowed"
                return Fitted(None, (*changes, Change("dropped", why, (before, 0))))
            changes.append(Change("reply", "cut after a sentence", (tokens, count)))
            sample = cut
        return Fitted(sample, tuple(changes))

    def _shrink(self, sample: Sample, measure: Measure, tokens: int, lowest: int, most: int) -> tuple[Sample, int]:
        """Halve the pixels of the images until the sample fits, but not below `lowest`."""
        most = min(most, sample.max_pixels or most)
        while most > lowest and tokens > self.max_length:
            most = max(most // 2, lowest)
            sample = replace(sample, max_pixels=most)
            tokens = measure(sample)
        return sample, tokens

    def _cut_reply(self, sample: Sample, measure: Measure) -> tuple[Sample | None, int]:
        """The longest cut of the last reply that fits; None when there is none, or no room for one."""
        turns = list(sample.turns)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns or not turns[-1].train:
            return None, 0
        *history, reply = turns
        bare = measure(replace(sample, turns=(*history, replace(reply, parts=(Text("."),)))))
        if self.max_length - bare < self.reply_reserve:
            return None, 0
        cuts = _cuts(reply)
        low, high, best = 0, len(cuts), (None, 0)
        while low < high:  # more text, more tokens
            middle = (low + high) // 2
            shorter = replace(sample, turns=(*history, replace(reply, parts=cuts[middle], cut=True)))
            count = measure(shorter)
            if count <= self.max_length:
                low, best = middle + 1, (shorter, count)
            else:
                high = middle
        return best


def _rounds(sample: Sample) -> list[list[Turn]]:
    """User turns with the replies to them; a leading system turn belongs to none."""
    rounds: list[list[Turn]] = []
    for turn in sample.turns:
        if turn.role == "system" and not rounds:
            continue
        if not rounds or (turn.role == "user" and rounds[-1][-1].role == "assistant"):
            rounds.append([])
        rounds[-1].append(turn)
    return rounds


def _without_oldest_round(sample: Sample) -> Sample:
    oldest, *later = _rounds(sample)
    lead = [turn for turn in sample.turns if turn.role == "system"][
        : len(sample.turns) - sum(map(len, (oldest, *later)))
    ]
    gone = [part for turn in oldest for part in turn.parts if isinstance(part, ImageRef)]
    before = sum(isinstance(part, ImageRef) for turn in lead for part in turn.parts)
    kept = [image for n, image in enumerate(gone, before) if _refers(later, n, image)]
    place = {n: n for n in range(before)}  # number of an image -> its new number
    place |= {before + n: before + kept.index(image) for n, image in enumerate(gone) if image in kept}
    place |= {n: n - len(gone) + len(kept) for n in range(before + len(gone), len(sample.images))}
    turns = [*lead]
    for number, turn in enumerate(turn for group in later for turn in group):
        parts: tuple[Part, ...] = tuple(
            replace(part, image=place[part.image]) if isinstance(part, (Boxes, Points)) else part for part in turn.parts
        )
        turns.append(replace(turn, parts=(*kept, *parts) if number == 0 else parts))
    return replace(sample, turns=tuple(turns))


def _refers(later: Sequence[Sequence[Turn]], number: int, image: ImageRef) -> bool:
    """Whether a later turn has a box in image `number`, or refers to its id, as a part of its own or in text."""
    parts = [part for group in later for turn in group for part in turn.parts]
    if any(isinstance(part, (Boxes, Points)) and part.image == number for part in parts):
        return True
    if not image.id:
        return False
    if ImageName(image.id) in parts:
        return True
    name = re.compile(rf"(?<!\w){re.escape(image.id)}(?!\w)")
    return any(isinstance(part, Text) and name.search(part.text) for part in parts)


def _cuts(reply: Turn) -> list[tuple[Part, ...]]:
    """The reply up to each end of a sentence in its text, shortest first. Text parts in a row are one text."""
    cuts: list[tuple[Part, ...]] = []
    for is_text, group in groupby(enumerate(reply.parts), key=lambda entry: isinstance(entry[1], Text)):
        if not is_text:
            continue
        numbers, texts = zip(*group, strict=True)
        whole = "".join(part.text for part in texts)
        # what follows decides whether the end of a text that is not the last one ends a sentence
        is_last = numbers[-1] == len(reply.parts) - 1
        ends = sentence_ends(whole if is_last else whole + " x")
        before = reply.parts[: numbers[0]]
        cuts += [(*before, *_head(texts, end)) for end in ends if end <= len(whole)]
    return cuts


def _head(texts: Sequence[Text], length: int) -> list[Text]:
    """The first `length` characters."""
    head = []
    for part in texts:
        if length > 0:
            head.append(replace(part, text=part.text[:length]))
        length -= len(part.text)
    return head
