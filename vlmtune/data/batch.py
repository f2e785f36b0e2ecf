"""Encoded samples of unequal length become one padded micro-batch; micro-batches as tensors with names, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmtune.types import Batch, Encoded, Kind, Region


def collate(
    samples: Sequence[Encoded], pad_token_id: int, side: Literal["right", "left"] = "right", fillers: int = 0
) -> Batch:
    """Pad to the longest sample: right for training, left for generation. fillers: see Batch.

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
    images = [image for sample in samples for image in sample.images]
    return Batch(inputs, kinds, [s.task for s in samples], [s.id for s in samples], regions, images, fillers)


def with_contrast(batch: Batch, others: Sequence[Encoded | None], pad_token_id: int) -> Batch:
    """The micro-batch with its contrast. others: of each row, the same sample with other pictures, or None."""
    rows = [row for row, other in enumerate(others) if other is not None]
    if not rows:
        return batch
    return replace(batch, contrast=collate([others[row] for row in rows], pad_token_id), contrasted=rows)


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


def tensors_of(micro_batches: Sequence[Batch]) -> tuple[dict[str, Tensor], list[dict]]:
    """Every tensor by name, ready for safetensors, and what is not a tensor as JSON values. Inverse: `batches_of`."""
    tensors: dict[str, Tensor] = {}
    described = []
    for number, batch in enumerate(micro_batches):
        tensors |= {f"{number}/inputs/{name}": value for name, value in batch.inputs.items()}
        tensors[f"{number}/kinds"] = batch.kinds
        contrast = None
        if batch.contrast is not None:
            parts, (contrast,) = tensors_of([batch.contrast])
            tensors |= {f"{number}/contrast/{name}": value for name, value in parts.items()}
        regions = []
        for place, (row, region) in enumerate(batch.regions):
            parts = {name: getattr(region, name) for name in ("box", "patches", "mask")}
            tensors |= {f"{number}/regions/{place}/{name}": v for name, v in parts.items() if v is not None}
            plain = {name: getattr(region, name) for name in ("at", "list_of", "is_answer", "image")}
            regions.append({"row": row, **plain})
        described.append(
            {
                "samples": batch.sample_ids, "tasks": batch.tasks, "regions": regions, "fillers": batch.fillers,
                "contrast": contrast, "contrasted": batch.contrasted,
            }
        )  # fmt: skip
    # cloned: samples of one batch may share memory, which safetensors refuses
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, described


def batches_of(tensors: Mapping[str, Tensor], described: Sequence[Mapping]) -> list[Batch]:
    """Exactly the micro-batches that `tensors_of` was given."""
    batches = []
    for number, batch in enumerate(described):
        start = f"{number}/inputs/"
        inputs = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        regions = []
        for place, plain in enumerate(batch["regions"]):
            parts = {name: tensors.get(f"{number}/regions/{place}/{name}") for name in ("box", "patches", "mask")}
            regions.append((plain["row"], Region(**{k: v for k, v in plain.items() if k != "row"}, **parts)))
        contrast, begin = batch.get("contrast"), f"{number}/contrast/"
        if contrast is not None:
            parts = {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
            (contrast,) = batches_of(parts, [contrast])
        # what is absent was written before there were any
        further = {"fillers": batch.get("fillers", 0), "contrast": contrast, "contrasted": batch.get("contrasted", [])}
        kinds = tensors[f"{number}/kinds"]
        batches.append(Batch(inputs, kinds, batch["tasks"], batch["samples"], regions, **further))
    return batches
