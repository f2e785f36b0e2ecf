"""The checks of one row of a data file: read it, decode its images, encode it, and say what is wrong (SPEC H1).

A check finds; it mends nothing and never stops at a bad row. Every finding has a code of `CODES`. What rows have in
common with each other is found in `duplicates`, from the digests that are taken here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vlmtune.data.encode import Encoder
from vlmtune.data.habits import Traits, asked_digests, traits_of
from vlmtune.data.images import load_image
from vlmtune.data.loader import start_worker
from vlmtune.data.sources import FileSource
from vlmtune.data.suspicions import box_suspicions, image_suspicions, text_suspicions
from vlmtune.types import Boxes, ImageRef, Sample, VlmtuneError

Severity = Literal["error", "warning"]
CHUNK = 32  # rows that a worker checks between two reports
DIGEST = 16  # bytes
EXTREME_ASPECT = 50  # longer side : shorter side; lines of text reach 30
TINY_SIDE = 14  # pixels: less than one patch of most vision towers

CODES: dict[str, tuple[Severity, str]] = {
    "unreadable": ("error", "the row is not a conversation in a known format"),
    "role_unknown": ("error", "a message has a role that is not system, user or assistant"),
    "reply_empty": ("error", "there is no reply to learn from, or one that is empty"),
    "image_missing": ("error", "an image file is not there"),
    "image_empty": ("error", "an image has zero bytes"),
    "image_corrupt": ("error", "an image cannot be decoded to its end"),
    "image_bomb": ("error", "an image has more pixels than any honest picture"),
    "box_order": ("error", "a box is not two corners: x1 <= x2 and y1 <= y2"),
    "box_fraction": ("error", "a box in fractions of the image, where pixels are meant"),
    "boxes_turned": ("error", "boxes of a source are those of pictures before EXIF turned them"),
    "boxes_swapped": ("error", "boxes of a source have x and y exchanged"),
    "boxes_thousandths": ("error", "boxes of a source are thousandths, where pixels are meant"),
    "boxes_scaled": ("error", "boxes of a source are those of a copy of another size"),
    "box_outside": ("error", "a box or point is not inside its image"),
    "image_in_reply": ("error", "an image stands in a reply"),
    "unencodable": ("error", "the model's processor, template or coordinates refuse the sample"),
    "too_long": ("error", "the sample has more tokens than data.max_length"),
    "leak": ("error", "a held-out sample is in the training data too"),
    "limit_of_sorted": ("warning", "limit takes the first rows of a file that is sorted by task"),
    "boxes_corner": ("warning", "all boxes of a source lie in the upper left corner"),
    "roles_swapped": ("warning", "the roles of a source seem to be exchanged"),
    "replies_alike": ("warning", "nearly all replies of a source are the same"),
    "reply_told": ("warning", "questions of a source hold their own replies"),
    "contradiction": ("warning", "the same question about the same pictures has another short reply"),
    "text_broken": ("warning", "text was read in another encoding"),
    "text_marker": ("warning", "text looks like a control token"),
    "box_text": ("warning", "a box stands in a reply as text"),
    "image_blank": ("warning", "an image is of one colour"),
    "leak_image": ("warning", "a held-out image is in the training data too, with another conversation"),
    "duplicate_row": ("warning", "the same conversation about the same pixels twice"),
    "duplicate_image": ("warning", "the same pixels in two files"),
    "image_aspect": ("warning", f"an image is more than {EXTREME_ASPECT} times as long as wide"),
    "image_tiny": ("warning", f"a side of an image has less than {TINY_SIDE} pixels"),
    "box_flat": ("warning", "a box has no width or no height"),
}
"""code -> (severity, what it means). An error stops training, or makes it learn or measure something wrong. Where a
cause and what it leads to are both found, the cause comes first."""

OF_SOURCES = ("boxes_turned", "boxes_swapped", "boxes_thousandths", "boxes_scaled", "leak")
"""Errors that are no matter of a single row, so that none can be left out for them."""


@dataclass(frozen=True)
class RowFinding:
    """One thing that is wrong with one row.

    source: name of the source; row: counted from 0; origin: "train.jsonl:17"; id: of the sample, None where the row
    could not be read so far; sentence: what, where, remedy.
    """

    code: str
    severity: Severity
    source: str
    row: int
    origin: str
    id: str | None
    sentence: str


@dataclass(frozen=True)
class CheckedImage:
    """An image that decoded. size: width, height; pixels: digest of them; file: digest of the path or encoded bytes."""

    size: tuple[int, int]
    pixels: bytes
    file: bytes


@dataclass(frozen=True)
class CheckedRow:
    """tokens: of the sample, images included, None if it cannot be encoded; content: digest of turns and pixels, None
    if an image or the row is unreadable; images: those that decoded; traits: for what rows have in common, asked:
    `habits.asked_digests`, both as content."""

    row: int
    findings: tuple[RowFinding, ...]
    tokens: int | None = None
    content: bytes | None = None
    images: tuple[CheckedImage, ...] = ()
    traits: Traits | None = None
    asked: bytes | None = None


@dataclass(frozen=True)
class RowCheck:
    """Checks the rows of one source. encoder: without a limit of length; max_length: the limit to compare with.

    refuses_overlong: whether training stops at a sample above it (data.on_overlong: error), or has a way with it.
    """

    source: FileSource
    name: str
    encoder: Encoder
    max_length: int | None = None
    refuses_overlong: bool = True

    def __call__(self, index: int) -> CheckedRow:
        """Raises nothing for a bad row: it comes back with its findings."""
        origin, sample_id = f"{self.source.name}, row {index + 1}", None
        try:
            row = self.source.row(index)
            origin = row.origin
            named = row.value.get("id") if isinstance(row.value, dict) else None
            sample_id = str(row.id if named is None else named)
            sample = self.source.parse(row)
        except VlmtuneError as error:
            return CheckedRow(index, (self._finding(index, origin, sample_id, error.code or "unreadable", str(error)),))
        return self._check_sample(index, sample)

    def _check_sample(self, index: int, sample: Sample) -> CheckedRow:
        found: list[tuple[str, str]] = []
        where = f"{sample.origin} (sample {sample.id})"
        decoded: list[Image.Image] = []
        images: list[CheckedImage] = []
        for number, reference in enumerate(sample.images, 1):
            try:
                image = load_image(reference.source, where)
            except VlmtuneError as error:
                found.append((error.code or "image_corrupt", str(error)))
                continue
            decoded.append(image)
            images.append(CheckedImage(image.size, _digest_of_pixels(image), _digest_of_file(reference)))
            what = f"{where}: image {number}{_called(reference)}"
            found += [*_shape_findings(image.size, what), *image_suspicions(image, what)]
        found += [*_flat_boxes(sample, where), *box_suspicions(sample, where)]
        found += text_suspicions(sample, self._markers, where)

        is_whole = len(decoded) == len(sample.images)
        tokens = content = traits = asked = None
        if is_whole:
            content = _digest_of_content(sample, images)
            traits = traits_of(sample, [image.size for image in images])
            asked = asked_digests(sample, [image.pixels for image in images])
            tokens, complaint = self._encode(sample, decoded, where)
            found += [complaint] if complaint else []
        if tokens is not None and self.max_length is not None and tokens > self.max_length:
            remedy = "training stops at it" if self.refuses_overlong else "it will be trimmed or left out"
            found.append(
                (
                    "too_long",
                    f"{where}: {tokens:,} tokens (images included) exceed data.max_length {self.max_length:,}; "
                    f"{remedy}: raise data.max_length, lower data.max_pixels or shorten the sample.",
                )
            )
        findings = tuple(self._finding(index, sample.origin, sample.id, *entry) for entry in found)
        return CheckedRow(index, findings, tokens, content, tuple(images), traits, asked)

    @cached_property
    def _markers(self) -> list[str]:
        """Control tokens of the tokenizer that nobody types by chance."""
        added = self.encoder.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and len(token.content) > 2]

    def _encode(
        self, sample: Sample, decoded: list[Image.Image], where: str
    ) -> tuple[int | None, tuple[str, str] | None]:
        """(tokens, None), or (None, (code, sentence)) for a sample that training could not encode."""
        try:
            return len(self.encoder.encode(sample, decoded)), None
        except VlmtuneError as error:
            return None, (error.code or "unencodable", str(error))
        except Exception as error:  # a processor of transformers may raise anything; the other rows are still checked
            kind = type(error).__name__
            return None, ("unencodable", f"{where}: the model's processor fails ({kind}: {error}); remove the sample.")

    def _finding(self, index: int, origin: str, sample_id: str | None, code: str, sentence: str) -> RowFinding:
        severity = CODES[code][0]
        if code == "too_long" and not self.refuses_overlong:
            severity = "warning"
        return RowFinding(code, severity, self.name, index, origin, sample_id, sentence)


def check_rows(check: RowCheck, workers: int = 0) -> Iterator[CheckedRow]:
    """Every row of the source in order, whatever the number of worker processes."""
    loader = DataLoader(
        _Chunks(check),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: what was counted before must not move the training RNG
    )
    for chunk in loader:
        yield from chunk


@dataclass(frozen=True)
class _Chunks(Dataset):
    check: RowCheck

    def __len__(self) -> int:
        return -(-self.check.source.size // CHUNK)

    def __getitem__(self, number: int) -> list[CheckedRow]:
        first = number * CHUNK
        return [self.check(row) for row in range(first, min(first + CHUNK, self.check.source.size))]


# ---- single checks ----------------------------------------------------------------------------------------------


def _shape_findings(size: tuple[int, int], what: str) -> list[tuple[str, str]]:
    """(code, sentence) of an image's width and height in pixels."""
    short, long = sorted(size)
    found = []
    if long > EXTREME_ASPECT * short:
        found.append(
            ("image_aspect", f"{what} has {size[0]}x{size[1]} pixels: little of it is left after the resize; crop it.")
        )
    if short < TINY_SIDE:
        found.append(
            ("image_tiny", f"{what} has {size[0]}x{size[1]} pixels, less than a patch; replace it by a larger one.")
        )
    return found


