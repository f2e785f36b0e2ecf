"""Squares of image tokens averaged into one: how a simple image gets a quarter of its tokens where every image has one
size (`data.complexity`).

What transformers' own `get_image_features` makes of an image, tower and projector included, is a grid of tokens; those
of a simple image are averaged over 2 x 2 neighbours, as a smaller image would have given them. The placeholder text has
as many tokens (`data.pictures`), and the model takes the result as `mm_encoder_outputs`. Gradients go through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.models.anatomy import anatomy_of
from vlmtune.types import Batch, VlmtuneError

OUTPUTS = "mm_encoder_outputs"
_FAMILIES = ("llava", "gemma3", "paligemma")
"""Those whose image tokens are rows of one square grid behind the projector."""


def require_mergeable(model: PreTrainedModel) -> None:
    """Raises VlmtuneError for a family whose image tokens are no grid of one size."""
    kind = anatomy_of(model).model_type
    if kind not in _FAMILIES or getattr(model.config.vision_config, "model_type", None) == "pixtral":
        raise VlmtuneError(
            f"data.complexity: images of this {kind} model can neither be made smaller nor have their tokens merged; "
            f"leave it out, or use a model of {', '.join(_FAMILIES)}, Qwen-VL, SmolVLM, Idefics3 or InternVL."
        )


def model_inputs(model: PreTrainedModel, batch: Batch, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward, and of `generate`, for a batch; tokens are merged as it says.

    inputs: in place of the batch's own: with other ids, or what the tower made of the images already.
    """
    inputs = batch.inputs if inputs is None else inputs
    if not batch.merges:
        return inputs
    rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", OUTPUTS)}
    made = inputs.get(OUTPUTS)
    if made is None:
        image = model.base_model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    else:
        image = made["image"]
    tokens = image.pooler_output
    is_list = not isinstance(tokens, Tensor)  # LLaVA: one tensor per image
    features = torch.cat(tuple(tokens)) if is_list else tokens.flatten(0, -2)
    merged = torch.cat(_merged(features.unflatten(0, (len(batch.merges), -1)), batch.merges))
    return rest | {OUTPUTS: {"image": BaseModelOutputWithPooling(pooler_output=[merged] if is_list else merged)}}


def _merged(images: Tensor, merges: Sequence[int]) -> list[Tensor]:
    """float[N_i, D] of each image. images: float[images, N, D], row by row of a square grid."""
    return [image if side == 1 else averaged(image, side) for image, side in zip(images, merges, strict=True)]


def averaged(tokens: Tensor, side: int) -> Tensor:
    """float[N / side^2, D]: means over squares of side x side neighbours. tokens: float[N, D], row by row of a square
    grid."""
    cells = math.isqrt(len(tokens)) // side
    return tokens.view(cells, side, cells, side, -1).mean(dim=(1, 3)).flatten(0, 1)
