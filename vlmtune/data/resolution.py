"""`min_pixels` and `max_pixels`: one name for how large an image may reach the model, in every family (SPEC E2).

Each family has settings of its own for this. They are set on its image processor, so that training, inference and the
exported folder (`save_pretrained` writes them) agree, and plain transformers resizes as training did:

- Qwen2-VL and its successors: `size` holds both limits; sides become multiples of patch x merge. Their rounding may
  leave the limits by part of a side when max_pixels is less than ROOM times min_pixels, and never otherwise;
- InternVL: tiles of a fixed size, in the arrangement nearest to the image's shape (`min_patches`, `max_patches`);
- SmolVLM and Idefics3: the longer side becomes a multiple of the tile (`size["longest_edge"]`): an upper limit only;
- LLaVA, Gemma 3 and other towers of one fixed size: there is nothing to choose, and asking is an error.

Images more than MAX_ASPECT times as long as wide are padded with white: Qwen's processor refuses them, and those that
scale the shorter side to a fixed length would make gigantic pictures of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

from vlmtune.types import VlmtuneError

ROOM = 8
MAX_ASPECT = 200  # longer side : shorter side; above it Qwen's own resize raises


def set_pixel_limits(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the limits (pixels of one image after its resize; None = the processor's own) on a family's processor.

    Raises VlmtuneError for limits that the family has no setting for, that contradict each other, or that are below
    one unit (patch x merge squared; one tile).
    """
    if min_pixels is None and max_pixels is None:
        return
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise VlmtuneError(f"data.min_pixels {min_pixels} is above data.max_pixels {max_pixels}; swap or change them.")
    size = image_processor.size
    if hasattr(image_processor, "merge_size") and size.shortest_edge:
        _limit_budget(image_processor, min_pixels, max_pixels)
    elif hasattr(image_processor, "max_patches"):
        _limit_tiles(image_processor, min_pixels, max_pixels)
    elif hasattr(image_processor, "max_image_size"):
        _limit_longest_edge(image_processor, min_pixels, max_pixels)
    else:
        crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", None) else size
        raise VlmtuneError(
            f"data.min_pixels and data.max_pixels have no effect on this model: its processor makes every image "
            f"{crop.width or crop.shortest_edge}x{crop.height or crop.shortest_edge}; remove them."
        )


def _limit_budget(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    unit = image_processor.patch_size * image_processor.merge_size
    size = image_processor.size
    lowest, highest = min_pixels or size.shortest_edge, max_pixels or size.longest_edge
    if min_pixels is None and lowest > highest:  # the wish was for small images: the family's own floor gives way
        lowest = highest
    _at_least_one(lowest if min_pixels else highest, unit * unit, f"{unit}x{unit} pixels, the cell of one image token")
    if lowest > highest:
        raise VlmtuneError(f"data.min_pixels {lowest} is above the processor's max_pixels {highest}; set both.")
    image_processor.size = type(size)(shortest_edge=lowest, longest_edge=highest)


def _limit_tiles(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    tile = image_processor.size.height * image_processor.size.width
    what = f"{image_processor.size.width}x{image_processor.size.height} pixels, one tile"
    if max_pixels is not None:
        _at_least_one(max_pixels, tile, what)
        image_processor.max_patches = max_pixels // tile
        image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)
    if min_pixels is not None:
        image_processor.min_patches = math.ceil(min_pixels / tile)
    if image_processor.min_patches > image_processor.max_patches:
        raise VlmtuneError(
            f"data.min_pixels asks for {image_processor.min_patches} tiles of {what.partition(',')[0]}, but at most "
            f"{image_processor.max_patches} are allowed; raise data.max_pixels or lower data.min_pixels."
        )
    image_processor.crop_to_patches = image_processor.max_patches > 1


def _limit_longest_edge(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    if min_pixels is not None:
        raise VlmtuneError(
            "data.min_pixels has no effect on this model: its processor scales the longer side of every image to the "
            "same length; remove it."
        )
    tile = image_processor.max_image_size["longest_edge"]
    _at_least_one(max_pixels, tile * tile, f"{tile}x{tile} pixels, one tile")
    image_processor.size = type(image_processor.size)(longest_edge=math.isqrt(max_pixels // (tile * tile)) * tile)


def _at_least_one(pixels: int, unit: int, what: str) -> None:
    if pixels < unit:
        raise VlmtuneError(f"data.min_pixels / data.max_pixels {pixels} is less than {what} ({unit}); raise it.")


def largest_aspect(image_processor: Any) -> float:
    """Longer side : shorter side that this processor can keep: a side of less than one unit would break the limits."""
    if not hasattr(image_processor, "merge_size") or not image_processor.size.longest_edge:
        return MAX_ASPECT
    unit = image_processor.patch_size * image_processor.merge_size
    return min(MAX_ASPECT, image_processor.size.longest_edge / unit**2)


def padded_size(size: tuple[int, int], most: float = MAX_ASPECT) -> tuple[int, int]:
    """(width, height) of `padded_to_aspect`."""
    width, height = size
    return max(width, math.ceil(height / most)), max(height, math.ceil(width / most))


def padded_to_aspect(image: Image.Image, most: float = MAX_ASPECT) -> Image.Image:
    """The image, with white on its right or lower side where it is more than `most` times as long as wide."""
    width, height = padded_size(image.size, most)
    if (width, height) == image.size:
        return image
    return ImageOps.expand(image, (0, 0, width - image.width, height - image.height), (255, 255, 255))


def pixel_range(image_processor: Any) -> tuple[int, int] | None:
    """The fewest and the most pixels an image may get from this processor; None: it makes all images the same size."""
    size = image_processor.size
    if hasattr(image_processor, "merge_size") and size.shortest_edge:
        return size.shortest_edge, size.longest_edge
    if hasattr(image_processor, "max_patches"):
        tile = image_processor.size.height * image_processor.size.width
        return tile * max(1, image_processor.min_patches), tile * image_processor.max_patches
    if hasattr(image_processor, "max_image_size"):
        return image_processor.max_image_size["longest_edge"] ** 2, size.longest_edge**2
    return None


def most_pixels(image_processor: Any, size: tuple[int, int]) -> int:
    """An image of (width, height) gets at most so many pixels; rounding aside exactly so, where it is not tiled."""
    lowest, highest = pixel_range(image_processor)
    if hasattr(image_processor, "merge_size"):
        return min(max(size[0] * size[1], lowest), highest)
    return highest


def even_limit(pixels: Sequence[int], total: int) -> int | None:
    """The limit for each image with which images of so many pixels have at most `total` together; None: they have.

    The largest images are cut first, all to the same limit.
    """
    if sum(pixels) <= total:
        return None
    left = total
    for n, smallest in enumerate(sorted(pixels)):
        share = left // (len(pixels) - n)
        if smallest > share:
            return share
        left -= smallest
    raise AssertionError("images of more than `total` pixels have one above the mean")
