"""Where read-outs look: the token of every box, the patches of its image, the mask it should give (SPEC B10, B12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmtune.data.geometry import TILING
from vlmtune.data.images import image_size, load_mask
from vlmtune.data.tokenise import Piece, Place
from vlmtune.types import PER_PATCH, Boxes, ImageGeometry, Kind, Region, Sample, VlmtuneError

FINER = 4  # a mask is sampled so much finer than its cells along each side, and averaged


def regions_of(
    ids: Sequence[int], owners: Sequence[Piece], processor, geometry: Sequence[ImageGeometry], where: str
) -> list[Region]:
    """The boxes of one sample in the order of its tokens. owners: the piece of every token.

    Raises VlmtuneError naming `where` for a mask that cannot be used.
    """
    patches = _patches(ids, owners, processor, geometry)
    first: dict[Place, int] = {}
    last: dict[Place, int] = {}
    for index, piece in enumerate(owners):
        if piece.places:
            first.setdefault(piece.places[0], index)
            last[piece.places[0]] = index
    return [
        Region(
            at=start - 1 if place.is_answer else last[place],
            box=torch.tensor(place.box, dtype=torch.float32),
            list_of=place.list_of,
            is_answer=place.is_answer,
            image=place.image,
            patches=patches[place.image],
            mask=_mask(place, patches[place.image], geometry[place.image], where),
        )
        for place, start in first.items()
    ]


def _patches(
    ids: Sequence[int], owners: Sequence[Piece], processor, geometry: Sequence[ImageGeometry]
) -> list[Tensor | None]:
    """int64[rows, columns] of each image: its tokens, row by row; of one in tiles, those of its overview. None where
    that is not known."""
    known = {int(token) for token in processor.image_token_ids if token is not None}
    # of several (InternVL frames its images) the one of patches; Gemma 3 calls the frame its image token
    token = processor.image_token_id if processor.image_token_id in known else min(known)
    positions: dict[int, list[int]] = {}
    for index, piece in enumerate(owners):
        if piece.kind == Kind.IMAGE and ids[index] == token:
            positions.setdefault(id(piece), []).append(index)
    grids: list[Tensor | None] = []
    for tokens, canvas in zip(positions.values(), geometry, strict=True):
        shown = _overview(tokens, processor)
        columns = _grid_columns(len(shown), canvas)
        grids.append(None if columns is None else torch.tensor(shown).view(-1, columns))
    return grids


def _overview(tokens: list[int], processor) -> list[int]:
    """The tokens of one image that show all of it: all of them, or those of one tile; none where it has no such tile.

    Idefics3, SmolVLM and InternVL put the overview behind the tiles, Gemma 3 in front.
    """
    image_processor = processor.image_processor
    if not any(hasattr(image_processor, setting) for setting in TILING):
        return tokens
    tile = getattr(processor, "image_seq_length", getattr(processor, "image_seq_len", None))
    if tile is None or len(tokens) % tile:
        return []
    if len(tokens) == tile or hasattr(image_processor, "do_pan_and_scan"):
        return tokens[:tile]
    return tokens[-tile:] if getattr(image_processor, "use_thumbnail", True) else []


def _grid_columns(tokens: int, canvas: ImageGeometry) -> int | None:
    columns = round(math.sqrt(tokens * canvas.resized_width / canvas.resized_height))
    rows = tokens // max(1, columns)
    fits = rows * columns == tokens and rows * canvas.resized_width == columns * canvas.resized_height
    return columns if tokens and fits else None


def _mask(place: Place, patches: Tensor | None, geometry: ImageGeometry, where: str) -> Tensor | None:
    if place.mask is None:
        return None
    if patches is None:
        raise VlmtuneError(
            f"{where}: a mask is compared with one grid of patches, but its image was cut into tiles without an "
            "overview; leave loss.referring out, or set the image processor to one tile."
        )
    rows, columns = patches.shape
    return canvas_mask(place.mask, geometry, (rows * PER_PATCH, columns * PER_PATCH), where)


def canvas_mask(source: Path | bytes, geometry: ImageGeometry, size: tuple[int, int], where: str) -> Tensor:
    """float32[size]: the share of every cell of the canvas that the mask covers. size: rows, columns.

    Raises VlmtuneError for a mask of another size than its image, and for one that covers nothing.
    """
    mask = load_mask(source, where)
    _require_size(mask.size, geometry, where)
    if mask.getbbox() is None:
        raise VlmtuneError(f"{where}: a mask covers nothing; it is not 0 where the object is. Correct or remove it.")
    (left, top), (right, bottom) = geometry.to_original(0.0, 0.0), geometry.to_original(1.0, 1.0)
    height, width = (cells * FINER for cells in size)
    matrix = ((right - left) / width, 0.0, left, 0.0, (bottom - top) / height, top)  # cells -> pixels of the original
    sampled = mask.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(sampled.reduce(FINER), dtype=np.float32) / 255.0)


def require_mask_sizes(sample: Sample, geometry: Sequence[ImageGeometry], where: str) -> None:
    """Look at the headers of all masks of a sample: VlmtuneError for one of another size than its image."""
    for part in (part for turn in sample.turns for part in turn.parts if isinstance(part, Boxes)):
        for mask in part.masks:
            _require_size(image_size(mask, where), geometry[part.image], where)


def _require_size(size: tuple[int, int], geometry: ImageGeometry, where: str) -> None:
    if size != (geometry.width, geometry.height):
        raise VlmtuneError(
            f"{where}: a mask of {size[0]}x{size[1]} pixels for an image of {geometry.width}x{geometry.height}; make "
            "them the same size."
        )


def original_mask(covered: Tensor, geometry: ImageGeometry) -> Image.Image:
    """Mode L, 255 where covered: a mask over the canvas, bool[rows, columns], in the pixels of the original."""
    rows, columns = covered.shape
    (left, top), (right, bottom) = geometry.to_canvas(0.0, 0.0), geometry.to_canvas(geometry.width, geometry.height)
    across, down = (right - left) / geometry.width * columns, (bottom - top) / geometry.height * rows
    matrix = (across, 0.0, left * columns, 0.0, down, top * rows)  # pixels of the original -> cells
    canvas = Image.fromarray(covered.numpy().astype(np.uint8) * 255)
    return canvas.transform((geometry.width, geometry.height), Image.Transform.AFFINE, matrix)
