"""Held-out samples as the run page shows them: the picture, its boxes, and the answers over time."""

from __future__ import annotations

import base64
import mimetypes
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.types import Box

ON_THE_WAY = 8  # answers between the first and the last that are shown


@dataclass(frozen=True)
class Answer:
    """What the model said at a moment ("before", "step 40", "after"). text "": it said nothing."""

    moment: str
    text: str
    is_right: bool
    boxes: list[Box]


@dataclass(frozen=True)
class Picture:
    """A sample of the gallery; rectangles are (x, y, width, height) in pixels of the picture.

    before, after: the first and the newest answer, None where it was not asked; on_the_way: between them.
    """

    uri: str | None
    width: float
    height: float
    group: str
    task: str
    question: str
    reference: str
    true: list[Box]
    before: Answer | None
    after: Answer | None
    on_the_way: list[Answer]


def pictures_of(
    samples: Sequence[Mapping[str, Any]], answered: Sequence[Mapping[str, Any]], folder: Path
) -> list[Picture]:
    """samples: of samples.json; answered: records of kind "samples", oldest first; folder: of the run."""
    return [
        _picture(sample, [(record["step"], _nth(record.get("answers"), number)) for record in answered], folder)
        for number, sample in enumerate(samples)
    ]


def frame_of(pictures: Sequence[Picture]) -> float:
    """Width / height of the frame around every picture, so that rows line up: the median, unless that is extreme."""
    ratio = statistics.median([picture.width / picture.height for picture in pictures]) if pictures else 1.0
    return round(min(max(ratio, 0.8), 1.6), 3)


def boxes_as_rectangles(boxes: Iterable[Box] | None) -> list[Box]:
    """x1, y1, x2, y2 -> x, y, width, height as SVG wants it; a box without area keeps a visible pixel."""
    rectangles = []
    for box in boxes or []:
        x1, y1, x2, y2 = (float(value) for value in box)
        rectangles.append((x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)))
    return rectangles


def _picture(sample: Mapping[str, Any], way: list[tuple[int, Mapping | None]], folder: Path) -> Picture:
    reference = str(sample.get("reference") or "")

    def answer(moment: str, text: Any, boxes: Iterable[Box] | None) -> Answer | None:
        if text is None:
            return None
        return Answer(moment, str(text), str(text).split() == reference.split(), boxes_as_rectangles(boxes))

    before, after = (answer(name, sample.get(name), sample.get(f"boxes_{name}")) for name in ("before", "after"))
    between = [answer(f"step {step}", said.get("reply"), said.get("boxes")) for step, said in way if said]
    between = [said for said in between if said is not None]
    if after is None and between:
        after = between.pop()
    return Picture(
        uri=_data_uri(str(sample.get("image") or ""), folder),
        width=float(sample.get("width") or 1),
        height=float(sample.get("height") or 1),
        group=str(sample.get("group") or ""),
        task=str(sample.get("task") or ""),
        question=str(sample.get("question") or ""),
        reference=reference,
        true=boxes_as_rectangles(sample.get("boxes_true")),
        before=before,
        after=after,
        on_the_way=_spread(between),
    )


def _spread(answers: list[Answer]) -> list[Answer]:
    """At most ON_THE_WAY of them, evenly."""
    count = min(ON_THE_WAY, len(answers))
    return [answers[(2 * n + 1) * len(answers) // (2 * count)] for n in range(count)]


def _nth(answers: Sequence[Any] | None, number: int) -> Mapping | None:
    return answers[number] if answers and number < len(answers) else None


def _data_uri(image: str, folder: Path) -> str | None:
    """The picture itself, never a reference to it; None when it is not a file of this run."""
    if image.startswith("data:image/"):
        return image
    path = (folder / image).resolve()
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not kind.startswith("image/") or not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
