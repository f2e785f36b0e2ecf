"""The one place that decodes an image: upright, RGB, or a sentence saying why not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vlmtune.types import VlmtuneError

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 picture; above it we speak of a decompression bomb
ORIENTATION = ExifTags.Base.Orientation
QUARTER_TURNS = (5, 6, 7, 8)  # values of it that swap width and height

T = TypeVar("T")


def load_image(source: Path | bytes, where: str) -> Image.Image:
    """Decode fully, apply the EXIF orientation, convert to RGB (alpha over white).

    where: what a complaint should name (file, row, sample id). Raises VlmtuneError for anything that is not a whole,
    reasonably sized image.
    """

    def decode(image: Image.Image) -> Image.Image:
        image.load()
        return _upright_rgb(image)

    return _opened(source, where, decode)


def image_size(source: Path | bytes, where: str) -> tuple[int, int]:
    """(width, height) that `load_image` would give, from the header alone. Raises VlmtuneError as it does."""

    def upright(image: Image.Image) -> tuple[int, int]:
        swapped = image.getexif().get(ORIENTATION) in QUARTER_TURNS
        return (image.height, image.width) if swapped else image.size

    return _opened(source, where, upright)


def is_quarter_turned(source: Path | bytes) -> bool:
    """Whether EXIF turns this image by 90 degrees, so that width and height are exchanged. It must be decodable."""
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        return image.getexif().get(ORIENTATION) in QUARTER_TURNS


MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def load_mask(source: Path | bytes, where: str) -> Image.Image:
    """Mode L, 255 where a mask of one channel is not 0, else 0. Raises VlmtuneError as `load_image` does."""

    def decode(image: Image.Image) -> Image.Image:
        image.load()
        if image.mode not in MASK_MODES:
            raise VlmtuneError(
                f"{where}: a mask has one channel (grey, black and white, or palette indices), this one is "
                f"{image.mode}; convert it."
            )
        image = image.convert("I") if image.mode.startswith("I") else image
        return Image.fromarray((np.asarray(image) != 0).astype(np.uint8) * 255)

    return _opened(source, where, decode)


def _opened(source: Path | bytes, where: str, read: Callable[[Image.Image], T]) -> T:
    """What `read` makes of an image whose header is sound."""
    name = str(source) if isinstance(source, Path) else f"{len(source)} bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit below is stricter
            image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise VlmtuneError(
                    f"{where}: image {name} has {image.width}x{image.height} pixels, above the limit of "
                    f"{MAX_PIXELS:,}; shrink it first.",
                    code="image_bomb",
                )
            return read(image)
    except VlmtuneError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit: its readers stop at the header already
        raise VlmtuneError(f"{where}: image {name}: {error}; shrink it first.", code="image_bomb") from error
    except FileNotFoundError as error:
        raise VlmtuneError(f"{where}: image {name} does not exist.", code="image_missing") from error
    except Exception as error:  # Pillow's readers raise whatever the damage leads to: struct.error, IndexError, …
        code, why = ("image_empty", "it is empty") if _is_empty(source) else ("image_corrupt", _kind(source, error))
        raise VlmtuneError(
            f"{where}: image {name} cannot be decoded ({why}); replace or remove it.", code=code
        ) from error


def _is_empty(source: Path | bytes) -> bool:
    return not source if isinstance(source, bytes) else source.stat().st_size == 0


def _kind(source: Path | bytes, error: Exception) -> str:
    """What a file is that is no image, where its beginning tells; otherwise what the reader says, its error."""
    if isinstance(error, OSError) and error.errno is not None:
        return str(error)  # a folder, or a file that may not be read
    if isinstance(source, bytes):
        start = source[:256]
    else:
        with source.open("rb") as file:
            start = file.read(256)
    start = start.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, what a failed download leaves"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the picture; run git lfs pull"
    return str(error)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
