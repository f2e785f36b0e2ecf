"""Questions about what is not there (SPEC B13): a source of negatives beside a source of positives.

A negative is a new sample about the image of another, answered "none" or "no". Three kinds:

hard         another name of the same kind ("red mug" -> "blue mug", "cat" -> "dog"), the nearest spelling without one
random       any other name
background   a place whose IoU with every object is below 0.1, and neither covers a tenth of the other

What is asked depends on the positive. Detection ("Find the cat." -> boxes) asks for an absent name in the same words;
the answer is "none". Referring ("What is in <region>?" -> a name) asks whether a name is there ("Is cat in <region>?",
"no"), and `confirmed` asks it where the answer is "yes", so that the form of the question tells nothing. Background
asks what is at an empty place: "none".

Every sample says in `meta.objects` what is in its image: [{"name": …, "box": [x1, y1, x2, y2], "kind": …}], all of it.
`kind` may be left out: then the last word of the name is the kind. `meta.name` may say which name the question asks
for; else it is found there by the names of all objects of the source.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, Protocol

from vlmtune.data.images import image_size
from vlmtune.data.rows import Row
from vlmtune.types import Box, Boxes, ImageName, ImageRef, Part, Sample, Text, Turn, VlmtuneError

NegativeKind = Literal["hard", "random", "background", "confirmed"]
Form = Literal["detection", "referring"]

ABSENT, NO, YES = "none", "no", "yes"
LARGEST_OVERLAP = 0.1  # of a background place and an object: IoU, and the share of each that the other covers
SMALLEST_SIDE = 8.0  # pixels of a background place
TRIES_PER_SIZE = 40
TARGET_OVERLAP = 0.5  # IoU from which on an object is what a region is about


class NamedSource(Protocol):
    """A source that knows the objects of its samples."""

    name: str
    size: int | None

    @property
    def identity(self) -> str | None: ...

    @property
    def format(self) -> str: ...

    def __getitem__(self, index: int) -> Sample: ...

    def tasks(self) -> list[str]: ...

    def names(self) -> dict[str, str]:
        """Name -> kind of all objects of all samples."""


@dataclass(frozen=True)
class Thing:
    """An object of an image, as `meta.objects` tells of it; the box in original pixels."""

    name: str
    kind: str
    box: Box


def objects_of(sample: Sample) -> list[Thing]:
    """What `meta.objects` says. Raises VlmtuneError naming the sample where it says nothing or something else."""
    described = sample.meta.get("objects")
    if not isinstance(described, list) or not described:
        raise VlmtuneError(
            f"{_where(sample)}: negatives need 'objects' in 'meta': everything that is in the image, as a list of "
            '{"name": …, "box": [x1, y1, x2, y2]}; add it, or take negatives off this source.'
        )
    return [_thing(entry, sample) for entry in described]


def _thing(entry: object, sample: Sample) -> Thing:
    name, box, kind = (
        (entry.get("name"), entry.get("box"), entry.get("kind")) if isinstance(entry, dict) else (None,) * 3
    )
    numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    is_box = numbers and box[0] <= box[2] and box[1] <= box[3]
    if not isinstance(name, str) or not name.strip() or not is_box or not isinstance(kind, str | None):
        raise VlmtuneError(
            f"{_where(sample)}: {str(entry)[:80]} in meta.objects is not "
            '{"name": text, "box": [x1, y1, x2, y2]} with x1 <= x2 and y1 <= y2 (and perhaps "kind": text).'
        )
    return Thing(name, kind or name.split()[-1], tuple(float(value) for value in box))


def form_of_question(sample: Sample) -> Form:
    """Raises VlmtuneError for a sample that neither asks for places nor about one."""
    user, reply = _first_exchange(sample)
    if any(isinstance(part, Boxes) and part.region for part in user.parts):
        return "referring"
    if any(isinstance(part, Boxes) for part in reply.parts) or reply.parts == (Text(ABSENT),):
        return "detection"
    raise VlmtuneError(
        f"{_where(sample)}: negatives belong to samples whose reply holds boxes or whose question holds a region; this "
        "one has neither. Take negatives off this source."
    )


class NegativeSource:
    """`source`'s images with questions of one kind of negative; index i is made of sample i.

    form: of the questions of all its samples; verify: the question whether a name is at a place, with {name} and
    {region}; what: the question what is at a place, with {region}, for detection (referring has its own). Each kind is
    a task of its own: "<task>_<kind>".
    """

    def __init__(self, source: NamedSource, kind: NegativeKind, form: Form, verify: str, what: str):
        self._source, self._kind, self._form, self._verify, self._what = source, kind, form, verify, what
        self.name, self.size = f"{source.name} {kind}", source.size
        self._names: dict[str, str] | None = None

    @property
    def identity(self) -> str | None:
        base = self._source.identity
        return None if base is None else f"{base} {self._kind} {self._verify} {self._what}"

    @property
    def format(self) -> str:
        what = "confirmed names" if self._kind == "confirmed" else f"{self._kind} negatives"
        return f"{what} of {self._source.format}"

    def __getitem__(self, index: int) -> Sample:
        return self._negative(self._source[index])

    def row(self, index: int) -> Row:
        return self._source.row(index)

    def parse(self, row: Row) -> Sample:
        return self._negative(self._source.parse(row))

    def tasks(self) -> list[str]:
        return [f"{task}_{self._kind}" for task in self._source.tasks()]

    def _negative(self, sample: Sample) -> Sample:
        if (form := form_of_question(sample)) != self._form:
            raise VlmtuneError(
                f"{_where(sample)}: a question of {form} in a source whose first row is one of {self._form}; their "
                "negatives have other ratios, so put them into files of their own."
            )
        if self._names is None:
            self._names = self._source.names()
        return negative(sample, self._kind, self._names, self._verify, self._what)


def negative(sample: Sample, kind: NegativeKind, names: Mapping[str, str], verify: str, what: str) -> Sample:
    """The negative of this kind about the image of `sample`: a pure function.

    names: name -> kind, of which absent ones are drawn. Raises VlmtuneError naming the sample where there is none.
    """
    things, form, random = objects_of(sample), form_of_question(sample), Random(f"{sample.id}/{kind}")
    if len(sample.images) != 1:
        raise VlmtuneError(
            f"{_where(sample)}: negatives need samples with one image; this one has {len(sample.images)}."
        )
    user, _ = _first_exchange(sample)
    boxes: tuple[Box, ...] = ()
    if kind == "background":
        boxes = (_background(sample, things, random),)
        region = Boxes(boxes, region=True)
        if form == "referring":
            question = tuple(region if isinstance(part, Boxes) else part for part in user.parts)
        else:
            question = (*_before_text(user), *_filled(what, "", region))
        answer = ABSENT
    elif form == "referring":
        region = next(part for part in user.parts if isinstance(part, Boxes) and part.region)
        boxes = region.boxes[:1]
        target = _target(boxes[0], things, sample)
        there = {thing.name for thing in things if _overlap(thing.box, boxes[0]) > LARGEST_OVERLAP} | {target.name}
        name = target.name if kind == "confirmed" else _another(kind, target, there, names, sample, random)
        question = (*_before_text(user), *_filled(verify, name, replace(region, boxes=boxes, masks=region.masks[:1])))
        answer = YES if kind == "confirmed" else NO
    else:
        present = {thing.name for thing in things}
        asked = _asked(sample, user, present, names)
        target = next((thing for thing in things if thing.name == asked), None) or random.choice(things)
        name = _another(kind, target, present, names, sample, random)
        question = _renamed(user, asked, name)
        answer = ABSENT
    before = sample.turns[:1] if sample.turns[0].role == "system" else ()
    # what else is right, or could be, was said about the question of the sample
    meta = {name: value for name, value in sample.meta.items() if name not in ("answers", "choices")}
    meta |= {"answer": answer, "boxes": [list(box) for box in boxes], "negative": kind}
    turns = (*before, Turn("user", question), Turn("assistant", (Text(answer),)))
    return replace(sample, id=f"{sample.id}/{kind}", task=f"{sample.task}_{kind}", turns=turns, meta=meta)


# ---- names ------------------------------------------------------------------------------------------------------


def _another(
    kind: NegativeKind, target: Thing, taken: set[str], names: Mapping[str, str], sample: Sample, random: Random
) -> str:
    """A name that is none of `taken`: any, or (hard) one of the target's kind, else the one spelled most like it."""
    free = [name for name in names if name not in taken]
    if not free:
        raise VlmtuneError(
            f"{_where(sample)}: every name of the source is in this image, so there is no absent one to ask for; give "
            "the source more rows, or set hard and random of its negatives to 0."
        )
    if kind == "random":
        return random.choice(free)
    same = [name for name in free if names[name] == target.kind]
    return random.choice(same) if same else max(free, key=lambda name: (_alike(name, target.name), name))


