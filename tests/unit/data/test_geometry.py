"""Where the original lies on the model's canvas: a marker drawn in the image is found where the geometry says."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from PIL import Image, ImageDraw

import vlmtune.models.load  # noqa: F401  processors without torchvision
from vlmtune.data.encode import Encoder
from vlmtune.data.geometry import image_geometry
from vlmtune.data.grounding import coordinates
from vlmtune.models.load import load_processor
from vlmtune.types import ImageGeometry, VlmtuneError

SQUARE = {"height": 112, "width": 112}
SIZES = [(300, 200), (200, 300), (112, 112), (641, 433), (90, 70), (64, 500), (500, 64)]
PROCESSORS = {
    "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size=SQUARE),
    "clip, crop smaller than the resize": transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 131}, crop_size={"height": 100, "width": 112}
    ),
    "clip, stretched then cropped": transformers.CLIPImageProcessorPil(
        size={"height": 120, "width": 141}, crop_size=SQUARE
    ),
    "clip, no resize": transformers.CLIPImageProcessorPil(do_resize=False, crop_size={"height": 133, "width": 133}),
    "clip, no crop": transformers.CLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
    "clip, padded": transformers.CLIPImageProcessorPil(
        size=SQUARE, do_center_crop=False, do_pad=True, pad_size={"height": 150, "width": 131}
    ),
    "llava": transformers.LlavaImageProcessorPil(size={"shortest_edge": 112}, crop_size=SQUARE),
    "llava, padded to a square": transformers.LlavaImageProcessorPil(
        size={"shortest_edge": 112}, crop_size=SQUARE, do_pad=True
    ),
    "pixtral": transformers.PixtralImageProcessorPil(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    ),
    "siglip": transformers.SiglipImageProcessorPil(size=SQUARE),
    "gemma3": transformers.Gemma3ImageProcessorPil(size=SQUARE),
}


def marked(size: tuple[int, int], place: tuple[int, int], reach: tuple[int, int]) -> Image.Image:
    """A black image with a white rectangle whose exact centre is `place`, reaching so many pixels across and down."""
    image = Image.new("RGB", size)
    (x, y), (across, down) = place, reach
    ImageDraw.Draw(image).rectangle((x - across, y - down, x + across - 1, y + down - 1), fill="white")
    return image


def centre_of_light(canvas: np.ndarray) -> tuple[float, float]:
    """x, y in pixels of the weighted centre of a [channels, height, width] canvas that is black elsewhere."""
    light = canvas.astype(np.float64).sum(axis=0)
    light[light < light.max() / 2] = 0
    rows, columns = np.indices(light.shape) + 0.5
    return float((columns * light).sum() / light.sum()), float((rows * light).sum() / light.sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_marker_is_found_where_the_geometry_says(name, size):
    processor = PROCESSORS[name]
    empty = processor(Image.new("RGB", size), return_tensors="np", do_normalize=False)
    height, width = empty["image_sizes"][0] if "image_sizes" in empty else empty["pixel_values"].shape[-2:]
    canvas_size = (int(width), int(height))
    geometry = image_geometry(processor, size, canvas_size)
    left, top, right, bottom = geometry.visible
    for across, down in [(0.5, 0.5), (0.3, 0.4), (0.75, 0.25)]:
        place = round(left + across * (right - left)), round(top + down * (bottom - top))
        image = marked(size, place, reach=(max(2, round(right - left) // 16), max(2, round(bottom - top) // 16)))
        canvas = processor(image, return_tensors="np", do_normalize=False)["pixel_values"][0]
        found = centre_of_light(canvas - empty["pixel_values"][0])  # LLaVA's padding is not black
        expected = geometry.to_canvas(*place)
        for value, fraction, side in zip(found, expected, canvas_size, strict=True):
            assert value == pytest.approx(fraction * side, abs=0.75)  # pixels of the canvas; a marker has whole ones


def test_worked_examples():
    clip = PROCESSORS["clip"]
    assert image_geometry(clip, (300, 200), (112, 112)) == ImageGeometry(300, 200, 112, 112, (-28.0, 0.0, 140.0, 112.0))
    assert image_geometry(clip, (112, 112), (112, 112)) == ImageGeometry(112, 112, 112, 112)
    padded = image_geometry(PROCESSORS["llava, padded to a square"], (300, 200), (112, 112))
    assert padded.placed == pytest.approx((0, 50 * 112 / 300, 112, 250 * 112 / 300))
    assert padded.visible == pytest.approx((0, 0, 300, 200))
    assert image_geometry(PROCESSORS["siglip"], (300, 200), (112, 112)).placed is None


def test_an_unknown_step_is_refused():
    """A processor that crops in a way of its own must not silently misplace boxes."""
    odd = transformers.CLIPImageProcessorPil(size={"longest_edge": 99}, crop_size=SQUARE)
    with pytest.raises(VlmtuneError, match=r"size {'longest_edge': 99} together with a crop .* is unknown to vlmtune"):
        image_geometry(odd, (300, 200), (112, 112))
    with pytest.raises(VlmtuneError, match=r"made 99x99 pixels of an image of 300x200, where its settings say 112x112"):
        image_geometry(PROCESSORS["clip"], (300, 200), (99, 99))


def test_the_encoder_knows_the_canvas_of_every_family(family, tiny_folder):
    """Two images of unequal size: through the processor as in training, tiles and padding included."""
    encoder = Encoder(load_processor(str(tiny_folder(family))), coordinates("norm1000"))
    images = [Image.new("RGB", size) for size in ((300, 200), (90, 170))]
    first, second = encoder.pictures.process(images, None, "test").geometry
    assert (first.width, first.height, second.width, second.height) == (300, 200, 90, 170)
    if family == "llava":  # the only one that crops
        assert first.placed == (-14.0, 0.0, 70.0, 56.0)
        assert second.placed == (0.0, -24.0, 56.0, 81.0)
    else:
        assert first.placed is None
        assert second.placed is None
    square = {"llava": 56, "internvl": 56, "gemma3": 56, "smolvlm": 64}
    if family in square:
        assert {first.resized_width, first.resized_height, second.resized_width} == {square[family]}
    else:  # the Qwen families keep the aspect ratio
        assert first.resized_width > first.resized_height
        assert second.resized_width < second.resized_height
