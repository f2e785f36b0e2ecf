"""The vision model in two halves: what a frozen tower makes of an image, and what the projector makes of that.

The first half depends on nothing that trains, so its result can be kept (`data.feature_store`); the second runs in
every step. Together they are transformers' own `get_image_features`: the tower's result is taken where it enters the
projector, with the family's own choice of layer, its reordering and its class token behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from vlmtune.models.anatomy import anatomy_of, canonical_parameters, part_of
from vlmtune.types import ImageInput, VlmtuneError

FEATURES = "features"
DEEPSTACK = "deepstack_{}"
GRID = "image_grid_thw"

_TILES = ("llava", "llava_resampler", "smolvlm", "idefics3", "internvl", "gemma3", "paligemma")
_PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def require_two_halves(model: PreTrainedModel, trained: Collection[str] = ()) -> None:
    """Raises VlmtuneError where the tower's features cannot be kept: they change, or the family has no seam.

    trained: canonical names of parameters that train at some time.
    """
    kind = anatomy_of(model).model_type
    if kind not in (*_TILES, *_PACKED):
        raise VlmtuneError(f"data.vision_cache: {kind} models have no seam between tower and projector; leave it out.")
    names = [name for name in trained if part_of(name) == "vision"]
    now = [name for name, parameter in canonical_parameters(model).items() if parameter.requires_grad]
    names = names or [name for name in now if part_of(name) == "vision"]
    if names:
        raise VlmtuneError(
            f"data.vision_cache: the vision tower trains ({len(names)} tensors, first {names[0]}), so that its "
            "features change with every step; freeze it (match: vision, train: frozen), or leave the cache out."
        )


@dataclass
class _ProjectorReached(Exception):
    """Ends a forward of the tower: torch has no other way to leave one half-way."""

    taken: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _stopped_at_projector(model: PreTrainedModel) -> Iterator[None]:
    """Within, `get_image_features` raises `_ProjectorReached` with all that projector modules were given."""
    main, *deep = _projectors(model)
    reached = _ProjectorReached()

    def stop(module: nn.Module, args: tuple) -> None:
        reached.taken[FEATURES] = args[0]
        raise reached

    def keep(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            reached.taken[name] = args[0]

        return hook

    hooks = [main.register_forward_pre_hook(stop)]
    hooks += [module.register_forward_pre_hook(keep(DEEPSTACK.format(n))) for n, module in enumerate(deep)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _projectors(model: PreTrainedModel) -> list[nn.Module]:
    """The projector, and those of Qwen3-VL that read earlier blocks."""
    main, *others = [model.get_submodule(path) for path in anatomy_of(model).projector]
    return [main, *(module for listed in others for module in listed)]


@torch.no_grad()
def tower_features(
    model: PreTrainedModel, pixels: Mapping[str, Tensor], counts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """First half: of every image, what enters the projector, in the form that `project` reads.

    pixels: what the model's forward takes for all of these images together; counts: of each image, its patches or
    tiles in `pixel_values`. Returns {"features": float[rows, …], "deepstack_0": …,
    "image_grid_thw": int64[1, 3]}, those that the family has.
    """
    if "image_sizes" in pixels:
        raise VlmtuneError(f"data.vision_cache: the tower of this {type(model).__name__} packs images; leave it out.")
    try:
        with _stopped_at_projector(model):
            model.base_model.get_image_features(**pixels)
    except _ProjectorReached as reached:
        taken = {name: value.detach().split(list(counts)) for name, value in reached.taken.items()}
    else:
        raise VlmtuneError(f"the projector of {type(model).__name__} did not run; the vision cache cannot be used.")
    if GRID in pixels:
        taken[GRID] = pixels[GRID].split(1)
    # cloned: a view would keep the features of all images alive with those of one
    return [{name: values[n].clone() for name, values in taken.items()} for n in range(len(counts))]


def project(model: PreTrainedModel, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Second half: keyword arguments of the model's forward for these images, in their order."""
    kind = anatomy_of(model).model_type
    main, *deep = _projectors(model)
    features = torch.cat([image[FEATURES] for image in images])
    if kind in _TILES:
        projected = main(features)
        is_tensor = kind in ("internvl", "gemma3", "paligemma")
        return _outputs(projected if is_tensor else list(projected))
    grid = torch.cat([image[GRID] for image in images])
    tower = model.get_submodule(anatomy_of(model).vision)
    sizes = (grid.prod(-1) // tower.spatial_merge_size**2).tolist()
    merged = main(features)
    if hasattr(tower, "window_size"):  # Qwen2.5-VL: patches come in the order of its attention windows
        index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        merged = merged[torch.argsort(index).to(merged.device)]
    inputs = _outputs(merged.split(sizes))
    if deep:
        inputs["mm_encoder_outputs"]["image"].deepstack_features = [
            module(torch.cat([image[DEEPSTACK.format(n)] for image in images])).split(sizes)
            for n, module in enumerate(deep)
        ]
    return inputs | {GRID: grid}


def _outputs(pooled: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    return {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=pooled)}}


class CachedVision:
    """Both halves for the images of a micro-batch: the first only for those that came without features.

    On a CPU the tower runs image by image: what it makes of one then depends on no other, so that a run whose features
    were kept computes to the last bit what it would have without. keep: is told the key and features of what was new.
    """

    def __init__(self, model: PreTrainedModel, keep: Callable[[str, Mapping[str, Tensor]], None]):
        require_two_halves(model)
        self.model, self._keep = model, keep
        self.kept = self.made = 0  # images whose features came with them, and others

    def complete(self, images: Sequence[ImageInput]) -> None:
        """Run the tower over those that have no features yet."""
        new = [image for image in images if image.features is None]
        self.kept, self.made = self.kept + len(images) - len(new), self.made + len(new)
        for group in _alike(new):
            pixels = _joined([image.pixels for image in group])
            counts = [_rows(image.pixels) for image in group]
            for image, features in zip(group, tower_features(self.model, pixels, counts), strict=True):
                image.features = features
                self._keep(image.key, features)

    def inputs(self, images: Sequence[ImageInput]) -> dict[str, Any]:
        """Keyword arguments of the model's forward in place of its pixels."""
        self.complete(images)
        return project(self.model, [image.features for image in images])


def _alike(images: Sequence[ImageInput]) -> list[list[ImageInput]]:
    """Images that one call of the tower takes: on a GPU all with tiles of one size."""
    groups: dict[tuple, list[ImageInput]] = {}
    for number, image in enumerate(images):
        pixels = image.pixels["pixel_values"]
        alone = number if pixels.device.type == "cpu" else -1
        groups.setdefault((alone, *pixels.shape[2 if pixels.dim() == 5 else 1 :]), []).append(image)
    return list(groups.values())


def _joined(pixels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Along patches or tiles; the SmolVLM family has them in the second dimension: [1, tiles, 3, H, W]."""
    across = int(pixels[0]["pixel_values"].dim() == 5)
    return {name: torch.cat([one[name] for one in pixels], dim=across) for name in pixels[0]}


def _rows(pixels: Mapping[str, Tensor]) -> int:
    return pixels["pixel_values"].shape[int(pixels["pixel_values"].dim() == 5)]
