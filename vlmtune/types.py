"""The vocabulary every part of vlmtune shares: conversations, token kinds, encoded samples, batches.

Level 0: torch and the standard library only. Shapes use B (samples), T (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlmtune.errors import VlmtuneError as VlmtuneError


class Kind(IntEnum):
    """What a token is. Every token of a sample inherits exactly one kind from the span it came from (SPEC B3)."""

    PADDING = -1
    SPECIAL = 0  # role markers and other text the chat template writes
    INSTRUCTION = 1  # what system and user say
    IMAGE = 2  # image placeholders and their frame tokens
    RESPONSE = 3  # an assistant reply and its end-of-turn token
    BOX = 4  # a box or point inside an assistant reply
    ENTITY = 5  # a key entity inside an assistant reply
    UNTRAINED = 6  # an assistant reply marked `train: false`


SUPERVISED = (Kind.RESPONSE, Kind.BOX, Kind.ENTITY)

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright original image."""

Point = tuple[float, float]
"""x, y in pixels of the upright original image."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """Plain text. Whatever it looks like ("<image>", "<|im_end|>"), it stays text.

    entity: a key entity of the reply it stands in; a part of the text before and behind it, not a text of its own.
    """

    text: str
    entity: bool = False


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: a file, or the encoded bytes of one.

    id: the name under which the conversation refers to it; it is written before the image (SPEC A5).
    """

    source: Path | bytes
    id: str | None = None


@dataclass(frozen=True)
class ImageName:
    """A reference, in text, to the image with this id; it is written as the name before that image is."""

    id: str

    @property
    def text(self) -> str:
        return f'<image id="{self.id}">'


@dataclass(frozen=True)
class Boxes:
    """Boxes in upright original pixels of image number `image` of the sample; rendered in the model's own convention.

    `region=True` is a place the text refers to (usually in a question), False an answer. masks: of each box, an image
    file or the bytes of one, as large as the image, that is not 0 where the object is; none, or one per box.
    """

    boxes: tuple[Box, ...]
    region: bool = False
    image: int = 0
    masks: tuple[Path | bytes, ...] = ()


@dataclass(frozen=True)
class Points:
    """Points in upright original pixels of image number `image` of the sample; rendered in the model's own convention.

    `click=True` is where somebody acts (presses, taps), False a place that is only named.
    """

    points: tuple[Point, ...]
    click: bool = False
    image: int = 0


Part = Text | ImageRef | ImageName | Boxes | Points


def _is_empty(part: Part) -> bool:
    match part:
        case Text(text):
            return not text.strip()
        case Boxes(places) | Points(places):
            return not places
        case ImageRef() | ImageName():
            return False


@dataclass(frozen=True)
class Turn:
    """train: False for a reply that is only context; cut: the reply goes on beyond its last part (SPEC G2)."""

    role: Role
    parts: tuple[Part, ...]
    train: bool = True
    cut: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it but space. An image is something, an empty list of boxes is not."""
        return all(_is_empty(part) for part in self.parts)


@dataclass(frozen=True)
class Sample:
    """One conversation. `origin` says where it came from ("train.jsonl:17") and appears in every complaint.

    max_pixels: shrink each of its images to at most so many (None: what the processor is set to).
    """

    id: str
    turns: tuple[Turn, ...]
    task: str = "default"
    origin: str = ""
    meta: dict = field(default_factory=dict)
    max_pixels: int | None = None

    @property
    def images(self) -> list[ImageRef]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef)]


@dataclass(frozen=True)
class ImageGeometry:
    """How an original image of width x height pixels came to the model's canvas of resized_width x resized_height.

    The canvas is what the vision tower gets, after resize, crop and padding. placed: the rectangle of the canvas, in
    canvas pixels, that the whole original covers. It sticks out of the canvas where the image was cropped and leaves a
    margin where it was padded. None: it is the canvas.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    placed: Box | None = None

    @property
    def visible(self) -> Box:
        """The part of the original that is on the canvas, in original pixels."""
        left, top = self.to_original(0.0, 0.0)
        right, bottom = self.to_original(1.0, 1.0)
        return max(left, 0.0), max(top, 0.0), min(right, float(self.width)), min(bottom, float(self.height))

    def to_canvas(self, x: float, y: float) -> Point:
        """Original pixels -> fractions of the canvas: 0 to 1 where it can be seen."""
        if self.placed is None:
            return x / self.width, y / self.height
        left, top, right, bottom = self.placed
        return (
            (left + x * (right - left) / self.width) / self.resized_width,
            (top + y * (bottom - top) / self.height) / self.resized_height,
        )

    def to_original(self, u: float, v: float) -> Point:
        """Fractions of the canvas -> original pixels."""
        if self.placed is None:
            return u * self.width, v * self.height
        left, top, right, bottom = self.placed
        return (
            (u * self.resized_width - left) * self.width / (right - left),
            (v * self.resized_height - top) * self.height / (bottom - top),
        )


