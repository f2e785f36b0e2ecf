"""Where an original image lies on the canvas its image processor makes of it, derived from the processor's settings.

The steps are those of transformers' image processors, in their order: pad to a square (LLaVA's own), resize, crop the
centre, pad at the right and the bottom. Processors that neither crop nor pad stretch the whole image over the canvas.
"""

from __future__ import annotations

from vlmtune.types import ImageGeometry, VlmtuneError

TILING = ("max_image_size", "image_grid_pinpoints", "crop_to_patches", "do_pan_and_scan")
"""Settings of processors that cut tiles (Idefics3 and SmolVLM, LLaVA-NeXT, InternVL, Gemma 3).

Besides the tiles the model sees the whole image, stretched over one canvas: coordinates refer to that one.
"""

Size = tuple[int, int]
"""Width and height in pixels."""


def image_geometry(image_processor, original: Size, canvas: Size) -> ImageGeometry:
    """The geometry of one image. canvas: the size of what came out of the processor (of one tile, where it tiles).

    VlmtuneError: settings unknown here, or ones that do not lead to this canvas: where the image lies is not known.
    """
    whole = ImageGeometry(*original, *canvas)
    tiles = any(hasattr(image_processor, setting) for setting in TILING)
    tells_size = "image_sizes" in image_processor.model_input_names  # Pixtral's: the canvas before padding
    pads, crops = bool(image_processor.do_pad), bool(image_processor.do_center_crop)
    if tiles or tells_size or not (pads or crops):
        return whole

    left, top, size = 0.0, 0.0, original
    placed = (float(original[0]), float(original[1]))
    if pads and hasattr(image_processor, "pad_to_square"):
        size = (max(original),) * 2
        left, top = ((side - inner) // 2 for side, inner in zip(size, original, strict=True))
    if image_processor.do_resize:
        resized = _resized(image_processor.size, size)
        left, top = left * resized[0] / size[0], top * resized[1] / size[1]
        placed = (placed[0] * resized[0] / size[0], placed[1] * resized[1] / size[1])
        size = resized
    if crops:
        crop = image_processor.crop_size["width"], image_processor.crop_size["height"]
        left, top = left - (size[0] - crop[0]) // 2, top - (size[1] - crop[1]) // 2
        size = crop
    if size != canvas and not (pads and size[0] <= canvas[0] and size[1] <= canvas[1]):
        raise VlmtuneError(
            f"{type(image_processor).__name__} made {canvas[0]}x{canvas[1]} pixels of an image of "
            f"{original[0]}x{original[1]}, where its settings say {size[0]}x{size[1]}; boxes would be misplaced: add "
            "what it does to vlmtune/data/geometry.py."
        )
    rectangle = (left, top, left + placed[0], top + placed[1])
    return whole if rectangle == (0.0, 0.0, *canvas) else ImageGeometry(*original, *canvas, rectangle)


def without_margin(geometry: ImageGeometry, size: Size) -> ImageGeometry:
    """The geometry of an image of `size` that was padded at its right and lower sides before it was processed."""
    if size == (geometry.width, geometry.height):
        return geometry
    width, height = geometry.resized_width, geometry.resized_height
    (u1, v1), (u2, v2) = geometry.to_canvas(0.0, 0.0), geometry.to_canvas(*size)
    return ImageGeometry(*size, width, height, (u1 * width, v1 * height, u2 * width, v2 * height))


def _resized(wish, size: Size) -> Size:
    """transformers' sizes: exact height and width, or the shortest edge with the aspect ratio kept."""
    if wish.get("height") and wish.get("width"):
        return wish["width"], wish["height"]
    if wish.get("shortest_edge") and not wish.get("longest_edge"):
        short, width, height = wish["shortest_edge"], *size
        return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    raise VlmtuneError(
        f"the image processor's size {dict(wish)} together with a crop or padding is unknown to vlmtune, so boxes "
        "would be misplaced: add what it does to vlmtune/data/geometry.py."
    )
