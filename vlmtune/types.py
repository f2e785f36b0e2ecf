"""The vocabulary every part of vlmtune shares: conversations, token kinds, encoded samples, batches.

Level 0: torch and the standard library only. Shapes use B (samples), T (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """Plain text. Whatever it looks like ("<image>", "<|im_end|>"), it stays text."""

    text: str


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: a file, or the encoded bytes of one.

    max_pixels: shrink this one to at most so many (None: what the processor is set to).
    """

    source: Path | bytes
    id: str | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Boxes:
    """Boxes in upright original pixels of image number `image` of the sample; rendered in the model's own convention.

    `region=True` is a place the text refers to (usually in a question), False an answer.
    """

    boxes: tuple[Box, ...]
    region: bool = False
    image: int = 0


Part = Text | ImageRef | Boxes


@dataclass(frozen=True)
class Turn:
    """train: False for a reply that is only context; cut: the reply goes on beyond its last part (SPEC G2)."""

    role: Role
    parts: tuple[Part, ...]
    train: bool = True
    cut: bool = False


@dataclass(frozen=True)
class Sample:
    """One conversation. `origin` says where it came from ("train.jsonl:17") and appears in every complaint."""

    id: str
    turns: tuple[Turn, ...]
    task: str = "default"
    origin: str = ""
    meta: dict = field(default_factory=dict)

    @property
    def images(self) -> list[ImageRef]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef)]


@dataclass(frozen=True)
class ImageGeometry:
    """How an original image became the pixels the model sees (widths and heights in pixels)."""

    width: int
    height: int
    resized_width: int
    resized_height: int


@dataclass
class Encoded:
    """One sample, ready for a batch.

    ids int64[T]; kinds int8[T] (`Kind`); turn int16[T] (index of the turn a token belongs to, -1 = template);
    pixels: the image processor's own tensors for all images of this sample; token_extras: per-token model inputs
    besides ids (for example mm_token_type_ids int64[T]); geometry: one per image.
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

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def supervised(self) -> Tensor:
        """bool[T]: tokens that carry loss."""
        return supervised_mask(self.kinds)


@dataclass
class Batch:
    """One micro-batch, right-padded.

    inputs: keyword arguments of the model's forward (input_ids int64[B, T], attention_mask int64[B, T], pixels …);
    kinds int8[B, T] with `Kind.PADDING` where there is no token.
    """

    inputs: dict[str, Tensor]
    kinds: Tensor
    tasks: list[str]
    sample_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(inputs, self.kinds.to(device, non_blocking=True), self.tasks, self.sample_ids)


def supervised_mask(kinds: Tensor) -> Tensor:
    """bool of the same shape as `kinds`: True where the token carries loss."""
    mask = torch.zeros_like(kinds, dtype=torch.bool)
    for kind in SUPERVISED:
        mask |= kinds == kind
    return mask


Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check saw: its verdict, what was looked at, the figure, and what to do (DESIGN idea 5)."""

    level: Level
    what: str
    evidence: str
    remedy: str = ""