PER_PATCH = 8
"""Cells of a mask target along each side of a patch."""


@dataclass(frozen=True, eq=False)
class Region:
    """A box of a sample, as the read-outs of `models.readouts` see it.

    at: the token whose state is read: in a reply (is_answer) the one before the first number of the box, elsewhere the
    last one of the box. box: float32[4], x1 y1 x2 y2 in fractions of the canvas. list_of: which list of boxes of the
    sample it stands in. image: the one it is in. patches: int64[rows, columns], the tokens of that image (of its
    overview, where it is in tiles); None where they are not one grid. mask: float32[rows x PER_PATCH,
    columns x PER_PATCH], the share of each cell of the canvas that is covered, or None.
    """

    at: int
    box: Tensor
    list_of: int
    is_answer: bool
    image: int = 0
    patches: Tensor | None = None
    mask: Tensor | None = None

    def shifted(self, by: int) -> Region:
        """The same with `by` tokens in front."""
        patches = None if self.patches is None else self.patches + by
        return replace(self, at=self.at + by, patches=patches)

    def to(self, device: torch.device) -> Region:
        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return replace(self, box=moved(self.box), patches=moved(self.patches), mask=moved(self.mask))


@dataclass
class ImageInput:
    """One image whose tower features may be known already. key: names the image as the model sees it; pixels: the image
    processor's tensors, empty where `features` are there: what `models.trunk.tower_features` made of it."""

    key: str
    pixels: dict[str, Tensor]
    features: dict[str, Tensor] | None = None

    def to(self, device: torch.device) -> ImageInput:
        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

        return ImageInput(self.key, moved(self.pixels), None if self.features is None else moved(self.features))


@dataclass
class Encoded:
    """One sample, ready for a batch.

    ids int64[T]; kinds int8[T] (`Kind`); turn int16[T] (index of the turn a token belongs to, -1 = template);
    pixels: the image processor's own tensors for all images of this sample; token_extras: per-token model inputs
    besides ids (for example mm_token_type_ids int64[T]); geometry: one per image; regions: where read-outs look;
    images: in place of pixels, where features of the tower are kept.
    """

    id: str
    task: str
    ids: Tensor
    kinds: Tensor
    turn: Tensor
    pixels: dict[str, Tensor]
    token_extras: dict[str, Tensor]
    geometry: list[ImageGeometry]
    origin: str = ""
    regions: list[Region] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def supervised(self) -> Tensor:
        """bool[T]: tokens that carry loss."""
        return supervised_mask(self.kinds)


@dataclass
class Batch:
    """One micro-batch, right-padded.

    inputs: keyword arguments of the model's forward (input_ids int64[B, T], attention_mask int64[B, T], pixels …);
    kinds int8[B, T] with `Kind.PADDING` where there is no token; regions: (row, region), where read-outs look; images:
    of all samples in order, in place of pixels among the inputs, where features of the tower are kept; fillers: how
    many rows at the end are no samples, and only have the vision tower run; contrast: the rows `contrasted` once more,
    with pictures that are not theirs; numbers: of every sample in the run, where somebody asks for the loss of each.
    """

    inputs: dict[str, Tensor]
    kinds: Tensor
    tasks: list[str]
    sample_ids: list[str]
    regions: list[tuple[int, Region]] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)
    fillers: int = 0
    contrast: Batch | None = None
    contrasted: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many samples it has."""
        return len(self.sample_ids) - self.fillers

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        regions = [(row, region.to(device)) for row, region in self.regions]
        images = [image.to(device) for image in self.images]
        kinds = self.kinds.to(device, non_blocking=True)
        contrast = None if self.contrast is None else self.contrast.to(device)
        return replace(self, inputs=inputs, kinds=kinds, regions=regions, images=images, contrast=contrast)


def supervised_mask(kinds: Tensor) -> Tensor:
    """bool of the same shape as `kinds`: True where the token carries loss."""
    mask = torch.zeros_like(kinds, dtype=torch.bool)
    for kind in SUPERVISED:
        mask |= kinds == kind
    return mask


def token_weights(kinds: Tensor, table: Tensor) -> Tensor:
    """float32 of the same shape as `kinds`: the weight of each token. table: float32[len(Kind)], kind k at k + 1."""
    return table.to(kinds.device, non_blocking=True)[kinds.long() + 1]


Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check saw: its verdict, what was looked at, the figure, and what to do (DESIGN idea 5)."""

    level: Level
    what: str
    evidence: str
    remedy: str = ""