def _flat_boxes(sample: Sample, where: str) -> list[tuple[str, str]]:
    boxes = [box for turn in sample.turns for part in turn.parts if isinstance(part, Boxes) for box in part.boxes]
    flat = [box for box in boxes if box[0] == box[2] or box[1] == box[3]]
    return [
        ("box_flat", f"{where}: box {list(box)} has no area; correct it, or write a point.")
        for box in dict.fromkeys(flat)
    ]


def _called(reference: ImageRef) -> str:
    return f" ({reference.source})" if isinstance(reference.source, Path) else ""


# ---- digests ----------------------------------------------------------------------------------------------------


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _digest_of_pixels(image: Image.Image) -> bytes:
    """Of what training sees: two files of other formats may hold the same pixels."""
    return _digest(f"{image.width}x{image.height} ".encode(), image.tobytes())


def _digest_of_file(reference: ImageRef) -> bytes:
    source = reference.source
    return _digest(b"bytes ", source) if isinstance(source, bytes) else _digest(b"path ", str(source).encode())


def _digest_of_content(sample: Sample, images: list[CheckedImage]) -> bytes:
    """Of all that the model reads and learns: turns, parts and pixels; not of id, task and meta."""
    pixels = iter(images)
    turns = [
        [turn.role, turn.train, [next(pixels).pixels.hex() if isinstance(p, ImageRef) else repr(p) for p in turn.parts]]
        for turn in sample.turns
    ]
    return _digest(json.dumps(turns).encode())
