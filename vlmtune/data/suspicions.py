"""What in a single row is allowed and yet hardly ever meant: broken text, markers typed as text, boxes that are no
pixels, pictures that show nothing (SPEC H1).

Each function yields (code of `check.CODES`, sentence). Boxes that many rows have wrong in the same way are judged in
`habits`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from PIL import Image

from vlmtune.types import Boxes, Sample, Text

Found = Iterator[tuple[str, str]]

TEMPLATES = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "<|endoftext|>", "<|eot_id|>")
"""Markers of common chat templates. Text that holds one was rendered before, for whatever model it was."""

# UTF-8 read as Windows-1252: the first byte of a letter with an accent (Ã, Â), of a quotation mark (â€) or of a
# pictograph (ðŸ), and a byte that can follow it; and what stands for bytes that no decoder could read
_BROKEN = re.compile("Ã[\u0080-\u00bf\u0152-\u2122]|Â[\u0080-\u00bf]|â€[\u0080-\u00bf\u0152-\u2122]|ðŸ|\ufffd")
_NUMBER = r"\s*\d+(?:\.\d+)?\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]|\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
EXCERPT = 20  # characters on either side


def text_suspicions(sample: Sample, markers: Collection[str], where: str) -> Found:
    """markers: the control tokens of the model's tokenizer, as text. One finding of each kind, the first of it."""
    texts = [
        (turn.role, part.text) for turn in sample.turns for part in turn.parts if isinstance(part, Text) and part.text
    ]
    for _, text in texts:
        if match := _BROKEN.search(text):
            yield (
                "text_broken",
                f"{where}: {_excerpt(text, match.start(), match.end())} is UTF-8 that was read as another encoding; "
                "write the file anew from its source as UTF-8.",
            )
            break
    known = sorted({*markers, *TEMPLATES}, key=len, reverse=True)
    for role, text in texts:
        marker = next((marker for marker in known if marker in text), None)
        if marker is not None:
            place = text.index(marker)
            yield (
                "text_marker",
                f"{where}: {_excerpt(text, place, place + len(marker))} in the text of {role} looks like the marker "
                f"{marker}, but stays text: the template writes its own; remove it.",
            )
            break
    for role, text in texts:
        if role == "assistant" and sample.images and (match := _BOX.search(text)):
            yield (
                "box_text",
                f"{where}: {_excerpt(text, match.start(), match.end())} in a reply looks like a box, and as text it is "
                "not brought to the model's coordinates; write a box part, in pixels.",
            )
            break


def box_suspicions(sample: Sample, where: str) -> Found:
    """Boxes in fractions."""
    boxes = [box for turn in sample.turns for part in turn.parts if isinstance(part, Boxes) for box in part.boxes]
    if boxes and all(max(box) <= 1.0 and box[2] > box[0] and box[3] > box[1] for box in boxes):
        yield (
            "box_fraction",
            f"{where}: box {list(boxes[0])} is smaller than a pixel: it seems to be in fractions of the image; "
            "multiply by its width and height.",
        )


def image_suspicions(image: Image.Image, what: str) -> Found:
    """image: decoded, RGB."""
    extrema = image.getextrema()
    if all(low == high for low, high in extrema):
        colour = tuple(low for low, _ in extrema)
        yield "image_blank", f"{what} is of one colour, {colour}: it shows nothing; look at the file."


def _excerpt(text: str, start: int, end: int) -> str:
    cut = text[max(0, start - EXCERPT) : end + EXCERPT].replace("\n", "↵")
    return repr(("…" if start > EXCERPT else "") + cut + ("…" if end + EXCERPT < len(text) else ""))