def _alike(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def _named(turn: Turn, names: Iterable[str]) -> str | None:
    """The longest of the names that stands in the turn's text, as whole words."""
    text = "\n".join(part.text for part in turn.parts if isinstance(part, Text))
    found = [name for name in names if name in text and _whole(name).search(text)]
    return max(found, key=lambda name: (len(name), name), default=None)


def _renamed(turn: Turn, name: str, other: str) -> tuple[Part, ...]:
    return tuple(
        replace(part, text=_whole(name).sub(lambda match: other, part.text)) if isinstance(part, Text) else part
        for part in turn.parts
    )


def _asked(sample: Sample, user: Turn, present: set[str], names: Mapping[str, str]) -> str:
    """The name that a question asks for: `meta.name`, or what of the objects' names stands in it."""
    said = sample.meta.get("name")
    found = (_named(user, [said]) if isinstance(said, str) else None) or _named(user, present) or _named(user, names)
    if found is None:
        raise VlmtuneError(
            f"{_where(sample)}: negatives ask for another name in the same words, but the question holds neither "
            f"meta.name nor a name of meta.objects ({', '.join(sorted(present))}); write names as the question does."
        )
    return found


def _whole(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


# ---- places -----------------------------------------------------------------------------------------------------


def _target(region: Box, things: Sequence[Thing], sample: Sample) -> Thing:
    best = max(things, key=lambda thing: _iou(thing.box, region))
    if _iou(best.box, region) < TARGET_OVERLAP:
        raise VlmtuneError(
            f"{_where(sample)}: the region {region} of the question is none of meta.objects (IoU below "
            f"{TARGET_OVERLAP:g} with each); add its object."
        )
    return best


def _background(sample: Sample, things: Sequence[Thing], random: Random) -> Box:
    """A place of the size of an object, or of half of it, a quarter …, that holds none of them."""
    width, height = image_size(sample.images[0].source, _where(sample))
    like = random.choice(things).box
    across, down = (min(max(like[n + 2] - like[n], SMALLEST_SIDE), side) for n, side in ((0, width), (1, height)))
    while True:
        for _ in range(TRIES_PER_SIZE):
            x, y = random.uniform(0, width - across), random.uniform(0, height - down)
            box = (x, y, x + across, y + down)
            if all(_is_clear(box, thing.box) for thing in things):
                return box
        if min(across, down) / 2 < SMALLEST_SIDE:
            raise VlmtuneError(
                f"{_where(sample)}: found no background of {across:.0f}x{down:.0f} pixels in its image of "
                f"{width}x{height}; set background of its negatives to 0, or leave the row out."
            )
        across, down = across / 2, down / 2


def _is_clear(place: Box, thing: Box) -> bool:
    return max(_iou(place, thing), _overlap(thing, place), _overlap(place, thing)) < LARGEST_OVERLAP


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _iou(a: Box, b: Box) -> float:
    shared = _shared(a, b)
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def _overlap(thing: Box, place: Box) -> float:
    """The share of a thing that a place covers."""
    return _shared(thing, place) / _area(thing) if _area(thing) > 0 else 0.0


# ---- parts ------------------------------------------------------------------------------------------------------


def _first_exchange(sample: Sample) -> tuple[Turn, Turn]:
    turns = sample.turns[1:] if sample.turns[0].role == "system" else sample.turns
    if len(turns) < 2 or (turns[0].role, turns[1].role) != ("user", "assistant"):
        raise VlmtuneError(f"{_where(sample)}: negatives need a question and its reply; take them off this source.")
    return turns[0], turns[1]


def _before_text(turn: Turn) -> tuple[Part, ...]:
    """The image, and its name where it has one."""
    return tuple(part for part in turn.parts if isinstance(part, (ImageRef, ImageName)))


def _filled(template: str, name: str, region: Boxes) -> tuple[Part, ...]:
    parts = []
    for n, text in enumerate(template.replace("{name}", name).split("{region}")):
        parts += [region] if n else []
        parts += [Text(text)] if text else []
    return tuple(parts)


def _where(sample: Sample) -> str:
    return f"{sample.origin} (sample {sample.id})" if sample.origin else f"sample {sample.id}"
