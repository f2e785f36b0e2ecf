"""Encoded samples of unequal length become one padded micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.types import Batch, Encoded, Kind


def collate(samples: Sequence[Encoded], pad_token_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad to the longest sample: right for training, left for generation.

    Padding is told by the attention mask and `Kind.PADDING`, never by the id: in many models pad == eos.
    Returns input_ids and attention_mask int64[B, T], kinds int8[B, T], pixels as the model wants them.
    """
    length = max(len(sample) for sample in samples)

    def pad(rows: list[Tensor], value: int) -> Tensor:
        def widths(row: Tensor) -> tuple[int, int]:
            missing = length - len(row)
            return (0, missing) if side == "right" else (missing, 0)

        return torch.stack([F.pad(row, widths(row), value=value) for row in rows])

    inputs = {
        "input_ids": pad([s.ids for s in samples], pad_token_id),
        "attention_mask": pad([torch.ones_like(s.ids) for s in samples], 0),
    }
    for name in samples[0].token_extras:
        inputs[name] = pad([s.token_extras[name] for s in samples], 0)
    inputs |= _collate_pixels([s.pixels for s in samples])
    kinds = pad([s.kinds for s in samples], int(Kind.PADDING))
    regions = [
        (row, region.shifted(length - len(sample) if side == "left" else 0))
        for row, sample in enumerate(samples)
        for region in sample.regions
    ]
    return Batch(inputs, kinds, [s.task for s in samples], [s.id for s in samples], regions)


def _collate_pixels(pixels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate image tensors over samples.

    Most families list images (or patches) along the first dimension. The SmolVLM family has one row per sample,
    [1, crops, 3, H, W]: crops (and heights, widths) are padded with zeros, which the model drops as empty images.
    """
    with_images = [p for p in pixels if p]
    if not with_images:
        return {}
    if with_images[0]["pixel_values"].dim() != 5:
        return {name: torch.cat([p[name] for p in with_images]) for name in with_images[0]}
    return {name: _stack_rows([p.get(name) for p in pixels]) for name in with_images[0]}


def _stack_rows(rows: list[Tensor | None]) -> Tensor:
    """[1, n_i, …] tensors of unequal shape (None for a sample without images) -> [B, max n, …], zero-filled."""
    present = [row for row in rows if row is not None]
    shape = [max(row.shape[d] for row in present) for d in range(1, present[0].dim())]
    out = present[0].new_zeros(len(rows), *shape)
    for index, row in enumerate(rows):
        if row is not None:
            out[(index, *(slice(0, size) for size in row.shape[1:]))] = row[0]
    return out
