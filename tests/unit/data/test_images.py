"""Every kind of file becomes upright RGB, or a sentence that names it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.images import MAX_PIXELS, load_image
from vlmtune.errors import VlmtuneError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
WHERE = "train.jsonl:3 (sample s3)"


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def loaded(data: bytes | Path) -> np.ndarray:
    image = load_image(data, WHERE)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def complaint(data: bytes | Path) -> str:
    with pytest.raises(VlmtuneError) as caught:
        load_image(data, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: image ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(loaded(encoded(Image.fromarray(PIXELS), exif=exif)), upright(PIXELS))


def test_palette():
    image = Image.fromarray(PIXELS).quantize(colors=256)
    assert np.array_equal(loaded(encoded(image)), np.asarray(image.convert("RGB")))


def test_palette_with_a_transparent_colour_shows_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert loaded(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_alpha_is_over_white():
    """Result = colour * alpha + 255 * (1 - alpha), to within Pillow's rounding."""
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    expected = (PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    assert np.abs(loaded(encoded(Image.fromarray(np.concatenate([PIXELS, alpha], 2)))) - expected).max() <= 1
    grey = PIXELS[..., :1]
    expected = np.repeat((grey * (alpha / 255) + 255 * (1 - alpha / 255)).round(), 3, axis=2)
    both = Image.fromarray(np.concatenate([grey, alpha], 2), "LA")
    assert np.abs(loaded(encoded(both)) - expected).max() <= 1


def test_rgb_with_a_transparent_colour_shows_white_there():
    image = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], dtype=np.uint8))
    assert loaded(encoded(image, transparency=(10, 20, 30))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red, green, blue = loaded(encoded(image, "JPEG", quality=95))[8, 8]
    assert red > 230
    assert green < 30
    assert blue < 30


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    result = loaded(encoded(Image.fromarray(values), format))
    assert result[0, :, 0].tolist() == pytest.approx([0, 1, 127.5, 255], abs=0.6)
    assert (result[..., 0] == result[..., 2]).all()


def test_16_bit_grey_with_a_transparent_value():
    values = np.array([[0, 65535]], dtype=np.uint16)
    data = bytearray(encoded(Image.fromarray(values)))
    chunk = b"tRNS" + struct.pack(">H", 65535)
    at = data.index(b"IDAT") - 4
    data[at:at] = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert loaded(bytes(data))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_one_bit_and_the_first_frame_of_a_gif():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    assert loaded(encoded(bits))[..., 0].tolist() == [[0, 255], [255, 0]]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    assert loaded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(format, tmp_path):
    picture = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(picture, format)
    assert loaded(data).shape == (64, 64, 3)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    message = complaint(path)
    assert str(path) in message
    assert "cannot be decoded" in message
    assert "replace or remove it" in message


def test_what_is_no_image_is_refused(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    assert f"{empty} cannot be decoded" in complaint(empty)
    assert "0 bytes cannot be decoded" in complaint(b"")
    assert "cannot be decoded" in complaint(b"<html>404 not found</html>")
    assert "cannot be decoded" in complaint(tmp_path)  # a folder
    assert "does not exist" in complaint(tmp_path / "missing.png")


@pytest.mark.parametrize("side", [10_001, 30_000])  # above our limit, and above Pillow's own
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    """The header alone says how large it is; nothing of it is in the file."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    message = complaint(data)
    assert side * side > MAX_PIXELS
    assert str(side * side) in message or f"{side}x{side}" in message


SEEDS = [encoded(Image.fromarray(PIXELS), f) for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damage_gives_an_image_or_a_sentence(data):
    """Flipped and missing bytes in any format: never another exception."""
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), WHERE)
    except VlmtuneError as error:
        assert str(error).startswith(WHERE)
    else:
        assert image.mode == "RGB"
