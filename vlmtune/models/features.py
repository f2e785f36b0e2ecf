"""What the vision tower and the projector make of one image, as grids of patch features: what probes read (SPEC A7).

The tower's features are those that the projector takes in, its own layers and selection applied; a hook sees both
sides of it while transformers' own `get_image_features` runs. Shapes: R rows and C columns of patches, D channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from vlmtune.models.anatomy import anatomy_of, part_modules
from vlmtune.types import Box, ImageGeometry, VlmtuneError

Stage = Literal["vision", "projector"]
STAGES: tuple[Stage, ...] = ("vision", "projector")


@dataclass(frozen=True)
class ImageFeatures:
    """vision, projector: float32[R, C, D] of one image, row by row; the two grids may differ in every size."""

    vision: Tensor
    projector: Tensor


@torch.inference_mode()
def image_features(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], canvas: ImageGeometry, overview: Literal["first", "last"]
) -> ImageFeatures:
    """The features of one image. inputs: what the model's forward takes for it (tokens are left out here).

    canvas: how the image came to the model. overview: which of several tiles shows all of the image; the others are not
    read. A resampler's queries are taken as a square, and so is everything of which more is not known; a class token
    in front is left out. Raises VlmtuneError for features that form no grid.
    """
    anatomy = anatomy_of(model)
    seen: list[tuple[Tensor, Tensor]] = []
    projector = model.get_submodule(anatomy.projector[0])
    hook = projector.register_forward_hook(lambda module, taken, made: seen.append((taken[0], made)))
    pixels = {name: value for name, value in inputs.items() if name not in _OF_TOKENS}
    try:
        model.base_model.get_image_features(**pixels)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise VlmtuneError(
            f"the projector {anatomy.projector[0]} of {anatomy.model_type} ran {len(seen)} times for one image; "
            "its features cannot be told apart."
        )
    tower = model.get_submodule(anatomy.vision)
    if "image_grid_thw" in pixels:
        return ImageFeatures(*_packed(tower, *seen[0], pixels["image_grid_thw"]))
    return ImageFeatures(*(_tiled(side, canvas, overview) for side in seen[0]))


_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def pooled(grid: Tensor, cells: int) -> Tensor:
    """float32[cells * cells * D] of float32[R, C, D]: means over a coarse grid, so that images of any size compare."""
    return F.adaptive_avg_pool2d(grid.permute(2, 0, 1), cells).permute(1, 2, 0).flatten()


def pooled_under(grid: Tensor, box: Box) -> Tensor | None:
    """float32[D] of float32[R, C, D]: the mean under a box, each patch weighted by how much of it is covered.

    box: x1 y1 x2 y2 in fractions of the canvas. None where it covers nothing of it.
    """
    x1, y1, x2, y2 = box
    down, across = _covered(y1, y2, grid.shape[0]), _covered(x1, x2, grid.shape[1])
    weights = down[:, None] * across[None, :]
    total = weights.sum()
    return None if total <= 0 else (grid.double() * weights[..., None]).sum((0, 1)).div(total).float()


def stage_digest(model: PreTrainedModel, stage: Stage) -> str:
    """sha256 of all that the features of a stage depend on: names, shapes and values of the weights of the part and of
    those before it, buffers and adapters included. Equal for two models whose features are equal bit for bit."""
    digest = hashlib.sha256()
    for part in STAGES[: STAGES.index(stage) + 1]:
        for number, module in enumerate(part_modules(model)[part]):
            for name, value in module.state_dict().items():
                if isinstance(value, Tensor):  # quantised modules keep settings there too
                    digest.update(f"{part} {number} {name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _covered(start: float, end: float, cells: int) -> Tensor:
    """float64[cells]: the length of each cell, as a fraction of one, between two fractions of all of them."""
    edges = torch.arange(cells + 1, dtype=torch.double)
    return (edges[1:].clamp(max=end * cells) - edges[:-1].clamp(min=start * cells)).clamp(min=0)


def _packed(tower: nn.Module, vision: Tensor, projector: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Of the Qwen families: patches in groups of merge x merge, each of which the merger makes one token of."""
    merge = tower.spatial_merge_size
    if hasattr(tower, "window_size"):  # Qwen2.5-VL: groups in the order of its attention windows
        index, _ = get_vision_window_index(
            sizes, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        order = torch.argsort(index).to(vision.device)
        vision = vision.view(len(order), merge * merge, -1)[order].flatten(0, 1)
        projector = projector[order]
    _, height, width = sizes[0].tolist()
    rows, columns = height // merge, width // merge
    blocks = vision.view(rows, columns, merge, merge, -1).transpose(1, 2)
    return blocks.reshape(height, width, -1).float().cpu(), projector.view(rows, columns, -1).float().cpu()


def _tiled(features: Tensor, canvas: ImageGeometry, overview: Literal["first", "last"]) -> Tensor:
    """float32[R, C, D] of float[tiles, N, D]."""
    tile = features[0 if overview == "first" else -1].float().cpu()
    for patches in (tile, tile[1:]):  # with a class token in front, as LLaVA's strategy "full" leaves it
        columns = round(math.sqrt(len(patches) * canvas.resized_width / canvas.resized_height))
        for count in (columns, math.isqrt(len(patches))):
            if count and len(patches) % count == 0 and _fits(len(patches) // count, count, canvas):
                return patches.view(len(patches) // count, count, -1)
    raise VlmtuneError(
        f"{len(tile)} patch features of an image of {canvas.resized_width}x{canvas.resized_height} pixels form no "
        "grid; a probe needs one."
    )


def _fits(rows: int, columns: int, canvas: ImageGeometry) -> bool:
    return rows == columns or rows * canvas.resized_width == columns * canvas.resized_height
