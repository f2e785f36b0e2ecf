"""What the read-outs see: masks and boxes of regions, and how well they fit (SPEC B10, B12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.regions import original_mask
from vlmtune.evaluate.boxes import iou
from vlmtune.losses.referring import patches_at, states_at
from vlmtune.models.readouts import readouts_of
from vlmtune.types import Batch, ImageGeometry, Region, Sample, VlmtuneError

INSIDE = 0.5  # of a probability, or of the share of a cell that a mask covers


@dataclass(frozen=True)
class RegionScore:
    """What one region adds to a metric, which is Σ value / Σ weight over regions."""

    task: str
    metric: str
    value: float
    weight: float


def region_scores(
    hidden: Tensor, readouts: nn.ModuleDict, batch: Batch, geometry: Sequence[Sequence[ImageGeometry]]
) -> list[RegionScore]:
    """Of every region: "head_iou" of the box head's box, "mask_iou" and "mask_oiou" where there is a mask.

    hidden: float[B, T, D]; geometry: of the images of every row. All are intersection over union on the canvas, masks
    in cells of 1/PER_PATCH patch. The first two are means over regions; "mask_oiou" is the sum of all intersections
    over that of all unions, in original pixels, as RefCOCO's overall (cumulative) IoU: large objects count more.
    """
    scores = []
    for row, region in batch.regions:
        one, task = [(row, region)], batch.tasks[row]
        if "box" in readouts:
            box = readouts["box"](states_at(hidden, one))
            scores.append(RegionScore(task, "head_iou", iou(tuple(box[0].tolist()), tuple(region.box.tolist())), 1.0))
        if "mask" in readouts and region.mask is not None:
            said, true = mask_of(hidden, readouts, row, region) > INSIDE, covered_cells(region.mask)
            shared, union = int((said & true).sum()), int((said | true).sum())
            scores.append(RegionScore(task, "mask_iou", shared / union if union else 1.0, 1.0))
            pixels = _pixels_of_a_cell(geometry[row][region.image], true.numel())
            scores.append(RegionScore(task, "mask_oiou", shared * pixels, union * pixels))
    return scores


def covered_cells(mask: Tensor) -> Tensor:
    """bool of the same shape: cells of which more than half is covered; of an object smaller than that, those of which
    most is. mask: the share of each cell."""
    inside = mask > INSIDE
    return inside if bool(inside.any()) else (mask == mask.max()) & (mask > 0)


def _pixels_of_a_cell(geometry: ImageGeometry, cells: int) -> float:
    """The area of one of the cells of a canvas, in pixels of the original."""
    (left, top), (right, bottom) = geometry.to_original(0.0, 0.0), geometry.to_original(1.0, 1.0)
    return (right - left) * (bottom - top) / cells


def mask_of(hidden: Tensor, readouts: nn.ModuleDict, row: int, region: Region) -> Tensor:
    """float32[rows x PER_PATCH, columns x PER_PATCH]: the probability of each cell to be in the region."""
    one = [(row, region)]
    return readouts["mask"](states_at(hidden, one), patches_at(hidden, one))[0].float().sigmoid()


@torch.inference_mode()
def masks_of_sample(model: nn.Module, encoder: Encoder, sample: Sample) -> list[Image.Image]:
    """The mask of every box of a conversation, in its order: mode L, 0 or 255, as large as its image.

    Raises VlmtuneError for a model without a mask head, and images that are cut into tiles.
    """
    readouts = readouts_of(model)
    if readouts is None or "mask" not in readouts:
        raise VlmtuneError("this model has no mask head; train one with loss.referring.")
    replied = any(turn.role == "assistant" for turn in sample.turns)
    encoded = encoder.encode(sample) if replied else encoder.encode_prompt(sample)
    if any(region.patches is None for region in encoded.regions):
        raise VlmtuneError(f"{sample.origin}: the image was cut into tiles; masks need one grid of patches.")
    batch = collate([encoded], encoder.pad_token_id).to(model.device)
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    geometry = [encoded.geometry[region.image] for region in encoded.regions]
    probabilities = [mask_of(hidden, readouts, row, region) for row, region in batch.regions]
    return [original_mask(p.cpu() > INSIDE, g) for p, g in zip(probabilities, geometry, strict=True)]
